"""Preference pairs: a prompt with a better and a worse response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.batch import PackedBatch, pack
from repirl.data.errors import DataError
from repirl.data.prompts import LengthLimit, Ordered, read_prompt
from repirl.data.responses import encode_response, fits
from repirl.data.sources import read_rows
from repirl.data.text import encode_prompt, find_end_tokens
from repirl.data.values import Messages, Place
from repirl.dataconfig import DataConfig, PairFileConfig


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two responses, which end with the end token."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


def load_pairs(data: DataConfig, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> list[Pair]:
    """The pairs of `data.pairs`, in TRL's formats: text, or messages; the prompt in a column of its own, or as the
    messages that both responses begin with.

    Args:
        data: the options.
        tokenizer: the policy's.
        model: the policy's, whose generation_config says what else ends a response.

    Raises:
        DataError: for files, rows and lengths that do not fit, with the row.
    """
    source = data.pairs
    if source is None:
        raise DataError("preference pairs need data.pairs")
    limit, ends = LengthLimit(data), find_end_tokens(data, tokenizer, model)
    pairs = []
    for _, place, row in read_rows(source, "train"):
        prompt_ids, chosen, rejected = _read_pair(row, place, source, data, tokenizer)
        ids = [
            encode_response(text, place, column, ends, tokenizer)
            for text, column in ((chosen, source.chosen_column), (rejected, source.rejected_column))
        ]
        if ids[0] == ids[1]:
            raise place.error(
                f"{source.chosen_column!r} and {source.rejected_column!r} are the same response: leave the row out"
            )
        if fits(limit, data, place, prompt_ids, *map(len, ids)):
            pairs.append(Pair(prompt_ids, ids[0], ids[1]))
    limit.report(source.path, len(pairs))
    return pairs


def _read_pair(
    row: dict[str, Any], place: Place, source: PairFileConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], str, str]:
    """Token ids of the prompt, and the texts of both responses."""
    columns = {"chosen_column": source.chosen_column, "rejected_column": source.rejected_column}
    values = [place.value(row, column, f"data.pairs.{option}") for option, column in columns.items()]
    if source.prompt_column is not None:
        prompt_ids = read_prompt(row, place, source.prompt_column, "data.pairs.prompt_column", data, tokenizer)
        texts = [_response(value, place, column) for value, column in zip(values, columns.values(), strict=True)]
        return prompt_ids, texts[0], texts[1]
    chats = [_chat(value, place, column) for value, column in zip(values, columns.values(), strict=True)]
    if chats[0][:-1] != chats[1][:-1]:
        raise place.error(
            f"{source.chosen_column!r} and {source.rejected_column!r} are answers to different messages: expected the "
            "same messages before the last one"
        )
    try:
        prompt_ids = encode_prompt(chats[0][:-1], data, tokenizer)
    except DataError as error:
        raise place.error(str(error)) from error
    return prompt_ids, chats[0][-1]["content"], chats[1][-1]["content"]


def _response(value: Any, place: Place, column: str) -> str:
    if isinstance(value, list) and len(value) > 1:
        raise place.error(
            f"{column!r} holds {len(value)} messages, expected the assistant's alone: with the prompt's messages in "
            "it, set data.pairs.prompt_column: null"
        )
    return place.solutions(value, column)[0]


def _chat(value: Any, place: Place, column: str) -> Messages:
    """Messages that end with the assistant's answer to those before."""
    if not isinstance(value, list):
        raise place.error(
            f"{column!r} holds no list of messages, and without data.pairs.prompt_column the prompt is read from it: "
            "name the prompt's column"
        )
    messages = place.messages(value, column)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise place.error(f"{column!r} holds messages of {roles}, expected a prompt's and then the assistant's")
    return messages


def pack_pairs(pairs: list[Pair]) -> PackedBatch:
    """The chosen responses, then the rejected ones in the same order; both of a pair have its group id."""
    chosen = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rejected = [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    return pack(chosen + rejected, group_ids=[*range(len(pairs))] * 2, outcome=[1.0] * len(pairs) + [0.0] * len(pairs))


class Pairs(Ordered):
    """Pairs in the order of a run. rows: all of them. seed: of the order. per_turn: how many `next` gives."""

    what = "preference pairs"

    def __init__(self, rows: list[Pair], *, seed: int, per_turn: int) -> None:
        self.rows, self.per_turn = rows, per_turn
        super().__init__(len(rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def next(self) -> PackedBatch:
        """The next pairs, as `pack_pairs` packs them."""
        return pack_pairs([self.rows[i] for i in self._cursor.next(self.per_turn)])
