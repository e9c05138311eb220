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
from repirl.irlconfig import IRLConfig
from repirl.objectives import Figures, Metrics, Objective, Outputs
from repirl.rewards import read_rewards


class IRL(Objective):
    """Updates of the PRM on experts and rollouts. Each update uses the rewards of the PRM just before it."""

    num_tokens: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        # The stream with log mu, the log-probability under the weights that sampled. The trainer's own value
        # (old_logprob) is more exact, but only the sampler has it if it samples from older weights, or from adapters
        # that it has rounded together with their base.
        merged = config.adapters is not None and not config.rollout.by_policy
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
        matched = self.config.matches_experts
        experts = data.matching_experts(rollouts) if matched else data.next_experts()
        return training_batch(experts, rollouts, self.config.irl.use_outcome, matched=matched)

    def prepare(self, batch: PackedBatch) -> Metrics:
        self.num_tokens = batch.num_response_tokens
        return write_coefficients(batch, self.config.irl, self.behaviour, matched=self.config.matches_experts)

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """The second pass: the sum of coefficient * reward, plus reward_l2 times the mean squared reward."""
        reward = read_rewards(outputs, micro, self.config.prm)
        coefficient = micro.read("coefficient").to(reward.device)
        reward_l2 = self.config.irl.l2
        return irl_token_loss(reward, coefficient, reward_l2=reward_l2, num_tokens=self.num_tokens).sum(), {}


def training_batch(
    experts: PackedBatch | None, rollouts: PackedBatch, use_outcome: bool, *, matched: bool = False
) -> PackedBatch | None:
    """Join experts and rollouts: first the experts, then the rollouts that estimate the partition function Z.

    Args:
        experts: expert trajectories; None if there are none.
        rollouts: this turn's verified rollouts.
        use_outcome: count correct rollouts as experts, so that only the failed ones estimate Z.
        matched: leave out prompts (groups) that do not have both an expert and a rollout for Z. What a reward says of
            the prompt alone then has no effect on the loss.

    Returns:
        The batch; None if one of the two sides is empty, because the loss would then have no minimum.
    """
    sides, policy = [] if experts is None else [experts], rollouts
    if use_outcome:
        correct, policy = rollouts.select(rollouts.outcome > 0.5), rollouts.select(~(rollouts.outcome > 0.5))
        correct.source.fill_(EXPERT)
        sides.append(correct)
    expert_groups = torch.cat([side.group_ids for side in sides]) if sides else torch.zeros(0, dtype=torch.int64)
    if matched:
        common = expert_groups[torch.isin(expert_groups, policy.group_ids)]
        sides, expert_groups = [side.select(torch.isin(side.group_ids, common)) for side in sides], common
        policy = policy.select(torch.isin(policy.group_ids, common))
    if policy.num_sequences == 0 or expert_groups.numel() == 0:
        return None
    return concatenate([*sides, policy])


def write_coefficients(
    batch: PackedBatch, config: IRLConfig, behaviour: str = "old_logprob", *, matched: bool = False
) -> Metrics:
    """The first pass: compute importance weights of the rollouts, and from them write the stream `coefficient`.

    Args:
        batch: a batch from `training_batch`, with the stream `reward`. The rollouts also need the stream that
            `behaviour` names and, for base_measure `reference`, `ref_logprob`.
        config: the options of the importance weights.
        behaviour: the name of the stream that holds log mu.
        matched: the experts are those of the rollouts' prompts, in their groups. With `group: prompt` the loss is then
            the mean over prompts of log Z(x) minus the mean reward of the prompt's experts.

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
        weights,
        log_weights,
        rollouts.response_cu_seqlens,
        experts.response_cu_seqlens,
        normalize=config.normalize,
        expert_groups=experts.group_ids if matched and config.group == "prompt" else None,
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
        contested=True,
    )
    # Left out where it does not exist: pareto_k, if no group has the 21 samples that the fit of the tail needs; the
    # effective sample size, if every group has one sample.
    optional = ("pareto_k", "ess", "ess_fraction")
    return {name: value for name, value in diagnostics.items() if name not in optional or not math.isnan(value)}
