"""Fused token-statistics ops for language-model losses; see the README beside this package."""

from repirl_kernels.linear_loss import TokenLoss, linear_token_loss
from repirl_kernels.losses import (
    PolicyLoss,
    aggregate_weights,
    irl_loss,
    irl_token_loss,
    policy_loss,
    token_rewards,
)
from repirl_kernels.ops import TokenStats, choose_backend, linear_token_stats, token_stats
from repirl_kernels.segments import (
    Coefficients,
    LogWeights,
    effective_sample_size,
    importance_diagnostics,
    irl_coefficients,
    log_importance_weights,
    log_partition,
    pareto_smooth,
    prefix_sums,
    returns_to_go,
    rloo_advantages,
    segment_mean,
    segment_sum,
    self_normalize,
    sequence_ids,
)

__all__ = [
    "Coefficients",
    "LogWeights",
    "PolicyLoss",
    "TokenLoss",
    "TokenStats",
    "aggregate_weights",
    "choose_backend",
    "effective_sample_size",
    "importance_diagnostics",
    "irl_coefficients",
    "irl_loss",
    "irl_token_loss",
    "linear_token_loss",
    "linear_token_stats",
    "log_importance_weights",
    "log_partition",
    "pareto_smooth",
    "policy_loss",
    "prefix_sums",
    "returns_to_go",
    "rloo_advantages",
    "segment_mean",
    "segment_sum",
    "self_normalize",
    "sequence_ids",
    "token_rewards",
    "token_stats",
]
