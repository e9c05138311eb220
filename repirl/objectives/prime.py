"""PRIME's PRM: the sum of a response's rewards is the logit of its being right.

With `implicit` rewards r_t = beta (log pi_phi - log pi_ref), labels of responses alone make rewards of tokens.

Two orders are published. Update "before" trains the PRM and then scores the rollouts: `order: prm_first`. Update
"after" takes the scores of the pass that also trains: `order: policy_first`, where the policy's rewards are those of
the PRM before its update.

Source: Cui et al. 2025 (PRIME, arXiv 2502.01456); the loss without the loop is Yuan et al. 2024 (arXiv 2412.01981).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from repirl_kernels import segment_mean, segment_sum
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs
from repirl.objectives.rloo import RLOO
from repirl.rewards import read_rewards


class OutcomePRM(Objective):
    """Updates of the PRM on all rollouts, right and wrong. The loss is the mean over responses.

    With R = sum_t r_t of response i, and o its outcome (1 right, 0 wrong, or a share between them):

        cross_entropy   - o log sigmoid(R) - (1 - o) log sigmoid(-R)
        dpo             - log sigmoid(s (R - mean of R over the responses of its group with the other outcome)),
                          s = 1 if o > 0.5, else -1; a mean over no responses counts as 0

    Both are computed from R itself, not from its sigmoid, so that a confident error still has its gradient in float32.
    """

    num_sequences: int

    @property
    def reads_rewards(self) -> bool:
        # A micro-batch need not hold the whole group.
        return self.config.prime.loss == "dpo"

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        return rollouts

    def prepare(self, batch: PackedBatch) -> Metrics:
        """With `dpo`, writes the stream `opposing_reward`: the mean of the other outcome, the same for each token."""
        self.num_sequences = batch.num_sequences
        if self.config.prime.loss == "dpo":
            opposing = opposing_means(batch)
            batch.write("opposing_reward", opposing.repeat_interleave(batch.response_cu_seqlens.diff()))
        return {}

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Figures: `accuracy`, the share of responses that the sign of the loss's logit calls right or wrong as their
        outcome does."""
        reward = read_rewards(outputs, micro, self.config.prm)
        cu_seqlens = micro.response_cu_seqlens.to(reward.device)
        total, outcome = segment_sum(reward, cu_seqlens), micro.outcome.to(reward)
        if self.config.prime.loss == "dpo":
            total = total - segment_mean(micro.read("opposing_reward").to(reward), cu_seqlens)
            outcome = (outcome > 0.5).to(reward)
        loss = F.binary_cross_entropy_with_logits(total, outcome, reduction="sum") / self.num_sequences
        agrees = (total.detach() > 0) == (outcome > 0.5)
        return loss, {"accuracy": (agrees.sum(), micro.num_sequences)}


def opposing_means(batch: PackedBatch) -> Tensor:
    """For each response, the mean summed reward of the responses to its prompt whose outcome is the other one.

    Args:
        batch: with outcomes and the stream `reward`.

    Returns:
        [S] float32; 0 where the other outcome does not occur.
    """
    total = segment_sum(batch.read("reward"), batch.response_cu_seqlens)
    right = batch.outcome > 0.5
    same_group = batch.group_ids[:, None] == batch.group_ids
    opposite = (same_group & (right[:, None] != right)).to(total.dtype)
    return opposite @ total / opposite.sum(1).clamp(min=1)


class PrimePolicy(RLOO):
    """The policy's updates, with `prime.reward: whole` on the sum of each response's rewards, at its last token.

    PRIME's advantages are those of `loss.leave_one_out: false`, `process_norm: return` and `whiten: true`. It publishes
    them as K / (K - 1) (r - the mean over all K responses); whitening takes the factor away.
    """

    def prepare(self, batch: PackedBatch) -> Metrics:
        if self.config.prime.reward == "whole" and self.reads_rewards:
            ends = batch.response_cu_seqlens
            whole = torch.zeros(batch.num_response_tokens)
            whole[ends[1:] - 1] = segment_sum(batch.read("reward"), ends)
            batch.write("reward", whole)
        return super().prepare(batch)
