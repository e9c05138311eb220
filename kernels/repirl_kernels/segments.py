"""Packed-sequence ops: importance weights, returns, leave-one-out advantages.

Sequences lie end to end without padding. Axes: T tokens (response tokens only), S sequences, B buckets, E
elements that carry a weight of their own (sequences or tokens). ``cu_seqlens [S+1]`` holds 0 and the running
ends, so sequence ``i`` is ``[cu_seqlens[i], cu_seqlens[i+1])``; a sequence may be empty. A *bucket* is a set
of elements whose weights are normalised together.

Everything is a pure function of tensors, without a loop over sequences, and gives a sequence the same numbers
wherever in the pack it lies: sums never run across a sequence's borders. Sums are taken in float64.

Sources: maximum-entropy inverse RL, Ziebart et al. 2008; guided cost learning, Finn et al. 2016; rePIRL, Wu
et al., ICML 2026; per-decision importance sampling, Precup et al. 2000; Pareto-smoothed importance sampling,
Vehtari et al. 2024, with the fit of Zhang and Stephens 2009; RLOO, Ahmadian et al. 2024.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT_KINDS = ("trajectory", "length_normalized", "per_decision", "token", "uniform")
GROUPINGS = ("prompt", "batch")
NORMALIZATIONS = ("sequence", "token")

# Below this exponent tempered weights are equal for any reward of a sane scale; it keeps 1/alpha finite.
_MIN_ALPHA = 1e-6
_BISECTION_STEPS = 40
# A generalised Pareto distribution is not fitted to fewer points than this (Vehtari et al. 2024).
_MIN_TAIL = 5


class LogWeights(NamedTuple):
    """Log importance weights and how they are to be normalised.

    log_weight [E] float64, tempering included, differentiable in the rewards · bucket_ids [E] int64 in [0, B)
    · alpha [B] the exponent that was applied · mass [B] what a bucket's normalised weights are multiplied
    with in the loss (they sum to 1, the bucket's share of the policy term need not; see `irl_coefficients`) ·
    per_token: E is T (else S).
    """

    log_weight: Tensor
    bucket_ids: Tensor
    alpha: Tensor
    mass: Tensor
    per_token: bool


class Coefficients(NamedTuple):
    """Constants c_t of the two-pass gradient: expert [T of the experts] and policy [T of the rollouts],
    float64."""

    expert: Tensor
    policy: Tensor


# ------------------------------------------------------------------------------------------------------------
# Segments


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError that names the option, its value and the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_packed(cu_seqlens: Tensor, **values: Tensor | None) -> None:
    """ValueError or TypeError unless `cu_seqlens` is well formed and every value is a floating [T] tensor."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [S+1] with S >= 0, got {tuple(cu_seqlens.shape)}")
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu_seqlens[:8].tolist()} ...")
    num_tokens = int(cu_seqlens[-1])
    for name, value in values.items():
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.shape != (num_tokens,):
            raise ValueError(
                f"{name} must have shape [T] = ({num_tokens},), as cu_seqlens ends; got {tuple(value.shape)}"
            )


def check_finite(row_mask: Tensor | None = None, **values: Tensor | None) -> None:
    """ValueError that names the first value that is NaN or infinite in a row that counts; one read for all of them.

    Nothing is read where that would end a graph or a transform: under `torch.compile`, `torch.func` and while a CUDA
    graph is captured.
    """
    given = {name: value.detach() for name, value in values.items() if value is not None}
    if torch.compiler.is_compiling() or not given or torch._C._are_functorch_transforms_active():
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    wrong = {name: ~value.isfinite() for name, value in given.items()}
    if row_mask is not None:
        wrong = {name: rows & row_mask for name, rows in wrong.items()}
    found = torch.stack([rows.any() for rows in wrong.values()]).tolist()
    for name in [name for name, is_wrong in zip(wrong, found, strict=True) if is_wrong]:
        first = tuple(wrong[name].nonzero()[0].tolist())
        index = first[0] if len(first) == 1 else first
        raise ValueError(
            f"{name} must be finite; {int(wrong[name].sum())} values are not, first {float(given[name][first])} at "
            f"index {index}"
        )


def check_number(name: str, value: float) -> None:
    """ValueError unless the option is finite."""
    if not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value!r}")


