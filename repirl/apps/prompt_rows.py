"""Prompts of a file that an exported policy is asked, and options by which it samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from repirl.config import Config, ConfigError
from repirl.configfile import build_config, merge
from repirl.data.answers import answer_of
from repirl.data.prompts import Prompt, load_prompts
from repirl.data.sources import read_rows
from repirl.data.values import Place
from repirl.dataconfig import SourceConfig
from repirl.model_checks import check_vocabulary, longest_position
from repirl.models import load_tokenizer
from repirl.sources import check_source


@dataclass(frozen=True)
class PromptRow:
    """A row with a prompt.

    Args:
        place: where it stands.
        row: all its columns.
        prompt: text or messages.
        answer: the right one; None where it is not known.
        number: of the row, from 0.
        token_ids: of the prompt, as the policy sees it.
    """

    place: Place
    row: dict[str, Any]
    prompt: Any
    answer: str | None
    number: int
    token_ids: tuple[int, ...]


def prompts_of(source: SourceConfig, column: str) -> list[Any]:
    """The prompts of a file, each text or messages. DataError where a row has none; it names the row."""
    option = "--prompt-column"
    return [place.prompt(place.value(row, column, option), column) for _, place, row in read_rows(source, "train")]


def read_prompt_rows(
    source: SourceConfig, prompts: Sequence[Prompt], prompt_column: str, answer_column: str | None, *, tests: bool
) -> list[PromptRow]:
    """The rows of a file with their answers.

    Args:
        source: the file.
        prompts: as tokens; rows that are not among them are left out.
        prompt_column: where the prompts are.
        answer_column: where the answers are; None for none. "answer" may be missing in all rows.
        tests: answers are tests of programs.

    Raises:
        DataError: a column is missing or holds something else; it names the row.
    """
    tokens = {prompt.index: prompt.token_ids for prompt in prompts}
    rows = []
    for number, place, row in read_rows(source, "train"):
        if number not in tokens:
            continue
        prompt = place.prompt(place.value(row, prompt_column, "--prompt-column"), prompt_column)
        answer = None
        if answer_column is not None and (answer_column != "answer" or row.get("answer") is not None):
            answer = answer_of(row, place, answer_column, "--answer-column", tests=tests)
        rows.append(PromptRow(place, row, prompt, answer, number, tokens[number]))
    if (without := [row for row in rows if row.answer is None]) and len(without) < len(rows):
        raise without[0].place.error(f"there is no {answer_column!r}, but other rows have one")
    return rows


def fitted_config(values: dict[str, Any], max_tokens: int | None) -> tuple[Config, list[Prompt]]:
    """A configuration whose `data.max_prompt_tokens` is the longest prompt's length.

    Args:
        values: of the configuration, with `data.train` and `policy.model`.
        max_tokens: `rollout.max_response_tokens`; None for what `values` say or, where they do not, as by default or,
            if it is less, what is left of the model's positions behind the longest prompt.

    Returns:
        The configuration, and the prompts of `data.train`.

    Raises:
        ConfigError: options, prompts or the model cannot be used, or a sequence would be longer than the model's
            positions.
    """
    config = build_config(values)
    policy = config.policy
    described = check_source(policy.model, policy.gguf_file, "causal")
    tokenizer = load_tokenizer(policy.model, policy.gguf_file)
    check_vocabulary(described, policy.model, tokenizer, policy.model)
    prompts = load_prompts(config.data, tokenizer, "train").prompts
    longest = max(len(prompt.token_ids) for prompt in prompts)
    by_name = {"--max-tokens": max_tokens, "--rollout.max_response_tokens": _given_tokens(values)}
    asked = {option: tokens for option, tokens in by_name.items() if tokens is not None}
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} are the same: give one of them")
    limit = response_tokens(described, policy.model, longest, asked, config.rollout.max_response_tokens)
    fitting = {"data": {"max_prompt_tokens": longest}, "rollout": {"max_response_tokens": limit}}
    return build_config(merge(values, fitting)), prompts


def _given_tokens(values: Mapping[str, Any]) -> int | None:
    rollout = values.get("rollout")
    return rollout.get("max_response_tokens") if isinstance(rollout, Mapping) else None


def response_tokens(
    described: PretrainedConfig, model: str, longest: int, asked: Mapping[str, int], default: int
) -> int:
    """How many tokens a response may have.

    Args:
        described: the model's configuration.
        model: its name, for messages.
        longest: tokens of the longest prompt.
        asked: what the user asks for, by option; empty for nothing.
        default: unless the model has positions for less.

    Raises:
        ConfigError: the model has not as many positions as are asked for, or none behind the longest prompt.
    """
    window = longest_position(described)
    room = None if window is None else window[0] - longest
    if room is not None and room < 1:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, but {model!r} has positions for {window and window[0]} only: "
            "leave that prompt out, or use another model"
        )
    for option, tokens in asked.items():
        if room is not None and tokens > room:
            raise ConfigError(
                f"{option} is {tokens}, but behind the longest prompt, of {longest} tokens, {model!r} has positions "
                f"for {room} ({window and window[1]} in its config.json): ask for {room} or fewer, or leave it out"
            )
        return tokens
    return default if room is None else min(default, room)
