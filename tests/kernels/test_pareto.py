"""Pareto smoothing against plain numbers, one bucket at a time, in float64."""

import math

import pytest
import torch
from repirl_kernels import pareto
from torch import Tensor


def close(actual: Tensor, expected: Tensor | list[float], tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def slow_psis(log_weight: list[float]) -> tuple[list[float], float]:
    """Vehtari et al. 2024 with the fit of Zhang and Stephens 2009, one bucket, plain numbers."""
    count = len(log_weight)
    size = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    largest = max(log_weight)
    order = sorted(range(count), key=lambda i: log_weight[i])
    tail = order[-size:]
    cutoff = math.exp(log_weight[order[-size - 1]] - largest)
    x = [math.exp(log_weight[i] - largest) - cutoff for i in tail]
    num_grid = 30 + math.floor(math.sqrt(size))
    quartile = x[math.floor(size / 4 + 0.5) - 1]
    thetas = [1 / x[-1] + (1 - math.sqrt(num_grid / (j - 0.5))) / (3 * quartile) for j in range(1, num_grid + 1)]
    profile = []
    for theta in thetas:
        k = sum(math.log1p(-theta * v) for v in x) / size
        profile.append(size * (math.log(-theta / k) - k - 1))
    theta = sum(
        theta / sum(math.exp(other - own) for other in profile) for theta, own in zip(thetas, profile, strict=True)
    )
    k = sum(math.log1p(-theta * v) for v in x) / size
    sigma = -k / theta
    k = (k * size + 5) / (size + 10)
    smoothed = list(log_weight)
    for rank, i in enumerate(tail):
        value = cutoff + sigma / k * ((1 - (rank + 0.5) / size) ** -k - 1)
        smoothed[i] = math.log(min(value, 1.0)) + largest
    return smoothed, k


def test_pareto_smoothing_matches_the_slow_one_in_every_bucket() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [200, 12, 31, 1000]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=generator)]
    log_weight = 1.5 * torch.randn(len(ids), generator=generator, dtype=torch.float64) + 100 * ids
    smoothed, k_hat = pareto.pareto_smooth(log_weight, ids)
    for b in range(4):
        if sizes[b] == 12:  # a tail of 3
            assert torch.equal(smoothed[ids == b], log_weight[ids == b])
            assert k_hat[b].isnan()
        else:
            expected, k = slow_psis(log_weight[ids == b].tolist())
            close(smoothed[ids == b], expected, 1e-9)
            close(k_hat[b : b + 1], [k], 1e-9)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_recovers_the_shape_of_a_pareto_tail(shape: float) -> None:
    # The fit's standard error is (1 + k) / sqrt(tail size), so over 32 buckets of 10,000 about 0.02.
    uniform = torch.rand(320_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k_hat = pareto.pareto_smooth(-shape * uniform.log(), torch.arange(32).repeat(10_000))[1]
    assert abs(float(k_hat.mean()) - shape) < 0.06


def test_pareto_smoothing_keeps_order_and_never_exceeds_the_largest() -> None:
    log_weight = 3 * torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smoothed, _ = pareto.pareto_smooth(log_weight)
    assert torch.equal(smoothed.argsort(), log_weight.argsort())
    assert smoothed.max() <= log_weight.max()
    assert not torch.equal(smoothed, log_weight)


def test_equal_weights_have_no_tail_to_fit() -> None:
    smoothed, k_hat = pareto.pareto_smooth(torch.zeros(100, dtype=torch.float64))
    assert torch.equal(smoothed, torch.zeros(100, dtype=torch.float64))
    assert k_hat.isnan().all()
    with pytest.raises(ValueError, match="NaN"):
        pareto.pareto_smooth(torch.tensor([math.nan]))
