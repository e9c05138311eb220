"""Responses of a file as tokens, whatever they are for: experts' solutions, preference pairs, fixed rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from repirl.data.prompts import LengthLimit
from repirl.data.text import EndTokens, encode_solution
from repirl.data.values import Place
from repirl.dataconfig import DataConfig


def encode_response(
    text: str, place: Place, column: str, ends: EndTokens, tokenizer: PreTrainedTokenizerBase, way_out: str = ""
) -> tuple[int, ...]:
    """Token ids of a finished response, with one end token at its end.

    Args:
        text: the response.
        place: of its row, for messages.
        column: that it stands in, for messages.
        ends: what ends a response.
        tokenizer: the model's.
        way_out: what else helps where an end token is inside the text, for the message.

    Raises:
        DataError: it is empty, or goes on after an end token.
    """
    ids = encode_solution(text, ends, tokenizer)
    if not text.strip() or len(ids) == 1:
        raise place.error(f"{column!r} holds an empty response")
    if inner := set(ids[:-1]).intersection(ends.ids):
        raise place.error(
            f"{column!r} goes on after the end token {tokenizer.decode([min(inner)])!r}, which ends every response: "
            f"cut it off, {way_out}{', ' if way_out else ''}or set data.end_tokens"
        )
    return ids


def decode_response(ids: Sequence[int], ends: EndTokens, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response, without its end token."""
    # It is cut off here: `skip_special_tokens` leaves it in if the tokenizer does not call it special.
    return str(tokenizer.decode(list(ids[:-1] if ids[-1] in ends.ids else ids), skip_special_tokens=True))


def fits(
    limit: LengthLimit,
    data: DataConfig,
    place: Place,
    prompt_ids: tuple[int, ...],
    *responses: int,
    what: str = "response",
) -> bool:
    """Whether a prompt and the lengths of its responses are within the limits; DataError as of `LengthLimit.allows`."""
    return limit.allows(len(prompt_ids), place, "prompt", "data.max_prompt_tokens", data.max_prompt_tokens) and all(
        limit.allows(length, place, what, "data.max_expert_tokens", data.max_expert_tokens) for length in responses
    )
