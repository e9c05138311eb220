"""Policy update: advantages with a baseline from the other responses, and the clipped policy loss.

The options of `loss` make it RLOO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO and others: see the presets.

Source: Ahmadian et al. 2024 (RLOO); for outcome plus process rewards rePIRL (Wu et al., ICML 2026), algorithm 1. The
options have their sources in `repirl_kernels.advantages` and `repirl_kernels.losses`.
"""

from __future__ import annotations

import torch
from repirl_kernels import aggregate_weights, policy_loss, rloo_advantages
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import Config
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs


class RLOO(Objective):
    """Clipped updates on the rollouts, with advantages from outcomes and, if there is a PRM, from its rewards."""

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return config.loss.kl_coefficient > 0

    @property
    def reads_rewards(self) -> bool:
        return self.config.system.has_prm and self.config.loss.process_coefficient != 0

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        return rollouts

    def prepare(self, batch: PackedBatch) -> Metrics:
        """Reads `outcome`, `reward` and, for entropy in the return, `old_logprob`.

        Writes `advantage` and `loss_weight`. The outcome that the PRM learns from is left as the verifier gave it.
        """
        advantage = self.token_advantages(batch)
        batch.write("advantage", advantage)
        max_tokens, aggregation = self.config.rollout.max_response_tokens, self.config.loss.aggregation
        weights = aggregate_weights(batch.response_cu_seqlens, aggregation, constant_length=max_tokens)
        batch.write("loss_weight", weights)
        return {"advantage_mean": float(advantage.mean()), "advantage_std": float(advantage.std(correction=0))}

    @property
    def reads_entropy(self) -> bool:
        """Whether entropy is a part of the return."""
        return self.config.loss.entropy_in == "return" and self.config.loss.entropy_coefficient != 0

    def token_advantages(self, batch: PackedBatch) -> Tensor:
        """The advantage of each response token [R]."""
        return self.advantages(
            batch,
            batch.response_cu_seqlens,
            batch.read("reward") if self.reads_rewards else None,
            batch.read("old_logprob") if self.reads_entropy else None,
        )

    def advantages(
        self, batch: PackedBatch, cu_seqlens: Tensor, reward: Tensor | None, old_logprob: Tensor | None
    ) -> Tensor:
        """Advantages of actions, by the options of `loss`.

        Args:
            batch: the rollouts.
            cu_seqlens: [S + 1], where each response's actions begin, and where the last ones end.
            reward: of each action; None where there are none.
            old_logprob: log pi_old of each action; None if entropy is no part of the return.

        Returns:
            One number for each action.
        """
        config, outcome = self.config.loss, None
        if config.outcome_coefficient != 0:
            longest = self.config.rollout.max_response_tokens
            outcome = batch.outcome - overlong_penalty(batch.response_cu_seqlens, longest, config.overlong_tokens)
        return rloo_advantages(
            outcome,
            reward,
            cu_seqlens,
            batch.group_ids,
            outcome_coefficient=config.outcome_coefficient,
            process_coefficient=config.process_coefficient if reward is not None else 0.0,
            gamma=config.gamma,
            whiten=config.whiten,
            baseline=config.baseline,
            leave_one_out=config.leave_one_out,
            scale=config.scale,
            process_norm=config.process_norm,
            process_std_floor=config.process_std_floor,
            credit=config.credit,
            credit_temperature=config.credit_temperature,
            old_logprob=old_logprob,
            entropy_coefficient=config.entropy_coefficient if self.reads_entropy else 0.0,
        )

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Reads `advantage`, `loss_weight`, `old_logprob`, `sampler_logprob` and, with a KL term, `ref_logprob`.

        Figures, as means over all response tokens: `clip_fraction`, the share whose gradient the clip removed;
        `approx_kl`, the k3 estimate of KL(pi_old || pi), in nats; `sampler_ratio`, pi_old / mu after truncation, and
        `sampler_ratio_truncated`, the share that was truncated; `kl_reference`, the KL term.
        """
        config, logprob = self.config.loss, outputs["logprob"]
        old_logprob = micro.read("old_logprob").to(logprob.device)
        terms = policy_loss(
            logprob,
            old_logprob,
            micro.read("advantage").to(logprob.device),
            entropy=outputs["entropy"],
            sampler_logprob=micro.read("sampler_logprob").to(logprob.device),
            ref_logprob=micro.read("ref_logprob").to(logprob.device) if config.kl_coefficient > 0 else None,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            sampler_ratio_cap=config.sampler_ratio_cap,
            entropy_coefficient=config.entropy_coefficient if config.entropy_in == "bonus" else 0.0,
            kl_coefficient=config.kl_coefficient,
            kl_estimator=config.kl_estimator,
            clip_dual=config.clip_dual,
            form=config.form,
            ratio=config.ratio,
            cu_seqlens=micro.response_cu_seqlens.to(logprob.device),
        )
        log_ratio = (logprob.detach() - old_logprob).double()
        tokens = {"clip_fraction": terms.clipped, "approx_kl": log_ratio.expm1() - log_ratio}
        if config.sampler_ratio_cap is not None:
            tokens |= {"sampler_ratio": terms.sampler_ratio, "sampler_ratio_truncated": terms.truncated}
        if config.kl_coefficient != 0:
            tokens["kl_reference"] = terms.kl
        figures = {name: (x.sum(dtype=torch.float64), micro.num_response_tokens) for name, x in tokens.items()}
        return (terms.loss * micro.read("loss_weight").to(logprob.device)).sum(), figures


def overlong_penalty(cu_seqlens: Tensor, max_response_tokens: int, overlong_tokens: int) -> Tensor:
    """What is subtracted from the outcomes of long responses: from 0 to 1, linear in the last `overlong_tokens` tokens.

        penalty_i = max(0, length_i - (max_response_tokens - overlong_tokens)) / overlong_tokens

    Args:
        cu_seqlens: [S + 1], where each response begins, and where the last one ends.
        max_response_tokens: the length of the longest response.
        overlong_tokens: 0 for no penalty.

    Returns:
        [S] float32.

    Source: DAPO, Yu et al. 2025, equation 13.
    """
    lengths = cu_seqlens.diff().float()
    if overlong_tokens == 0:
        return torch.zeros_like(lengths)
    return (lengths - (max_response_tokens - overlong_tokens)).clamp(min=0) / overlong_tokens
