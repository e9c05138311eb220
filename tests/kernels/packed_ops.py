"""All ops on packed sequences, and their options, under one name: for tests that need several of the modules."""

from repirl_kernels.advantages import rloo_advantages
from repirl_kernels.importance import (
    NORMALIZATIONS,
    WEIGHT_KINDS,
    irl_coefficients,
    log_importance_weights,
    log_partition,
    self_normalize,
)
from repirl_kernels.packed import GROUPINGS, returns_to_go, segment_sum, sequence_ids
from repirl_kernels.pareto import pareto_smooth

__all__ = [
    "GROUPINGS",
    "NORMALIZATIONS",
    "WEIGHT_KINDS",
    "irl_coefficients",
    "log_importance_weights",
    "log_partition",
    "pareto_smooth",
    "returns_to_go",
    "rloo_advantages",
    "segment_sum",
    "self_normalize",
    "sequence_ids",
]
