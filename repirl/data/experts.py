"""Expert trajectories: a prompt and a solution, no labels of any kind."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repirl.batch import EXPERT, PackedBatch, pack
from repirl.config import ConfigError
from repirl.data.errors import DataError
from repirl.data.prompts import Cursor, LengthLimit, PromptSet, read_prompt
from repirl.data.responses import encode_response
from repirl.data.sources import read_rows
from repirl.data.text import EndTokens, find_end_tokens
from repirl.data.values import Place
from repirl.dataconfig import DataConfig, SourceConfig

logger = logging.getLogger(__name__)

# A larger cache of the reference's log-probabilities is computed anew rather than kept in checkpoints: with the same
# values but for rounding, as other experts share a batch then.
MAX_SAVED_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Expert:
    """One demonstration; response_ids end with the end token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def load_experts(data: DataConfig, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> list[Expert]:
    """From `data.experts`, or else from the solution column of `data.train`; a list in it gives one each.

    model: the policy's, whose generation_config says what else ends a response.
    DataError for files, rows and lengths that do not fit (see load_prompts).
    """
    if data.experts is not None:
        source: SourceConfig = data.experts
        prompt_column, solution_column = data.experts.prompt_column, data.experts.solution_column
        option = "data.experts"
    else:
        if data.train is None or data.solution_column is None:
            raise DataError("expert trajectories need data.experts, or data.train and data.solution_column")
        source, prompt_column, solution_column, option = data.train, data.prompt_column, data.solution_column, "data"
    limit, ends = LengthLimit(data), find_end_tokens(data, tokenizer, model)
    experts = []
    for _, place, row in read_rows(source, "train"):
        prompt_ids = read_prompt(row, place, prompt_column, f"{option}.prompt_column", data, tokenizer)
        value = place.value(row, solution_column, f"{option}.solution_column")
        for solution in place.solutions(value, solution_column):
            response_ids = _encode(solution, place, solution_column, data, ends, tokenizer)
            fits = limit.allows(
                len(prompt_ids), place, "prompt", "data.max_prompt_tokens", data.max_prompt_tokens
            ) and limit.allows(len(response_ids), place, "solution", "data.max_expert_tokens", data.max_expert_tokens)
            if fits:
                experts.append(Expert(prompt_ids, response_ids))
    limit.report(source.path, len(experts))
    return experts


def _encode(
    solution: str, place: Place, column: str, data: DataConfig, ends: EndTokens, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Token ids of a solution; DataError where it is empty, or goes on after an end token."""
    if data.solution_remove is not None:
        solution = re.sub(data.solution_remove, "", solution)
    return encode_response(solution, place, column, ends, tokenizer, "take it out with data.solution_remove")


def check_matches(rows: list[Expert], prompts: PromptSet) -> None:
    """Check that a run whose experts are those of its prompts has some, and log how many prompts have none.

    Raises:
        ConfigError: no prompt has an expert.
    """
    known = {row.prompt_ids for row in rows}
    matched = sum(prompt.token_ids in known for prompt in prompts.prompts)
    if matched == 0:
        raise ConfigError(
            f"irl.experts is 'matched', but none of the {len(prompts)} training prompts is the prompt of one of the "
            f"{len(rows)} experts: they have to be the same text; or set irl.experts: all"
        )
    if matched < len(prompts):
        logger.warning(
            "%d of %d training prompts have no expert: the PRM does not learn from their rollouts unless some are "
            "verified as right",
            len(prompts) - matched,
            len(prompts),
        )


class Experts:
    """Expert trajectories in the order of a run.

    rows: all of them. seed: of the order. per_turn: how many `next` gives. reference: what the frozen reference says of
    a batch's response tokens [R], where rewards are relative to it; each expert is asked for once, as neither changes.
    """

    def __init__(
        self,
        rows: list[Expert],
        *,
        seed: int,
        per_turn: int,
        reference: Callable[[PackedBatch], Tensor] | None = None,
    ) -> None:
        self.rows, self.per_turn = rows, per_turn
        self._cursor = Cursor(len(rows), seed)
        self._reference = reference
        # Row -> log-probability of each of its response tokens.
        self._cache: dict[int, Tensor] = {}
        # Prompt -> its rows.
        self._rows_of: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            self._rows_of.setdefault(row.prompt_ids, []).append(index)

    def __len__(self) -> int:
        return len(self.rows)

    def next(self) -> PackedBatch:
        """The next experts, with the stream `prm_ref_logprob` where there is a reference."""
        indices = self._cursor.next(self.per_turn)
        # Experts estimate no Z, so their groups are free; prompts' groups begin at 0.
        return self._batch(indices, [-1 - i for i in indices])

    def matching(self, rollouts: PackedBatch) -> PackedBatch | None:
        """All experts of the prompts of these rollouts, in the groups of the rollouts; streams as of `next`.

        A prompt is the same if its tokens are. The place in the data does not change.

        Args:
            rollouts: the sequences of a group have one prompt.

        Returns:
            The experts, group by group; None if no prompt has one.
        """
        indices, groups = list[int](), list[int]()
        first_of_group = {int(group): i for i, group in reversed(list(enumerate(rollouts.group_ids)))}
        for group, i in sorted(first_of_group.items()):
            start, length = int(rollouts.cu_seqlens[i]), int(rollouts.prompt_lens[i])
            rows = self._rows_of.get(tuple(rollouts.token_ids[start : start + length].tolist()), [])
            indices += rows
            groups += [group] * len(rows)
        return self._batch(indices, groups) if indices else None

    def _batch(self, indices: list[int], groups: list[int]) -> PackedBatch:
        chosen = [self.rows[i] for i in indices]
        batch = pack([(e.prompt_ids, e.response_ids) for e in chosen], source=EXPERT, group_ids=groups)
        if self._reference is not None:
            first = {index: place for place, index in enumerate(indices) if index not in self._cache}
            if first:
                new = batch.select(list(first.values()))
                parts = self._reference(new).split(new.response_cu_seqlens.diff().tolist())
                self._cache |= {index: part.clone() for index, part in zip(first, parts, strict=True)}
            batch.write("prm_ref_logprob", torch.cat([self._cache[index] for index in indices]))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and the reference's log-probabilities as long as they are small."""
        num_bytes = sum(part.nbytes for part in self._cache.values())
        return {
            "cursor": self._cursor.state_dict(),
            "reference": self._cache if num_bytes <= MAX_SAVED_CACHE_BYTES else {},
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """ConfigError where the checkpoint is of a run without experts, or of other data."""
        if state is None:
            raise ConfigError("the checkpoint is of a run without experts; it had another objective")
        self._cursor.load_state_dict(state["cursor"])
        self._cache = dict(state["reference"])