def sequence_ids(cu_seqlens: Tensor, num_tokens: int | None = None) -> Tensor:
    """The sequence of each token, [T] int64. `num_tokens`, if known, spares a device synchronisation."""
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(index, cu_seqlens.diff().long(), output_size=num_tokens)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of ``values [T]`` over each sequence, [S]; 0 for an empty one."""
    check_packed(cu_seqlens, values=values)
    ids = sequence_ids(cu_seqlens, values.numel())
    return _bucket_sum(values, ids, cu_seqlens.numel() - 1).to(values.dtype)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of ``values [T]`` over each sequence, [S]; 0 for an empty one."""
    check_packed(cu_seqlens, values=values)
    total = _bucket_sum(values, sequence_ids(cu_seqlens, values.numel()), cu_seqlens.numel() - 1)
    return (total / cu_seqlens.diff().clamp(min=1)).to(values.dtype)


def prefix_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Inclusive running sum within each sequence, [T]."""
    check_packed(cu_seqlens, values=values)
    lengths = cu_seqlens.diff().long()
    steps_before = _positions(cu_seqlens)
    return _scan(values.double(), steps_before, _longest(lengths), 1.0, backward=False).to(values.dtype)


def returns_to_go(reward: Tensor, cu_seqlens: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each token to the end of its sequence: sum_{t'>=t} gamma^(t'-t)
    r_t'.

    reward [T]; gamma in [0, 1]. Returns [T]. ValueError for a gamma outside.
    """
    check_packed(cu_seqlens, reward=reward)
    _check_gamma(gamma)
    lengths = cu_seqlens.diff().long()
    steps_after = lengths.repeat_interleave(lengths) - 1 - _positions(cu_seqlens)
    return _scan(reward.double(), steps_after, _longest(lengths), gamma, backward=True).to(reward.dtype)


def _scan(values: Tensor, distance: Tensor, longest: int, gamma: float, *, backward: bool) -> Tensor:
    # Doubling: after k rounds every token holds its own value and 2^k - 1 neighbours', discounted.
    # log2(longest) rounds on [T] tensors, and what lies across a border is never added in, not even as a NaN
    # times zero.
    reach = 1
    while reach < longest:
        padding = values.new_zeros(min(reach, values.numel()))
        neighbour = torch.cat([values[reach:], padding] if backward else [padding, values[:-reach]])
        values = values + torch.where(distance >= reach, gamma**reach * neighbour, 0.0)
        reach *= 2
    return values


def _positions(cu_seqlens: Tensor) -> Tensor:
    """Position of each token in its sequence, [T]."""
    lengths = cu_seqlens.diff().long()
    start = cu_seqlens[:-1].long().repeat_interleave(lengths)
    return torch.arange(start.numel(), device=start.device) - start


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _check_gamma(gamma: float) -> None:
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")


# ------------------------------------------------------------------------------------------------------------
# Buckets


def _num_buckets(bucket_ids: Tensor) -> int:
    return int(bucket_ids.max()) + 1 if bucket_ids.numel() else 0


