"""PRM update: maximum-entropy inverse reinforcement learning from expert trajectories.

rePIRL (Wu et al., ICML 2026), algorithm 1; Finn et al. 2016; Ziebart 2010. Two passes: `write_coefficients`
turns scored rewards into one constant a token, `loss` is then linear in the rewards, so memory stays that of
one micro-batch while the gradient is that of the whole loss.
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
    token_rewards,
)
from torch import Tensor

from repirl.batch import EXPERT, PackedBatch, concatenate
from repirl.config import IRLConfig, PRMConfig
from repirl.learner import LossFunction, Outputs


def rewards(outputs: Outputs, batch: PackedBatch, config: PRMConfig) -> Tensor:
    """r_t of every response token [R], by `config.reward`; `implicit` reads the stream `prm_ref_logprob`."""
    reference = None
    if config.reward == "implicit":
        reference = batch.read("prm_ref_logprob").to(outputs["logprob"].device)
    return token_rewards(
        config.reward,
        **{name: outputs.get(name) for name in ("value", "logprob", "logsumexp", "target_logit")},
        ref_logprob=reference,
        cu_seqlens=batch.response_cu_seqlens.to(next(iter(outputs.values())).device),
        gamma=config.gamma,
        beta=config.beta,
    )


def training_batch(experts: PackedBatch, rollouts: PackedBatch, use_outcome: bool) -> PackedBatch | None:
    """Experts first, then the rollouts that estimate Z.

    With `use_outcome`, verified-correct rollouts join the experts and only failed ones estimate Z. None where
    no rollout is left for Z: the loss would have no minimum.
    """
    if not use_outcome:
        return concatenate([experts, rollouts])
    correct, failed = rollouts.select(rollouts.outcome > 0.5), rollouts.select(~(rollouts.outcome > 0.5))
    if failed.num_sequences == 0:
        return None
    correct.source.fill_(EXPERT)
    return concatenate([experts, correct, failed])


def write_coefficients(batch: PackedBatch, config: IRLConfig, behaviour: str = "old_logprob") -> dict[str, float]:
    """Reads `reward`, the stream `behaviour` (log mu) and, for base_measure `reference`, `ref_logprob`; writes
    `coefficient`. Returns the importance weights' diagnostics."""
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
    # Experts stand before rollouts in a training batch, so their coefficients do, too.
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
    # NaN says that no group has the 21 samples that a tail fit needs: nothing is wrong, there is just no figure.
    return {name: value for name, value in diagnostics.items() if name != "pareto_k" or not math.isnan(value)}


def loss(batch: PackedBatch, prm: PRMConfig, config: IRLConfig) -> LossFunction:
    """Second pass: sum of coefficient * reward, plus reward_l2 times the mean squared reward."""
    num_tokens = batch.num_response_tokens

    def loss_function(outputs: Outputs, micro: PackedBatch) -> Tensor:
        reward = rewards(outputs, micro, prm)
        coefficient = micro.read("coefficient").to(reward.device)
        return irl_token_loss(reward, coefficient, reward_l2=config.reward_l2, num_tokens=num_tokens).sum()

    return loss_function
