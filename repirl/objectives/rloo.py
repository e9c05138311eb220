"""Policy update: leave-one-out advantages and the clipped policy loss.

Ahmadian et al. 2024 (RLOO); rePIRL (Wu et al., ICML 2026), algorithm 1 for outcome plus process rewards.
"""

from __future__ import annotations

from repirl_kernels import aggregate_weights, policy_loss, rloo_advantages
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import LossConfig
from repirl.learner import LossFunction, Outputs


def write_advantages(rollouts: PackedBatch, config: LossConfig) -> dict[str, float]:
    """Reads `outcome` and, where there is one, the stream `reward`; writes `advantage`. Returns its statistics."""
    has_reward = "reward" in rollouts.streams and config.process_coefficient != 0
    advantage = rloo_advantages(
        rollouts.outcome if config.outcome_coefficient != 0 else None,
        rollouts.read("reward") if has_reward else None,
        rollouts.response_cu_seqlens,
        rollouts.group_ids,
        outcome_coefficient=config.outcome_coefficient,
        process_coefficient=config.process_coefficient if has_reward else 0.0,
        gamma=config.gamma,
        whiten=config.whiten,
    )
    rollouts.write("advantage", advantage)
    return {"advantage_mean": float(advantage.mean()), "advantage_std": float(advantage.std(correction=0))}


def loss(rollouts: PackedBatch, config: LossConfig, max_response_tokens: int) -> LossFunction:
    """The loss of one policy update; its normalisers are those of the whole batch.

    Reads the streams `advantage`, `old_logprob`, `sampler_logprob` and, with a KL term, `ref_logprob`.
    """
    weights = aggregate_weights(rollouts.response_cu_seqlens, config.aggregation, constant_length=max_response_tokens)
    rollouts.write("loss_weight", weights)

    def loss_function(outputs: Outputs, micro: PackedBatch) -> Tensor:
        device = outputs["logprob"].device
        per_token = policy_loss(
            outputs["logprob"],
            micro.read("old_logprob").to(device),
            micro.read("advantage").to(device),
            entropy=outputs["entropy"],
            sampler_logprob=micro.read("sampler_logprob").to(device),
            ref_logprob=micro.read("ref_logprob").to(device) if config.kl_coefficient > 0 else None,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            sampler_ratio_cap=config.sampler_ratio_cap,
            entropy_coefficient=config.entropy_coefficient,
            kl_coefficient=config.kl_coefficient,
            kl_estimator=config.kl_estimator,
        ).loss
        return (per_token * micro.read("loss_weight").to(device)).sum()

    return loss_function
