"""PRM update: maximum-entropy inverse reinforcement learning from expert trajectories.

There are two passes. The first (`write_coefficients`) computes one constant for each token from the rewards of the
whole batch. In the second the loss is linear in the rewards, with these constants as coefficients. So only one
micro-batch is in memory at a time, and the gradient is still that of the loss of the whole batch.

Source: rePIRL (Wu et al., ICML 2026), algorithm 1; Finn et al. 2016; Ziebart 2010.
"""

from __future__ import annotations

import math

import torch
from repirl_kernels import (
    importance_diagnostics,
    irl_coefficients,
    irl_token_loss,
    log_importance_weights,
    pareto_smooth,
    self_normalize,
)
from torch import Tensor

from repirl.batch import EXPERT, PackedBatch, concatenate
from repirl.config import Config
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs
from repirl.options import IRLConfig
from repirl.rewards import read_rewards


class IRL(Objective):
    """Updates of the PRM on experts and rollouts. Each update uses the rewards of the PRM just before it."""

    num_tokens: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # The stream with log mu, the log-probability under the weights that sampled. The trainer's own value
        # (old_logprob) is more exact, but only the sampler has it if it samples from older weights, or from adapters
        # that it has rounded together with their base.
        merged = config.adapters is not None and config.rollout.engine != "transformers"
        older = config.rollout.overlap == "step" or config.rollout.keeps_surplus
        self.behaviour = "sampler_logprob" if older or merged else "old_logprob"

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return config.irl.base_measure == "reference"

    @property
    def reads_rewards(self) -> bool:
        return True

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        assert rollouts is not None
        return training_batch(data.next_experts(), rollouts, self.config.irl.use_outcome)

    def prepare(self, batch: PackedBatch) -> Metrics:
        self.num_tokens = batch.num_response_tokens
        return write_coefficients(batch, self.config.irl, self.behaviour)

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """The second pass: the sum of coefficient * reward, plus reward_l2 times the mean squared reward."""
        reward = read_rewards(outputs, micro, self.config.prm)
        coefficient = micro.read("coefficient").to(reward.device)
        reward_l2 = self.config.irl.reward_l2
        return irl_token_loss(reward, coefficient, reward_l2=reward_l2, num_tokens=self.num_tokens).sum(), {}


def training_batch(experts: PackedBatch, rollouts: PackedBatch, use_outcome: bool) -> PackedBatch | None:
    """Join experts and rollouts: first the experts, then the rollouts that estimate the partition function Z.

    Args:
        experts: expert trajectories.
        rollouts: this turn's verified rollouts.
        use_outcome: count correct rollouts as experts, so that only the failed ones estimate Z.

    Returns:
        The batch; None if no rollout is left to estimate Z, because the loss would then have no minimum.
    """
    if not use_outcome:
        return concatenate([experts, rollouts])
    correct, failed = rollouts.select(rollouts.outcome > 0.5), rollouts.select(~(rollouts.outcome > 0.5))
    if failed.num_sequences == 0:
        return None
    correct.source.fill_(EXPERT)
    return concatenate([experts, correct, failed])


def write_coefficients(batch: PackedBatch, config: IRLConfig, behaviour: str = "old_logprob") -> Metrics:
    """The first pass: compute importance weights of the rollouts, and from them write the stream `coefficient`.

    Args:
        batch: a batch from `training_batch`, with the stream `reward`. The rollouts also need the stream that
            `behaviour` names and, for base_measure `reference`, `ref_logprob`.
        config: the options of the importance weights.
        behaviour: the name of the stream that holds log mu.

    Returns:
        Diagnostics of the importance weights.
    """
    is_expert = batch.source == EXPERT
    experts, rollouts = batch.select(is_expert), batch.select(~is_expert)
    log_weights = log_importance_weights(
        rollouts.read("reward"),
        rollouts.read(behaviour),
        rollouts.response_cu_seqlens,
        group_ids=rollouts.group_ids,
        kind=config.weights,
        base_logprob=rollouts.read("ref_logprob") if config.base_measure == "reference" else None,
        temper=config.temper,
        target_ess=config.target_ess,
        group_by=config.group,
    )
    log_weight = log_weights.log_weight
    if config.smooth == "psis":
        log_weight, _ = pareto_smooth(log_weight, log_weights.bucket_ids)
    weights = self_normalize(log_weight, log_weights.bucket_ids, truncate=config.truncate)
    coefficients = irl_coefficients(
        weights, log_weights, rollouts.response_cu_seqlens, experts.response_cu_seqlens, normalize=config.normalize
    )
    # The batch has the experts first, so their coefficients come first, too.
    assert bool((batch.source.diff() >= 0).all())
    batch.write("coefficient", torch.cat([coefficients.expert, coefficients.policy]))
    diagnostics = importance_diagnostics(
        log_weights,
        weights,
        rollouts.read("reward"),
        rollouts.response_cu_seqlens,
        expert_reward=experts.read("reward"),
        expert_cu_seqlens=experts.response_cu_seqlens,
    )
    # pareto_k is NaN if no group has the 21 samples that the fit of the tail needs. That is no error: leave it out.
    return {name: value for name, value in diagnostics.items() if name != "pareto_k" or not math.isnan(value)}
