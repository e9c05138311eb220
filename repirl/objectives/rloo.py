"""Policy update: leave-one-out advantages and the clipped policy loss.

Ahmadian et al. 2024 (RLOO); rePIRL (Wu et al., ICML 2026), algorithm 1 for outcome plus process rewards.
"""

from __future__ import annotations

import torch
from repirl_kernels import aggregate_weights, policy_loss, rloo_advantages
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import LossConfig
from repirl.distributed.world import World
from repirl.learner import Outputs

FIGURES = ("clip_fraction", "approx_kl", "sampler_ratio", "sampler_ratio_truncated", "kl_reference")


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


class ClippedLoss:
    """The loss of one policy update, as Learner.update takes it; its normalisers are those of the whole batch.

    Reads the streams `advantage`, `old_logprob`, `sampler_logprob` and, with a KL term, `ref_logprob`.
    """

    def __init__(self, rollouts: PackedBatch, config: LossConfig, max_response_tokens: int) -> None:
        self.config, self.num_tokens = config, rollouts.num_response_tokens
        weights = aggregate_weights(
            rollouts.response_cu_seqlens, config.aggregation, constant_length=max_response_tokens
        )
        rollouts.write("loss_weight", weights)
        self._sums = torch.zeros(len(FIGURES), dtype=torch.float64)

    def __call__(self, outputs: Outputs, micro: PackedBatch) -> Tensor:
        config, logprob = self.config, outputs["logprob"]
        old_logprob = micro.read("old_logprob").to(logprob.device)
        found = policy_loss(
            logprob,
            old_logprob,
            micro.read("advantage").to(logprob.device),
            entropy=outputs["entropy"],
            sampler_logprob=micro.read("sampler_logprob").to(logprob.device),
            ref_logprob=micro.read("ref_logprob").to(logprob.device) if config.kl_coefficient > 0 else None,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            sampler_ratio_cap=config.sampler_ratio_cap,
            entropy_coefficient=config.entropy_coefficient,
            kl_coefficient=config.kl_coefficient,
            kl_estimator=config.kl_estimator,
        )
        log_ratio = (logprob.detach() - old_logprob).double()
        figures = (found.clipped, log_ratio.expm1() - log_ratio, found.sampler_ratio, found.truncated, found.kl)
        self._sums += torch.stack([x.sum(dtype=torch.float64) for x in figures]).cpu()
        return (found.loss * micro.read("loss_weight").to(logprob.device)).sum()

    def metrics(self, world: World) -> dict[str, float]:
        """Means over all response tokens of what the update met, on all processes: the share whose gradient the clip
        removed; KL(pi_old || pi), estimated as k3; pi_old / mu after truncation, the share of those; the KL term."""
        means = dict(zip(FIGURES, (world.sum(self._sums.clone()) / self.num_tokens).tolist(), strict=True))
        if self.config.sampler_ratio_cap is None:
            del means["sampler_ratio"], means["sampler_ratio_truncated"]
        if self.config.kl_coefficient == 0:
            del means["kl_reference"]
        return means
