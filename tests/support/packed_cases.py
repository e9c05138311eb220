"""Random packed batches, with an empty and a one-token sequence among them, in float64."""

from itertools import pairwise

import torch
from torch import Tensor


def cu_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def split(values: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return [values[a:b] for a, b in pairwise(cu_seqlens.tolist())]


def rollouts(lengths: list[int], *, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """reward [T], sampler_logprob [T], cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    reward = scale * torch.randn(total, generator=generator, dtype=torch.float64)
    logprob = -2 * torch.rand(total, generator=generator, dtype=torch.float64)
    return reward, logprob, cu_of(lengths)


LENGTHS = [4, 1, 0, 7, 3, 2, 5]
GROUPS = [3, 3, 3, 9, 9, 3, 9]
EXPERT_LENGTHS = [2, 6, 1]
