"""Importance weights of packed rollouts, and the coefficients that the inverse-RL loss takes from them.

Axes as in ``packed``: T tokens, S sequences, E elements that have a weight of their own, B buckets.

Sources: maximum-entropy inverse RL, Ziebart et al. 2008; guided cost learning, Finn et al. 2016; rePIRL, Wu et al.,
ICML 2026; per-decision importance sampling, Precup et al. 2000; truncated importance sampling, Ionides 2008; effective
sample size, Kish 1965.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from repirl_kernels.packed import (
    bucket_logsumexp,
    bucket_sizes,
    bucket_sum,
    check_choice,
    check_finite,
    check_packed,
    count_buckets,
    dense_group_ids,
    max_length,
    running_sums,
    segment_sum,
    sequence_ids,
    token_positions,
)
from repirl_kernels.pareto import pareto_smooth

WEIGHT_KINDS = ("trajectory", "length_normalized", "per_decision", "token", "uniform")
NORMALIZATIONS = ("sequence", "token")
# Below this exponent tempered weights are equal for any reward of a sane scale; it keeps 1/alpha finite.
_MIN_ALPHA = 1e-6
_BISECTION_STEPS = 40


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
    groups, num_groups = dense_group_ids(group_ids, cu_seqlens, group_by)
    lengths = cu_seqlens.diff().long()
    token_groups = groups.repeat_interleave(lengths)
    group_sizes = bucket_sizes(groups, num_groups)

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
    position = token_positions(cu_seqlens)
    longest = max(max_length(lengths), 1)
    if kind == "token":
        log_weight = log_ratio
        unique, bucket_ids = torch.unique(token_groups, return_inverse=True)
        # Tokens per sequence: with equal weights, every token has the coefficient that `uniform` gives it.
        mass = bucket_sizes(bucket_ids, unique.numel()).double() / group_sizes[unique] / max(num_groups, 1)
    elif kind == "per_decision":
        log_weight = running_sums(log_ratio, position, longest, 1.0, backward=False)
        unique, bucket_ids = torch.unique(token_groups * longest + position, return_inverse=True)
        mass = torch.ones_like(unique, dtype=torch.float64)  # completed below, with alpha
    else:
        bucket_ids = groups
        log_weight = bucket_sum(log_ratio, sequence_ids(cu_seqlens, log_ratio.numel()), lengths.numel())
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
    least = fraction * bucket_sizes(bucket_ids, num_buckets).double() * (1 - 1e-12)

    def reaches(alpha: Tensor) -> Tensor:
        scaled = log_weight * alpha[bucket_ids]
        log_ess = 2 * bucket_logsumexp(scaled, bucket_ids, num_buckets)
        log_ess = log_ess - bucket_logsumexp(2 * scaled, bucket_ids, num_buckets)
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
    alive = bucket_logsumexp(prefix * alpha[bucket_ids], bucket_ids, num_buckets)
    group_longest = torch.zeros_like(groups).scatter_reduce(0, groups, lengths, "amax")[groups]
    num_missing = group_longest - lengths
    sequence = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(num_missing)
    offset = (num_missing.cumsum(0) - num_missing)[sequence]
    position = torch.arange(sequence.numel(), device=lengths.device) - offset + lengths[sequence]
    bucket = torch.searchsorted(keys, groups[sequence] * longest + position)
    last = torch.where(lengths > 0, torch.cat([prefix, prefix.new_zeros(1)])[lengths.cumsum(0) - 1], 0.0)
    ended = bucket_logsumexp(last[sequence] * alpha[bucket], bucket, num_buckets)
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
    num_buckets = count_buckets(bucket_ids)
    total = bucket_logsumexp(log_weight, bucket_ids, num_buckets)
    count = bucket_sizes(bucket_ids, num_buckets)
    wrong = ((count > 0) & ~total.detach().isfinite()).nonzero()[:, 0]
    if wrong.numel():
        raise ValueError(
            f"bucket {int(wrong[0])} cannot be normalised: its log weights are NaN, +inf, or all -inf "
            f"({wrong.numel()} such buckets)"
        )
    weight = (log_weight.double() - total[bucket_ids]).exp()
    if truncate is not None:
        weight = weight.minimum((truncate / count.clamp(min=1).double())[bucket_ids])
        weight = weight / bucket_sum(weight, bucket_ids, num_buckets)[bucket_ids]
    return weight.to(log_weight.dtype)


def effective_sample_size(weights: Tensor, bucket_ids: Tensor) -> Tensor:
    """Kish's (sum w)^2 / sum w^2 of every bucket, [B]; between 1 and the bucket's number of elements."""
    num_buckets = count_buckets(bucket_ids)
    total = bucket_sum(weights, bucket_ids, num_buckets)
    return total**2 / bucket_sum(weights.double() ** 2, bucket_ids, num_buckets)


def log_partition(log_weight: Tensor, bucket_ids: Tensor) -> Tensor:
    """Estimate of log Z of every bucket, [B]: logsumexp of its log weights minus the log of their number."""
    num_buckets = count_buckets(bucket_ids)
    count = bucket_sizes(bucket_ids, num_buckets)
    return bucket_logsumexp(log_weight, bucket_ids, num_buckets) - count.double().log()


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
        num_buckets = count_buckets(bucket_ids)
        count = bucket_sizes(bucket_ids, num_buckets)
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
