"""Fused token-statistics ops for language-model losses; see README.md in this package."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from repirl_kernels.advantages import rloo_advantages
from repirl_kernels.backends import choose_backend
from repirl_kernels.importance import (
    Coefficients,
    LogWeights,
    effective_sample_size,
    importance_diagnostics,
    irl_coefficients,
    log_importance_weights,
    log_partition,
    self_normalize,
)
from repirl_kernels.linear_loss import TokenLoss, linear_token_loss
from repirl_kernels.losses import (
    PolicyLoss,
    aggregate_weights,
    irl_loss,
    irl_token_loss,
    policy_loss,
    token_rewards,
)
from repirl_kernels.ops import TokenStats, TokenStatsWithArgmax, linear_token_stats, token_stats
from repirl_kernels.packed import prefix_sums, returns_to_go, segment_mean, segment_sum, sequence_ids
from repirl_kernels.pareto import pareto_smooth

try:
    __version__ = _version("repirl")  # of the distribution that holds this package
except _PackageNotFoundError:
    # The package is run from its sources and is not installed.
    __version__ = "unknown"

__all__ = [
    "Coefficients",
    "LogWeights",
    "PolicyLoss",
    "TokenLoss",
    "TokenStats",
    "TokenStatsWithArgmax",
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