def _bucket_sum(values: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    zero = torch.zeros(num_buckets, dtype=torch.float64, device=values.device)
    return zero.index_add(0, bucket_ids, values.double())


def _bucket_count(bucket_ids: Tensor, num_buckets: int) -> Tensor:
    return torch.bincount(bucket_ids, minlength=num_buckets)


def _bucket_max(values: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    lowest = torch.full((num_buckets,), -math.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce(0, bucket_ids, values, "amax")


def _bucket_logsumexp(values: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    values = values.double()
    shift = _bucket_max(values.detach(), bucket_ids, num_buckets)
    shift = torch.where(shift.isfinite(), shift, 0.0)
    return _bucket_sum((values - shift[bucket_ids]).exp(), bucket_ids, num_buckets).log() + shift


def _dense_ids(group_ids: Tensor | None, cu_seqlens: Tensor, group_by: str) -> tuple[Tensor, int]:
    """Groups renumbered from 0, and how many there are; one group where they are not told apart."""
    check_choice("group_by", group_by, GROUPINGS)
    num_sequences = cu_seqlens.numel() - 1
    if group_ids is not None and group_ids.shape != (num_sequences,):
        raise ValueError(f"group_ids must have shape [S] = ({num_sequences},), got {tuple(group_ids.shape)}")
    if group_ids is None or group_by == "batch":
        return torch.zeros(num_sequences, dtype=torch.int64, device=cu_seqlens.device), min(num_sequences, 1)
    unique, dense = torch.unique(group_ids, return_inverse=True)
    return dense, unique.numel()


# ------------------------------------------------------------------------------------------------------------
# Importance weights


def log_importance_weights(
    reward: Tensor,
    sampler_logprob: Tensor,
    cu_seqlens: Tensor,
    *,
    group_ids: Tensor | None = None,
    kind: str = "trajectory",
    base_logprob: Tensor | None = None,
    temper: float = 1.0,
    target_ess: float | None = None,
    group_by: str = "prompt",
) -> LogWeights:
    """Log importance weights of rollouts of mu under p(tau) ~ b(tau) exp(sum_t r_t).

    With x_t = r_t + log b_t - log mu_t (log b = 0, a uniform base measure, without `base_logprob`):

    | kind                | log w                              | normalised over                        |
    |---------------------|------------------------------------|----------------------------------------|
    | `trajectory`        | sum_t x_t                          | the group's sequences                  |
    | `length_normalized` | the same, divided by the length    | the group's sequences                  |
    | `per_decision`      | for token t, the sum of x up to t  | the group's sequences still alive at t |
    | `token`             | x_t                                | the group's tokens                     |
    | `uniform`           | 0                                  | the group's sequences                  |

    Only `trajectory` estimates the expectation under p for any reward. `per_decision` does where b_t exp(r_t)
    sums to 1 over the actions of every state (rewards that are log-probabilities), as a prefix's weight
    leaves out what may follow it; the others trade bias for variance.

    All are multiplied with an exponent: `temper` in (0, 1], or with `target_ess` = f in (0, 1] a bucket's
    own, the largest <= 1 whose effective sample size is at least f times its number of elements. The exponent
    is a constant to autograd.

    Args: reward, sampler_logprob, base_logprob [T]; group_ids [S], sequences of one prompt share an id
    (without them all are one group); group_by "prompt" or "batch" (one group whatever `group_ids` says).

    An empty sequence has log w = 0 among sequences and no element among tokens. Rewards and base log-probs
    may be -inf (weight 0). ValueError where a log weight would be NaN or +inf, and for options outside their
    range.
    """
    check_choice("kind", kind, WEIGHT_KINDS)
    check_packed(cu_seqlens, reward=reward, sampler_logprob=sampler_logprob, base_logprob=base_logprob)
    if not 0.0 < temper <= 1.0:
        raise ValueError(f"temper must lie in (0, 1] (weights that are all equal: kind='uniform'), got {temper!r}")
    if target_ess is not None and not 0.0 < target_ess <= 1.0:
        raise ValueError(f"target_ess must lie in (0, 1], a fraction of the samples; got {target_ess!r}")
    if target_ess is not None and temper != 1.0:
        raise ValueError(f"give temper or target_ess, not both; got temper={temper!r}, target_ess={target_ess!r}")
    groups, num_groups = _dense_ids(group_ids, cu_seqlens, group_by)
    lengths = cu_seqlens.diff().long()
    token_groups = groups.repeat_interleave(lengths)
    group_sizes = _bucket_count(groups, num_groups)

    log_ratio = reward.double() - sampler_logprob.detach().double()
    if base_logprob is not None:
        log_ratio = log_ratio + base_logprob.detach().double()
    invalid = log_ratio.detach().isnan() | (log_ratio.detach() == math.inf)
    if bool(invalid.any()):
        t = int(invalid.nonzero()[0, 0])
        base = 0.0 if base_logprob is None else float(base_logprob[t])
        raise ValueError(
            f"the log importance ratio of {int(invalid.sum())} tokens is NaN or +inf, first at token {t}: "
            f"reward {float(reward.detach()[t])}, base_logprob {base}, "
            f"sampler_logprob {float(sampler_logprob[t])}; "
            "a token that was sampled has a finite sampler_logprob, and rewards must not be NaN or +inf"
        )

    per_token = kind in ("token", "per_decision")
    position = _positions(cu_seqlens)
    longest = max(_longest(lengths), 1)
    if kind == "token":
        log_weight = log_ratio
        unique, bucket_ids = torch.unique(token_groups, return_inverse=True)
        # Tokens per sequence: with equal weights, every token has the coefficient that `uniform` gives it.
        mass = _bucket_count(bucket_ids, unique.numel()).double() / group_sizes[unique] / max(num_groups, 1)
    elif kind == "per_decision":
        log_weight = _scan(log_ratio, position, longest, 1.0, backward=False)
        unique, bucket_ids = torch.unique(token_groups * longest + position, return_inverse=True)
        mass = torch.ones_like(unique, dtype=torch.float64)  # completed below, with alpha
    else:
        bucket_ids = groups
        log_weight = _bucket_sum(log_ratio, sequence_ids(cu_seqlens, log_ratio.numel()), lengths.numel())
        if kind == "length_normalized":
            log_weight = log_weight / lengths.clamp(min=1)
        elif kind == "uniform":
            log_weight = torch.zeros_like(log_weight)
        mass = torch.full((num_groups,), 1.0 / max(num_groups, 1), dtype=torch.float64, device=groups.device)

    num_buckets = mass.numel()
    if target_ess is None:
        alpha = torch.full_like(mass, temper)
    else:
        alpha = _largest_exponent(log_weight.detach(), bucket_ids, num_buckets, target_ess)
    if kind == "per_decision":
        survival = _survival(log_weight.detach(), alpha, unique, bucket_ids, groups, lengths, longest)
        mass = survival / max(num_groups, 1)
    return LogWeights(log_weight * alpha[bucket_ids], bucket_ids, alpha, mass, per_token)


def _largest_exponent(log_weight: Tensor, bucket_ids: Tensor, num_buckets: int, fraction: float) -> Tensor:
    # The effective sample size of w^alpha falls with alpha, so bisection finds the one crossing.
    least = fraction * _bucket_count(bucket_ids, num_buckets).double() * (1 - 1e-12)

    def reaches(alpha: Tensor) -> Tensor:
        scaled = log_weight * alpha[bucket_ids]
        log_ess = 2 * _bucket_logsumexp(scaled, bucket_ids, num_buckets)
        log_ess = log_ess - _bucket_logsumexp(2 * scaled, bucket_ids, num_buckets)
        return log_ess.exp() >= least

    low = torch.full((num_buckets,), _MIN_ALPHA, dtype=torch.float64, device=log_weight.device)
    high = torch.ones_like(low)
    whole = reaches(high)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        good = reaches(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(whole, 1.0, low)


def _survival(
    prefix: Tensor,
    alpha: Tensor,
    keys: Tensor,
    bucket_ids: Tensor,
    groups: Tensor,
    lengths: Tensor,
    longest: int,
) -> Tensor:
    """Per (group, position) bucket: the share of the group's weight that sequences still alive there hold,
    [B].

    E_p[sum_t r_t] = sum_t P_p(alive at t) E_p[r_t | alive at t]: weights normalised over the living estimate
    the second factor only. Sequences that have ended count with their last prefix.
    """
    num_buckets = keys.numel()
    alive = _bucket_logsumexp(prefix * alpha[bucket_ids], bucket_ids, num_buckets)
    group_longest = torch.zeros_like(groups).scatter_reduce(0, groups, lengths, "amax")[groups]
    num_missing = group_longest - lengths
    sequence = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(num_missing)
    offset = (num_missing.cumsum(0) - num_missing)[sequence]
    position = torch.arange(sequence.numel(), device=lengths.device) - offset + lengths[sequence]
    bucket = torch.searchsorted(keys, groups[sequence] * longest + position)
    last = torch.where(lengths > 0, torch.cat([prefix, prefix.new_zeros(1)])[lengths.cumsum(0) - 1], 0.0)
    ended = _bucket_logsumexp(last[sequence] * alpha[bucket], bucket, num_buckets)
    return torch.sigmoid(alive - ended)


def self_normalize(log_weight: Tensor, bucket_ids: Tensor, *, truncate: float | None = None) -> Tensor:
    """Weights exp(log_weight) that sum to 1 in every bucket, [E].

    truncate = c >= 1: no raw weight counts for more than c times its bucket's mean (Ionides 2008 with c =
    sqrt(M)), then normalised. One cut, so the largest normalised weight may exceed c/M again. ValueError
    where a bucket has no finite weight, or for NaN, +inf, or c < 1.
    """
    if log_weight.shape != bucket_ids.shape:
        raise ValueError(
            "log_weight and bucket_ids must have one shape [E], got "
            f"{tuple(log_weight.shape)} and {tuple(bucket_ids.shape)}"
        )
    if truncate is not None and not truncate >= 1.0:
        raise ValueError(f"truncate must be at least 1, in units of the mean weight; got {truncate!r}")
    num_buckets = _num_buckets(bucket_ids)
    total = _bucket_logsumexp(log_weight, bucket_ids, num_buckets)
    count = _bucket_count(bucket_ids, num_buckets)
    wrong = ((count > 0) & ~total.detach().isfinite()).nonzero()[:, 0]
    if wrong.numel():
        raise ValueError(
            f"bucket {int(wrong[0])} cannot be normalised: its log weights are NaN, +inf, or all -inf "
            f"({wrong.numel()} such buckets)"
        )
    weight = (log_weight.double() - total[bucket_ids]).exp()
    if truncate is not None:
        weight = weight.minimum((truncate / count.clamp(min=1).double())[bucket_ids])
        weight = weight / _bucket_sum(weight, bucket_ids, num_buckets)[bucket_ids]
    return weight.to(log_weight.dtype)


def effective_sample_size(weights: Tensor, bucket_ids: Tensor) -> Tensor:
    """Kish's (sum w)^2 / sum w^2 of every bucket, [B]; between 1 and the bucket's number of elements."""
    num_buckets = _num_buckets(bucket_ids)
    total = _bucket_sum(weights, bucket_ids, num_buckets)
    return total**2 / _bucket_sum(weights.double() ** 2, bucket_ids, num_buckets)


def log_partition(log_weight: Tensor, bucket_ids: Tensor) -> Tensor:
    """Estimate of log Z of every bucket, [B]: logsumexp of its log weights minus the log of their number."""
    num_buckets = _num_buckets(bucket_ids)
    count = _bucket_count(bucket_ids, num_buckets)
    return _bucket_logsumexp(log_weight, bucket_ids, num_buckets) - count.double().log()


def pareto_smooth(log_weight: Tensor, bucket_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed log weights [E] and the tail's shape k_hat [B] (Vehtari et al. 2024; one bucket without
    ids).

    The largest ceil(min(M/5, 3 sqrt(M))) weights of a bucket of M are replaced by quantiles of a generalised
    Pareto distribution fitted to them, at most the largest raw weight. k_hat > 0.7 says that the estimate is
    not to be trusted. A bucket whose tail has fewer than 5 elements (M <= 20), or no spread, is left as it
    is, k_hat NaN. The result is a constant to autograd. ValueError for NaN or +inf.
    """
    raw = log_weight.detach()
    if bucket_ids is None:
        bucket_ids = torch.zeros(raw.shape, dtype=torch.int64, device=raw.device)
    if bool((raw.isnan() | (raw == math.inf)).any()):
        raise ValueError("log_weight holds NaN or +inf; smoothing needs finite weights (or -inf for weight 0)")
    num_buckets = _num_buckets(bucket_ids)
    k_hat = torch.full((num_buckets,), math.nan, dtype=torch.float64, device=raw.device)
    if num_buckets == 0:
        return raw.clone(), k_hat
    count = _bucket_count(bucket_ids, num_buckets)
    tail_size = torch.minimum(count.double() / 5, 3 * count.double().sqrt()).ceil().long()
    fitted = (tail_size >= _MIN_TAIL).nonzero()[:, 0]
    if fitted.numel() == 0:
        return raw.clone(), k_hat

    # Elements in ascending order within their bucket; `row` r holds the tail of bucket fitted[r].
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
    # The weakly informative prior of Vehtari et al.: ten observations at k = 1/2.
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
    """Shape and scale [R, 1] of exceedances x [R, N], ascending, of which the first size [R, 1] count.

    Zhang and Stephens 2009: the posterior mean of theta = -k/sigma under a data-driven prior, on a grid.
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


def irl_coefficients(
    weights: Tensor,
    log_weights: LogWeights,
    policy_cu_seqlens: Tensor,
    expert_cu_seqlens: Tensor,
    *,
    normalize: str = "sequence",
) -> Coefficients:
    """The constants c_t with which sum_t c_t r_t has the gradient of the maximum-entropy IRL loss.

    weights [E]: normalised weights (`self_normalize`, of smoothed log weights or not) of the rollouts that
    estimate log Z; log_weights: what they come from. With G groups:

    * expert tokens: c_t = -1/|E|, over all expert sequences, whatever group they are in.
    * rollout tokens: c_t = m_b w_e, with e the token's element and b its bucket. The mass m_b is 1/G for
      weights of sequences, so log Z is averaged over groups; for `token`, (tokens per sequence of the
      group)/G; for `per_decision`, (estimated probability of being alive at t under p)/G.

    `normalize="token"` divides either side by its sum: experts get -1/(number of expert tokens), rollouts
    c_t / sum_t' c_t', so each side's mean reward per token is compared, and adding a constant to every reward
    changes nothing. For weights of sequences of one group the rollouts' side is then
    sum_j w_j R_j / sum_j w_j T_j with the denominator constant to autograd.

    ValueError where a side has no tokens: the loss has no minimum without both; and for weights that are NaN or
    infinite.
    """
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_packed(policy_cu_seqlens)
    check_packed(expert_cu_seqlens)
    num_policy, num_expert = int(policy_cu_seqlens[-1]), int(expert_cu_seqlens[-1])
    if num_policy == 0 or num_expert == 0:
        raise ValueError(
            f"the inverse-RL loss needs expert tokens and rollout tokens, got {num_expert} and {num_policy}; "
            "without both it has no minimum: skip this update"
        )
    element = torch.arange(num_policy, device=weights.device)
    if not log_weights.per_token:
        element = sequence_ids(policy_cu_seqlens, num_policy)
    if weights.shape != log_weights.bucket_ids.shape:
        raise ValueError(
            f"weights must have shape [E] = {tuple(log_weights.bucket_ids.shape)}, got {tuple(weights.shape)}"
        )
    check_finite(weights=weights)
    mass = log_weights.mass[log_weights.bucket_ids]
    policy = (weights.detach().double() * mass)[element]
    num_experts = expert_cu_seqlens.numel() - 1
    expert = torch.full((num_expert,), -1.0 / num_experts, dtype=torch.float64, device=weights.device)
    if normalize == "token":
        expert = expert / -expert.sum()
        policy = policy / policy.sum()
    return Coefficients(expert, policy)


def importance_diagnostics(
    log_weights: LogWeights,
    weights: Tensor,
    reward: Tensor,
    cu_seqlens: Tensor,
    *,
    expert_reward: Tensor | None = None,
    expert_cu_seqlens: Tensor | None = None,
) -> dict[str, float]:
    """What to watch while weights and rewards train. reward [T] of the rollouts, expert_reward of the
    experts.

    ess, ess_fraction (of the bucket's elements), log_z, alpha: means over buckets · max_weight: largest
    normalised weight of a bucket with more than one element (1 where there is none) · pareto_k: the largest
    k_hat, NaN where no bucket has enough elements · reward_mean, reward_std: per rollout token ·
    reward_length_correlation: between the sum of a sequence's rewards and its length, experts included (0
    where either is constant) · with experts: reward_gap, expert minus rollout mean reward per token. log_z
    estimates log Z for `trajectory` weights with alpha 1; for others it is the log of the mean weight.
    """
    with torch.no_grad():
        bucket_ids = log_weights.bucket_ids
        num_buckets = _num_buckets(bucket_ids)
        count = _bucket_count(bucket_ids, num_buckets)
        ess = effective_sample_size(weights, bucket_ids)
        k_hat = pareto_smooth(log_weights.log_weight, bucket_ids)[1]
        k_hat = k_hat[~k_hat.isnan()]
        contested = weights[count[bucket_ids] > 1]
        lengths = cu_seqlens.diff().double()
        sums = segment_sum(reward.double(), cu_seqlens)
        result = {
            "ess": _mean(ess),
            "ess_fraction": _mean(ess / count),
            "max_weight": float(contested.max()) if contested.numel() else 1.0,
            "pareto_k": float(k_hat.max()) if k_hat.numel() else math.nan,
            "log_z": _mean(log_partition(log_weights.log_weight, bucket_ids)),
            "alpha": _mean(log_weights.alpha),
            "reward_mean": _mean(reward),
            "reward_std": float(reward.double().std(correction=0)) if reward.numel() else 0.0,
        }
        if expert_reward is not None:
            if expert_cu_seqlens is None:
                raise ValueError("expert_reward needs expert_cu_seqlens")
            result["reward_gap"] = _mean(expert_reward) - result["reward_mean"]
            sums = torch.cat([sums, segment_sum(expert_reward.double(), expert_cu_seqlens)])
            lengths = torch.cat([lengths, expert_cu_seqlens.diff().double()])
        result["reward_length_correlation"] = _correlation(sums, lengths)
        return result


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0


def _correlation(x: Tensor, y: Tensor) -> float:
    if x.numel() < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-12 else 0.0


# ------------------------------------------------------------------------------------------------------------
# Advantages


def rloo_advantages(
    outcome: Tensor | None,
    reward: Tensor | None,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    outcome_coefficient: float,
    process_coefficient: float,
    gamma: float = 1.0,
    whiten: bool = False,
) -> Tensor:
    """Leave-one-out advantages from outcome and process rewards, [T] (Ahmadian et al. 2024; rePIRL).

        A_o(i)   = R_o(i) - mean_{j != i} R_o(j)
        r~(i, t) = r(i, t) - mean_{j != i} mean_t r(j, t),    A_p(i, t) = sum_{t' >= t} gamma^(t'-t) r~(i, t')
        A        = outcome_coefficient A_o + process_coefficient A_p,   whitened over all tokens on request

    outcome [S], reward [T], group_ids [S]: sequences of one prompt share an id; j runs over the group. Either
    reward may be None where its coefficient is 0. Constant to autograd.

    ValueError where a sequence has no other in its group to be compared with (for process rewards: no other
    with tokens), as a baseline of 0 would silently mix raw rewards into the advantages; and for rewards or
    coefficients that are NaN or infinite.
    """
    check_packed(cu_seqlens, reward=reward)
    _check_gamma(gamma)
    check_number("outcome_coefficient", outcome_coefficient)
    check_number("process_coefficient", process_coefficient)
    groups, num_groups = _dense_ids(group_ids, cu_seqlens, "prompt")
    num_tokens = int(cu_seqlens[-1])
    ids = sequence_ids(cu_seqlens, num_tokens)
    lengths = cu_seqlens.diff().long()
    advantage = torch.zeros(num_tokens, dtype=torch.float64, device=cu_seqlens.device)
    dtypes = [torch.float32]
    if outcome_coefficient != 0.0:
        if outcome is None:
            raise ValueError(f"outcome_coefficient is {outcome_coefficient!r} but outcome is None")
        if outcome.shape != lengths.shape:
            raise ValueError(f"outcome must have shape [S] = {tuple(lengths.shape)}, got {tuple(outcome.shape)}")
        check_finite(outcome=outcome)
        everyone = torch.ones_like(groups, dtype=torch.bool)
        baseline = _others_mean(outcome.detach().double(), everyone, groups, num_groups, group_ids)
        advantage = advantage + outcome_coefficient * (outcome.detach().double() - baseline)[ids]
        dtypes.append(outcome.dtype)
    if process_coefficient != 0.0:
        if reward is None:
            raise ValueError(f"process_coefficient is {process_coefficient!r} but reward is None")
        check_finite(reward=reward)
        means = segment_mean(reward.detach().double(), cu_seqlens)
        baseline = _others_mean(means, lengths > 0, groups, num_groups, group_ids)
        centred = reward.detach().double() - baseline[ids]
        advantage = advantage + process_coefficient * returns_to_go(centred, cu_seqlens, gamma)
        dtypes.append(reward.dtype)
    if whiten and num_tokens > 0:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    return advantage.to(torch.float64 if torch.float64 in dtypes else torch.float32)


def _others_mean(values: Tensor, counted: Tensor, groups: Tensor, num_groups: int, group_ids: Tensor) -> Tensor:
    """Mean of the other counted sequences of the group, [S]; 0 for a sequence that is not counted itself."""
    values = torch.where(counted, values, 0.0)
    others = _bucket_sum(counted, groups, num_groups)[groups] - counted.double()
    lonely = (counted & (others == 0)).nonzero()[:, 0]
    if lonely.numel():
        raise ValueError(
            f"{lonely.numel()} sequences are alone in their group (first: sequence {int(lonely[0])}, group "
            f"{int(group_ids[lonely[0]])}): a leave-one-out baseline needs at least 2 rollouts a prompt"
        )
    total = _bucket_sum(values, groups, num_groups)[groups] - values
    return torch.where(counted, total / others.clamp(min=1), 0.0)
