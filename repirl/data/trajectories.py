"""Fixed rollouts: responses that some policy sampled before, with their outcomes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from repirl.batch import PackedBatch, pack
from repirl.data.errors import DataError
from repirl.data.prompts import LengthLimit, Ordered, read_prompt
from repirl.data.responses import decode_response, encode_response, fits
from repirl.data.sources import read_rows
from repirl.data.text import EndTokens, find_end_tokens
from repirl.data.values import Place, shown
from repirl.dataconfig import DataConfig, TrajectoryFileConfig


@dataclass(frozen=True)
class Trajectory:
    """A response that was sampled. outcome: 1 right, 0 wrong, NaN not known. logprobs: log mu of each response token;
    None where the start policy has sampled it."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    outcome: float
    logprobs: tuple[float, ...] | None


def load_trajectories(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, model: str | None = None, temperature: float | None = None
) -> list[Trajectory]:
    """The rows of `data.trajectories`.

    Args:
        data: the options.
        tokenizer: the policy's.
        model: the policy's, whose generation_config says what else ends a response.
        temperature: at which log mu is computed where the file does not hold it; rows that say another one are refused.

    Raises:
        DataError: for files, rows and lengths that do not fit, with the row.
    """
    source = data.trajectories
    if source is None:
        raise DataError("fixed rollouts need data.trajectories")
    limit, ends = LengthLimit(data), find_end_tokens(data, tokenizer, model)
    trajectories = []
    for _, place, row in read_rows(source, "train"):
        prompt_ids = read_prompt(row, place, source.prompt_column, "data.trajectories.prompt_column", data, tokenizer)
        response_ids = _response_ids(row, place, source, ends, tokenizer)
        outcome = math.nan
        if source.outcome_column is not None:
            value = place.value(row, source.outcome_column, "data.trajectories.outcome_column")
            outcome = _number(value, place, source.outcome_column)
        logprobs = None
        if source.logprob_column is not None:
            value = place.value(row, source.logprob_column, "data.trajectories.logprob_column")
            logprobs = _logprobs(value, place, source.logprob_column, len(response_ids))
        elif temperature is not None and row.get("temperature") not in (None, temperature):
            raise place.error(
                f"the response was sampled at temperature {shown(row['temperature'])}, but its log-probabilities would "
                f"be computed at rollout.temperature, {temperature}: set that to the first, or name the column that "
                "holds them (data.trajectories.logprob_column)"
            )
        if fits(limit, data, place, prompt_ids, len(response_ids)):
            trajectories.append(Trajectory(prompt_ids, response_ids, outcome, logprobs))
    limit.report(source.path, len(trajectories))
    return trajectories


def _response_ids(
    row: dict[str, Any],
    place: Place,
    source: TrajectoryFileConfig,
    ends: EndTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, ...]:
    """A row's token ids, or those of its text, which then is a finished response."""
    column = source.ids_column
    if row.get(column) is None:
        column = source.response_column
        value = place.value(row, column, "data.trajectories.response_column")
        texts = place.solutions(value, column)
        if len(texts) > 1:
            raise place.error(f"{column!r} holds {len(texts)} responses, expected one; give each a row of its own")
        return encode_response(texts[0], place, column, ends, tokenizer)
    ids = row[column]
    size = len(tokenizer)
    if not isinstance(ids, list) or not ids:
        raise place.error(f"{column!r} holds {shown(ids)}, expected a list of token ids")
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size:
            raise place.error(f"{column!r} holds {shown(i)}, expected token ids below {size} (the tokenizer's size)")
    if inner := set(ids[:-1]).intersection(ends.ids):
        raise place.error(
            f"{column!r} goes on after the end token {tokenizer.decode([min(inner)])!r}, which ends every response"
        )
    text = row.get(source.response_column)
    written = decode_response(ids, ends, tokenizer)
    if isinstance(text, str) and text != written:
        raise place.error(
            f"{column!r} are tokens of {shown(written)}, but {source.response_column!r} holds {shown(text)}: the ids "
            "are of another tokenizer"
        )
    return tuple(ids)


def _number(value: Any, place: Place, column: str) -> float:
    """An outcome: a number from 0 to 1, also as text, as tables hold it."""
    try:
        number = math.nan if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise place.error(f"{column!r} is {shown(value)}, expected an outcome: 1 for right, 0 for wrong")
    return number


def _logprobs(value: Any, place: Place, column: str, num_tokens: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != num_tokens:
        length = len(value) if isinstance(value, list) else shown(value)
        raise place.error(
            f"{column!r} holds {length} log-probabilities, expected one for each of the response's {num_tokens} tokens"
        )
    for number in value:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or number > 0:
            raise place.error(f"{column!r} holds {shown(number)}, expected log-probabilities: numbers of at most 0")
    return tuple(map(float, value))


class Trajectories(Ordered):
    """Fixed rollouts in the order of a run, prompt by prompt.

    Args:
        rows: all of them; those with the same prompt are its group.
        seed: of the order of the prompts.
        prompts_per_turn: how many prompts `next` gives.
        samples_per_prompt: the most rollouts of a prompt that `next` gives. Of a prompt with more, each pass over the
            prompts gives the next ones.
    """

    what = "fixed rollouts"

    def __init__(self, rows: list[Trajectory], *, seed: int, prompts_per_turn: int, samples_per_prompt: int) -> None:
        self.rows, self.prompts_per_turn, self.samples_per_prompt = rows, prompts_per_turn, samples_per_prompt
        groups: dict[tuple[int, ...], list[Trajectory]] = defaultdict(list)
        for row in rows:
            groups[row.prompt_ids].append(row)
        self._groups = [*groups.values()]
        super().__init__(len(self._groups), seed)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_prompts(self) -> int:
        return len(self._groups)

    def next(self) -> PackedBatch:
        """The rollouts of the next prompts, with `old_logprob` and `sampler_logprob` where the file has log mu."""
        chosen: list[Trajectory] = []
        group_ids: list[int] = []
        for number in range(self.prompts_per_turn):
            [index] = self._cursor.next(1)
            group = self._groups[index]
            count = min(self.samples_per_prompt, len(group))
            first = self._cursor.epoch * count
            chosen += [group[(first + i) % len(group)] for i in range(count)]
            group_ids += [number] * count
        batch = pack(
            [(row.prompt_ids, row.response_ids) for row in chosen],
            group_ids=group_ids,
            outcome=[row.outcome for row in chosen],
        )
        logprobs = [row.logprobs for row in chosen if row.logprobs is not None]
        if logprobs:
            values = torch.tensor([value for row in logprobs for value in row])
            for name in ("old_logprob", "sampler_logprob"):
                batch.write(name, values)
        return batch
