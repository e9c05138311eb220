"""Text as tokens: prompts inside their templates, solutions, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from repirl.config import ConfigError, first_line
from repirl.data.errors import DataError
from repirl.data.template import render
from repirl.data.values import Messages
from repirl.dataconfig import DataConfig

# Stands for an assistant's text where only what follows it is of interest.
_MARK = "repirlmark"


@dataclass(frozen=True)
class EndTokens:
    """ids: each of them ends a response · turn: the one of them that expert solutions end with."""

    ids: tuple[int, ...]
    turn: int


def find_end_tokens(data: DataConfig, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> EndTokens:
    """What ends a response: `data.end_tokens`, or else the chat template's end of turn, the tokenizer's end token and
    those of the model's generation_config.

    Args:
        data: the options of prompts.
        tokenizer: the model's.
        model: folder or hub id; None where it does not matter what else ends a response than `turn`.

    Raises:
        ConfigError: for an end token that is no token of the tokenizer.
    """
    if data.end_tokens is not None:
        ids = [_token_id(token, tokenizer) for token in data.end_tokens]
        return EndTokens(tuple(dict.fromkeys(ids)), ids[0])
    end, turn = _eos_id(tokenizer), _end_of_turn(data, tokenizer)
    ids = [end] if turn is None else [turn, end] if data.chat_template else [end, turn]
    if model is not None:
        ids += _of_generation_config(model, len(tokenizer))
    return EndTokens(tuple(dict.fromkeys(ids)), ids[0])


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    return end


def _token_id(token: str | int, tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(token, int):
        if token >= len(tokenizer):
            raise ConfigError(f"data.end_tokens has the id {token}, but the tokenizer has {len(tokenizer)} tokens")
        return token
    ids: list[int] = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and token != tokenizer.unk_token):
        count = "not in the tokenizer's vocabulary" if len(ids) == 1 else f"{len(ids)} tokens, not one"
        raise ConfigError(f"data.end_tokens has {token!r}, which is {count}: give the text of one token, or its id")
    return ids[0]


def _end_of_turn(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token with which the chat template ends an assistant's text; None where there is none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": _MARK}]
    try:
        text = render(messages, data, tokenizer, add_generation_prompt=False)
    except DataError:
        # Whether the template can be used is told where a prompt needs it.
        return None
    _, mark, rest = text.rpartition(_MARK)
    others = {tokenizer.unk_token_id, tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    ids = tokenizer(rest, add_special_tokens=False).input_ids if mark else []
    return next((i for i in ids if i in tokenizer.added_tokens_decoder and i not in others), None)


def _of_generation_config(model: str, vocab_size: int) -> list[int]:
    """The end tokens that generation_config.json names; none where there is no such file."""
    path = Path(model, "generation_config.json")
    if Path(model).is_dir() and not path.is_file():
        return []
    try:
        eos_token_id: Any = GenerationConfig.from_pretrained(model).eos_token_id
    except Exception as error:
        if not path.is_file():
            # A hub's model without the file.
            return []
        raise ConfigError(f"{path} cannot be read: {first_line(error)}") from error
    ids = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab_size:
            raise ConfigError(
                f"generation_config.json of {model!r} has the end token {i!r}, expected ids below {vocab_size} (the "
                "tokenizer's size): correct it, or set data.end_tokens"
            )
    return ids


def encode_prompt(prompt: str | Messages, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a prompt, a text inside its chat template or `prompt_template`, or messages inside the former.

    DataError where the options do not fit the prompt or the tokenizer.
    """
    return _encode_written(write_prompt(prompt, data, tokenizer), data, tokenizer)


def encode_joined(
    prompt: str | Messages, response: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt and what follows it, encoded as one text, which matters where they meet within a line.

    Returns:
        Those that the prompt alone has as well, and the rest.
    """
    text = write_prompt(prompt, data, tokenizer)
    alone, ids = (_encode_written(part, data, tokenizer) for part in (text.rstrip(" "), text + response))
    same = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    return ids[:same], ids[same:]


def _encode_written(text: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if not data.chat_template:
        return _encode_start(text, tokenizer)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def write_prompt(prompt: str | Messages, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a prompt; see encode_prompt."""
    if isinstance(prompt, str):
        prompt = data.prompt_template.replace("{prompt}", prompt)
        if not data.chat_template:
            return prompt
        messages = [{"role": "user", "content": prompt}]
    else:
        if not data.chat_template:
            raise DataError("messages need the chat template of the tokenizer: set data.chat_template: true")
        if data.prompt_template != "{prompt}":
            raise DataError("data.prompt_template is for prompts that are text, these are messages: leave it out")
        messages = list(prompt)
    if data.system is not None:
        if messages[0]["role"] == "system":
            raise DataError("the messages have a system message of their own: leave out data.system")
        messages.insert(0, {"role": "system", "content": data.system})
    text = render(messages, data, tokenizer)
    for what, message in [("data.system", messages[0])] * (data.system is not None) + [("the prompt", messages[-1])]:
        if "".join(message["content"].split()) not in "".join(text.split()):
            raise DataError(f"the chat template leaves out {what}: it does not support the role {message['role']!r}")
    return text


def _encode_start(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a text that goes on: with what the tokenizer puts before it, without what it puts behind it."""
    plain = tokenizer(text, add_special_tokens=False).input_ids
    if not tokenizer.num_special_tokens_to_add():
        return tuple(plain)
    ids = tokenizer(text).input_ids
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return tuple(ids[: start + len(plain)])
    return tuple(ids)


def encode_solution(text: str, ends: EndTokens, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a finished response: one end of turn at its end, whatever end tokens the text has there."""
    added = tokenizer.added_tokens_decoder
    texts = [added[i].content for i in ends.ids if i in added]
    while (last := next((end for end in texts if text.rstrip().endswith(end)), None)) is not None:
        text = text.rstrip().removesuffix(last)
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    while ids and ids[-1] in ends.ids:
        ids.pop()
    return (*ids, ends.turn)


def response_text(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
    """A response as text, without special tokens; ended: whether its last token is an end token, which is cut off."""
    # `skip_special_tokens` leaves an end token in if the tokenizer does not call it special.
    text: Any = tokenizer.decode(list(token_ids[: len(token_ids) - ended]), skip_special_tokens=True)
    return str(text)
