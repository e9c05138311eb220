"""Pareto smoothing of importance weights: the largest ones are replaced by quantiles of a fitted distribution.

Axes as in ``packed``: E elements that have a weight of their own, B buckets.

Sources: Pareto-smoothed importance sampling, Vehtari et al. 2024; the fit, Zhang and Stephens 2009.
"""

import math

import torch
from torch import Tensor

from repirl_kernels.packed import bucket_sizes, count_buckets

# A tail with fewer elements is not fitted (Vehtari et al. 2024).
_MIN_TAIL = 5


def pareto_smooth(log_weight: Tensor, bucket_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Smooth the largest weights of each bucket, and estimate the shape k_hat of each bucket's tail.

    In a bucket of M elements the largest ceil(min(M/5, 3 sqrt(M))) weights are the tail. A generalised Pareto
    distribution is fitted to it, and its quantiles replace the tail's weights, in the same order and at most as large
    as the largest raw weight. With k_hat > 0.7, estimates made with the weights are unreliable.

    Args:
        log_weight: ``[E]``; -inf is a weight of 0.
        bucket_ids: ``[E]`` int64; ``None``: all elements are one bucket.

    Returns:
        The log weights ``[E]``, of the dtype of ``log_weight`` and constant to autograd, and k_hat ``[B]`` float64. A
        bucket whose tail has fewer than 5 elements (M <= 20), or no spread, is left as it is, and its k_hat is NaN.

    Raises:
        ValueError: ``log_weight`` holds NaN or +inf.

    Source: Pareto-smoothed importance sampling, Vehtari et al. 2024.
    """
    raw = log_weight.detach()
    if bucket_ids is None:
        bucket_ids = torch.zeros(raw.shape, dtype=torch.int64, device=raw.device)
    if bool((raw.isnan() | (raw == math.inf)).any()):
        raise ValueError("log_weight holds NaN or +inf; smoothing needs finite weights (or -inf for weight 0)")
    num_buckets = count_buckets(bucket_ids)
    k_hat = torch.full((num_buckets,), math.nan, dtype=torch.float64, device=raw.device)
    if num_buckets == 0:
        return raw.clone(), k_hat
    count = bucket_sizes(bucket_ids, num_buckets)
    tail_size = torch.minimum(count.double() / 5, 3 * count.double().sqrt()).ceil().long()
    fitted = (tail_size >= _MIN_TAIL).nonzero()[:, 0]
    if fitted.numel() == 0:
        return raw.clone(), k_hat

    # Elements sorted by bucket, and in ascending order within a bucket. Row r of the tensors [R, N] below is the tail
    # of bucket fitted[r].
    order = raw.argsort(stable=True)
    order = order[bucket_ids[order].argsort(stable=True)]
    end = count.cumsum(0)[fitted, None]
    size = tail_size[fitted, None]
    column = torch.arange(int(size.max()), device=raw.device)[None, :]
    valid = column < size
    where = torch.where(valid, end - size + column, end - 1)
    largest = raw.double()[order[end - 1]]
    tail = (raw.double()[order[where]] - largest).exp()
    cutoff = (raw.double()[order[end - size - 1]] - largest).exp().clamp(min=torch.finfo(torch.float64).tiny)
    k, sigma = _fit_generalized_pareto((tail - cutoff).clamp(min=0.0), valid, size)
    # The weakly informative prior of Vehtari et al. 2024: as if ten more observations had k = 1/2.
    k = (k * size + 5.0) / (size + 10.0)
    probability = ((column.double() + 0.5) / size).clamp(max=1 - 1e-12)
    log_survival = torch.log1p(-probability)
    safe_k = torch.where(k.abs() < 1e-12, 1.0, k)
    quantile = torch.where(k.abs() < 1e-12, -log_survival, torch.expm1(-safe_k * log_survival) / safe_k)
    smoothed = (cutoff + sigma * quantile).clamp(max=1.0).log() + largest
    usable = k.isfinite() & sigma.isfinite() & (sigma > 0)
    result = raw.double().clone()
    write = valid & usable
    result[order[where[write]]] = smoothed[write]
    k_hat[fitted] = torch.where(usable, k, math.nan)[:, 0]
    return result.to(raw.dtype), k_hat


def _fit_generalized_pareto(x: Tensor, valid: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Shape k and scale sigma of a generalised Pareto distribution, fitted to each row.

    theta = -k / sigma is its posterior mean, on a grid, under a prior that depends on the data.

    Args:
        x: ``[R, N]``, exceedances over the cutoff, ascending in each row.
        valid: ``[R, N]`` bool, the first ``size`` of each row.
        size: ``[R, 1]``, the number of valid elements.

    Returns:
        k and sigma, each ``[R, 1]``; not finite where a row has no spread.

    Source: Zhang and Stephens 2009.
    """
    num_grid = 30 + size.double().sqrt().floor().long()
    j = torch.arange(1, int(num_grid.max()) + 1, dtype=torch.float64, device=x.device)[None, :]
    quartile = x.gather(1, (size.double() / 4 + 0.5).floor().long() - 1)
    top = x.gather(1, size - 1)
    theta = 1 / top + (1 - (num_grid / (j - 0.5)).sqrt()) / (3 * quartile)

    def shape(theta: Tensor) -> Tensor:
        terms = torch.log1p(-theta[:, :, None] * x[:, None, :])
        return torch.where(valid[:, None, :], terms, 0.0).sum(-1) / size

    k = shape(theta)
    profile = size * ((-theta / k).log() - k - 1)
    posterior = torch.where(j <= num_grid, profile, -math.inf).softmax(-1)
    theta = torch.where(j <= num_grid, theta * posterior, 0.0).sum(-1, keepdim=True)
    k = shape(theta)
    return k, -k / theta
