"""A response as steps of reasoning: how its text is split, and at which token each step ends."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Steps:
    """The steps of one response.

    Args:
        texts: of each step, its separator included; joined they are the response's text.
        ends: for each step the index of its last token among the response's tokens, increasing. The last step ends with
            the response's last token, which is the end token of a finished response.
    """

    texts: tuple[str, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class StepForm:
    """How a PRM that scores the end of each step wants responses to be written.

    Args:
        tag: stands behind each step, the last one too; the step is scored at its last token.
        split: what ends a step in a response that is one text.
        between: stands between a tag and the next step.
        numbered: whether steps begin with "Step 1: ", "Step 2: ", ...
    """

    tag: str
    split: str
    between: str = ""
    numbered: bool = False

    def steps(self, text: str) -> list[str]:
        """The steps of a response that is one text; none where it is blank."""
        return [step for part in text.split(self.split) if (step := part.strip())]

    def write(self, steps: Sequence[str]) -> str:
        """The text of a response with these steps."""
        if self.numbered:
            numbers = [f"Step {number}:" for number in range(1, len(steps) + 1)]
            steps = [s if s.startswith(n) else f"{n} {s}" for s, n in zip(steps, numbers, strict=True)]
        return self.between.join(step + self.tag for step in steps)


def split_steps(text: str, separator: str) -> list[str]:
    """Split a text behind each separator. What is blank belongs to the step before it, or to the first one.

    Returns:
        The steps' texts, at least one; joined they are `text`.
    """
    steps: list[str] = []
    for piece in re.split(f"(?<={re.escape(separator)})", text):
        if steps and (_is_blank(piece, separator) or _is_blank(steps[-1], separator)):
            steps[-1] += piece
        else:
            steps.append(piece)
    return steps


def _is_blank(piece: str, separator: str) -> bool:
    return not piece.replace(separator, "").strip()


def join_steps(steps: Sequence[str], separator: str, *, finished: bool) -> str:
    """The text of a response whose steps are given without their separators. One follows each step, but not the last
    step of a finished response."""
    return separator.join(steps) + ("" if finished else separator)


def char_ends(steps: Sequence[str]) -> list[int]:
    """Where each step ends in the joined text: the number of characters up to there."""
    return list(accumulate(map(len, steps)))


def token_ends(
    text: str, ends: Sequence[int], token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """For each place in a text, the index of the token that the character before it belongs to.

    Args:
        text: the text of the tokens.
        ends: places in it: numbers of characters, increasing.
        token_ids: the tokens, as the tokenizer or a model that samples has made them.
        tokenizer: of the tokens.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(encoded.input_ids) == list(token_ids):
            starts = [start for start, _ in encoded.offset_mapping]
            return [max(bisect_left(starts, end) - 1, 0) for end in ends]
    # A model may sample other tokens than the tokenizer makes of the text.
    numbers = range(len(token_ids))
    return [min(bisect_left(numbers, end, key=_length(token_ids, tokenizer)), len(token_ids) - 1) for end in ends]


def _length(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Any:
    def length(last: int) -> int:
        """Characters of the tokens up to `last`; a part of a character, which is decoded as a mark, is none."""
        return len(decode(token_ids[: last + 1], tokenizer).rstrip("\ufffd"))

    return length


def decode(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, special ones included and nothing tidied up."""
    text: Any = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def segment(token_ids: Sequence[int], separator: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> Steps:
    """The steps of a response that is given as tokens.

    Args:
        token_ids: the response's, at least one.
        separator: what ends a step.
        tokenizer: of the tokens.
        ended: whether the last token is an end token, which is no part of the text.
    """
    text = decode(token_ids[: len(token_ids) - ended], tokenizer)
    texts = split_steps(text, separator)
    ends = token_ends(text, char_ends(texts)[:-1], token_ids[: len(token_ids) - ended], tokenizer)
    merged: list[tuple[str, int]] = []
    for step, end in zip(texts, [*ends, len(token_ids) - 1], strict=True):
        # A token may hold the ends of two steps; these are one step.
        before = merged.pop()[0] if merged and merged[-1][1] >= end else ""
        merged.append((before + step, end))
    return Steps(tuple(step for step, _ in merged), tuple(end for _, end in merged))
