"""Policy update on the rewards of a PRM that is not trained, read as the PRM's own description says."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate

import torch
from repirl_kernels.packed import segment_mean, segment_sum
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from repirl.batch import PackedBatch
from repirl.data import Data
from repirl.data.split import segment
from repirl.data.text import find_end_tokens
from repirl.models import load_tokenizer
from repirl.objectives import Metrics
from repirl.objectives.rloo import RLOO
from repirl.prm import StepRule, read_description


class FrozenPRM(RLOO):
    """The policy's updates on outcomes and the rewards of a frozen PRM.

    A PRM that was trained on labelled steps says at each step's last token how likely the step is right, and nothing
    elsewhere. Its steps take the place of tokens in the advantages: an action is a step, its reward is that chance, and
    all tokens of a step have the step's advantage. The rewards of other PRMs are those of tokens, as in RLOO.

    Source: Math-Shepherd (Wang et al. 2024), whose policy gets the PRM's score at the end of each step.
    """

    @cached_property
    def rule(self) -> StepRule | None:
        """How the PRM scores steps; None if it scores tokens."""
        assert self.config.prm.model is not None, "Config refuses this"
        description = read_description(self.config.prm.model)
        return description.steps if description is not None and description.steps.score == "end" else None

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        if rollouts is not None and self.reads_rewards and self.rule is not None:
            self._find_steps(rollouts, self.rule.separator)
        return rollouts

    def _find_steps(self, rollouts: PackedBatch, separator: str) -> None:
        """Keep where the steps of each response end among all response tokens, and how many each response has."""
        tokenizer, ends = self._tokenizer
        responses = rollouts.response_ids.split(rollouts.response_cu_seqlens.diff().tolist())
        steps = [
            segment(ids, separator, tokenizer, ended=ids[-1] in ends).ends for ids in map(Tensor.tolist, responses)
        ]
        starts = rollouts.response_cu_seqlens[:-1].tolist()
        self.ends = torch.tensor([start + end for start, some in zip(starts, steps, strict=True) for end in some])
        self.step_cu_seqlens = torch.tensor([0, *accumulate(map(len, steps))])

    @cached_property
    def _tokenizer(self) -> tuple[PreTrainedTokenizerBase, set[int]]:
        config = self.config
        tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
        return tokenizer, set(find_end_tokens(config.data, tokenizer, config.policy.model).ids)

    def prepare(self, batch: PackedBatch) -> Metrics:
        """As RLOO. Reports `response_reward`, the mean over responses of the mean reward of their tokens, or of the
        mean chance of their steps; in the latter case also `step_reward`, the mean chance of a step, and `steps`, the
        mean number in a response."""
        metrics = super().prepare(batch)
        if not self.reads_rewards:
            return metrics
        if self.rule is None:
            of_responses = segment_mean(batch.read("reward"), batch.response_cu_seqlens)
            return metrics | {"response_reward": float(of_responses.mean())}
        chances = batch.read("reward")[self.ends].sigmoid()
        return metrics | {
            "response_reward": float(segment_mean(chances, self.step_cu_seqlens).mean()),
            "step_reward": float(chances.mean()),
            "steps": len(self.ends) / batch.num_sequences,
        }

    def token_advantages(self, batch: PackedBatch) -> Tensor:
        if not self.reads_rewards or self.rule is None:
            return super().token_advantages(batch)
        # Where each step begins among all response tokens, and where the last one ends: the steps lie end to end.
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), self.ends + 1])
        old_logprob = segment_sum(batch.read("old_logprob"), bounds) if self.reads_entropy else None
        chances = batch.read("reward")[self.ends].sigmoid()
        return self.advantages(batch, self.step_cu_seqlens, chances, old_logprob).repeat_interleave(bounds.diff())
