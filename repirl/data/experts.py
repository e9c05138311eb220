"""Expert trajectories: a prompt and a solution, no labels of any kind."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repirl.batch import EXPERT, PackedBatch, pack
from repirl.config import ConfigError
from repirl.data.answers import read_answer
from repirl.data.errors import DataError
from repirl.data.prompts import Cursor, LengthLimit, read_prompt
from repirl.data.responses import decode_response, encode_response, fits
from repirl.data.sources import read_rows
from repirl.data.text import EndTokens, find_end_tokens
from repirl.data.values import Place
from repirl.dataconfig import DataConfig, ExpertFileConfig

logger = logging.getLogger(__name__)

# A larger cache of the reference's log-probabilities is computed anew rather than kept in checkpoints: with the same
# values but for rounding, as other experts share a batch then.
MAX_SAVED_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Expert:
    """One demonstration; response_ids end with the end token. source: its place in `data.expert_sources`."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    source: int = 0


# Of (response, right answer) pairs: 1.0 for right, 0.0 for wrong.
Judge = Callable[[Sequence[tuple[str, str]]], list[float]]


def load_experts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, model: str | None = None, judge: Judge | None = None
) -> list[Expert]:
    """The expert trajectories of all sources, those left out that `data.verify_experts` and
    `data.max_experts_per_prompt` do not let pass; how many is logged.

    Args:
        data: the options. A list in a solution column gives one trajectory each.
        tokenizer: the policy's.
        model: the policy's, whose generation_config says what else ends a response.
        judge: the verifier, which `data.verify_experts` needs.

    Raises:
        DataError: for files, rows and lengths that do not fit (see load_prompts), or where nothing is left.
    """
    sources = data.expert_sources
    if not sources:
        raise DataError("expert trajectories need data.experts, or data.train and data.solution_column")
    ends, experts, judged = find_end_tokens(data, tokenizer, model), list[Expert](), list[tuple[str, str]]()
    for number, source in enumerate(sources):
        limit, count = LengthLimit(data), len(experts)
        option = "data" if data.experts is None else "data.experts"
        for _, place, row in read_rows(source, "train"):
            prompt_ids = read_prompt(row, place, source.prompt_column, f"{option}.prompt_column", data, tokenizer)
            answer = ""
            if data.verify_experts and (column := source.answer_column) is not None:
                answer = read_answer(row, place, column, f"{option}.answer_column", data)
            value = place.value(row, source.solution_column, f"{option}.solution_column")
            for solution in place.solutions(value, source.solution_column):
                response_ids = _encode(solution, place, source.solution_column, data, ends, tokenizer)
                if fits(limit, data, place, prompt_ids, len(response_ids), what="solution"):
                    experts.append(Expert(prompt_ids, response_ids, number))
                    judged.append((decode_response(response_ids, ends, tokenizer), answer))
        limit.report(source.path, len(experts) - count)
    if data.verify_experts:
        assert judge is not None
        experts = _verified(experts, judge(judged), sources)
    return experts if data.max_experts_per_prompt is None else _at_most(experts, data.max_experts_per_prompt)


def _verified(experts: list[Expert], verdicts: list[float], sources: list[ExpertFileConfig]) -> list[Expert]:
    """The experts whose verdict is right. Logs how many others each source had; DataError where none is left."""
    for number, source in enumerate(sources):
        mine = [verdict > 0.5 for expert, verdict in zip(experts, verdicts, strict=True) if expert.source == number]
        if not all(mine):
            logger.warning(
                "%s: the verifier calls %d of %d solutions wrong; left out", source.path, mine.count(False), len(mine)
            )
    right = [expert for expert, verdict in zip(experts, verdicts, strict=True) if verdict > 0.5]
    if not right:
        raise DataError(
            f"data.verify_experts: the verifier calls all {len(experts)} expert solutions wrong; look at verifier.kind "
            "and at the answers"
        )
    return right


def _at_most(experts: list[Expert], count: int) -> list[Expert]:
    """At most `count` experts a prompt, in their order: the first of each source, then the second of each, ..."""
    # For each expert, how many of its prompt and source come before it.
    ranks: dict[tuple[tuple[int, ...], int], int] = {}
    by_prompt: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for index, expert in enumerate(experts):
        key = (expert.prompt_ids, expert.source)
        ranks[key] = ranks.get(key, 0) + 1
        by_prompt.setdefault(expert.prompt_ids, []).append((ranks[key], expert.source, index))
    kept = sorted(index for places in by_prompt.values() for _, _, index in sorted(places)[:count])
    if len(kept) < len(experts):
        logger.warning(
            "data.max_experts_per_prompt %d: %d of %d expert solutions left out",
            count,
            len(experts) - len(kept),
            len(experts),
        )
    return [experts[index] for index in kept]


def _encode(
    solution: str, place: Place, column: str, data: DataConfig, ends: EndTokens, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Token ids of a solution; DataError where it is empty, or goes on after an end token."""
    if data.solution_remove is not None:
        solution = re.sub(data.solution_remove, "", solution)
    return encode_response(solution, place, column, ends, tokenizer, "take it out with data.solution_remove")


def check_matches(rows: list[Expert], prompts: Sequence[tuple[int, ...]]) -> None:
    """Check that a run whose experts are those of its prompts has some, and log how many prompts have none.

    Args:
        rows: the experts.
        prompts: token ids of each prompt that responses are sampled to, or were.

    Raises:
        ConfigError: no prompt has an expert.
    """
    known = {row.prompt_ids for row in rows}
    matched = sum(prompt in known for prompt in prompts)
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

    Args:
        rows: all of them.
        seed: of the order.
        per_turn: how many `next` gives.
        reference: what the frozen reference says of a batch's response tokens [R], where rewards are relative to it;
            each expert is asked for once, as neither changes.
        sources: the names of the sources that rows come from, if there are several.
    """

    def __init__(
        self,
        rows: list[Expert],
        *,
        seed: int,
        per_turn: int,
        reference: Callable[[PackedBatch], Tensor] | None = None,
        sources: Sequence[str] = (),
    ) -> None:
        self.rows, self.per_turn, self.sources = rows, per_turn, sources
        # Of the experts that were given last, how many are of each source.
        self._counts: Counter[int] = Counter()
        self._cursor = Cursor(len(rows), seed)
        self.reference = reference
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

    def metrics(self) -> dict[str, float]:
        """Where there are several sources, the share of each in the experts that were given last."""
        total = self._counts.total()
        if len(self.sources) < 2 or total == 0:
            return {}
        return {f"experts/share/{name}": self._counts[i] / total for i, name in enumerate(self.sources)}

    def _batch(self, indices: list[int], groups: list[int]) -> PackedBatch:
        chosen = [self.rows[i] for i in indices]
        self._counts = Counter(row.source for row in chosen)
        batch = pack([(e.prompt_ids, e.response_ids) for e in chosen], source=EXPERT, group_ids=groups)
        if self.reference is not None:
            first = {index: place for place, index in enumerate(indices) if index not in self._cache}
            if first:
                new = batch.select(list(first.values()))
                parts = self.reference(new).split(new.response_cu_seqlens.diff().tolist())
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
