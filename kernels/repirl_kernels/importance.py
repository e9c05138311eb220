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
# The smallest exponent: with it, weights are nearly equal for rewards of any usual scale, and 1/alpha is finite.
_MIN_ALPHA = 1e-6
_BISECTION_STEPS = 40


class LogWeights(NamedTuple):
    """Log importance weights, and how they are to be normalised."""

    log_weight: Tensor
    """``[E]`` float64, times the exponent; differentiable in the rewards."""
    bucket_ids: Tensor
    """``[E]`` int64, in [0, B): the bucket of each element."""
    alpha: Tensor
    """``[B]`` float64: the exponent of each bucket."""
    mass: Tensor
    """``[B]`` float64: what each bucket's normalised weights, which sum to 1, are multiplied by in the loss; see
    :func:`irl_coefficients`."""
    per_token: bool
    """Whether the elements are tokens (E = T) or sequences (E = S)."""


class Coefficients(NamedTuple):
    """The constants c_t of the two-pass gradient, one for each token."""

    expert: Tensor
    """``[T]`` of the experts, float64; negative."""
    policy: Tensor
    """``[T]`` of the rollouts, float64; not negative."""


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
    """Log importance weights of rollouts from mu, under p(tau) proportional to b(tau) exp(sum_t r_t).

    With x_t = r_t + log b_t - log mu_t:

    | kind                | log w                                   | normalised over                        |
    |---------------------|-----------------------------------------|----------------------------------------|
    | `trajectory`        | sum_t x_t                               | the group's sequences                  |
    | `length_normalized` | sum_t x_t, divided by the length        | the group's sequences                  |
    | `per_decision`      | of token t: the sum of x from 0 to t    | the group's sequences still alive at t |
    | `token`             | of token t: x_t                         | the group's tokens                     |
    | `uniform`           | 0                                       | the group's sequences                  |

    Only ``trajectory`` estimates the expectation under p for every reward. ``per_decision`` does so if the rewards are
    log-probabilities, so that b_t exp(r_t) sums to 1 over the actions of every state: the weight of a prefix then does
    not depend on what follows it. The other kinds are biased and have a lower variance.

    Every log weight is multiplied by an exponent alpha, a constant to autograd. It is ``temper``, the same for all
    buckets; or, with ``target_ess``, each bucket has its own: the largest alpha <= 1 with which the bucket's effective
    sample size is at least ``target_ess`` times its number of elements.

    An empty sequence has log w = 0 if the elements are sequences, and no element if they are tokens.

    Args:
        reward: ``[T]``, r_t; -inf gives a weight of 0.
        sampler_logprob: ``[T]``, log mu_t in nats, a constant to autograd.
        cu_seqlens: ``[S+1]``.
        group_ids: ``[S]`` integers; sequences of one prompt share an id. ``None``: all sequences are one group.
        kind: a row of the table.
        base_logprob: ``[T]``, log b_t in nats, a constant to autograd; -inf gives a weight of 0. ``None``: a uniform
            base measure, log b_t = 0.
        temper: alpha, in (0, 1].
        target_ess: in (0, 1]; not together with ``temper``.
        group_by: ``"prompt"`` keeps the groups, ``"batch"`` puts all sequences into one.

    Returns:
        :class:`LogWeights`.

    Raises:
        TypeError, ValueError: as :func:`repirl_kernels.packed.check_packed`.
        ValueError: x_t is NaN or +inf for a token, or an option is outside its range.

    Sources: guided cost learning, Finn et al. 2016 (``trajectory``); per-decision importance sampling, Precup et al.
    2000 (``per_decision``).
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
        # Times the mean number of tokens per sequence: with equal weights, a token's coefficient is then that of
        # `uniform`.
        mass = bucket_sizes(bucket_ids, unique.numel()).double() / group_sizes[unique] / max(num_groups, 1)
    elif kind == "per_decision":
        log_weight = running_sums(log_ratio, position, longest, 1.0, backward=False)
        unique, bucket_ids = torch.unique(token_groups * longest + position, return_inverse=True)
        mass = torch.ones_like(unique, dtype=torch.float64)  # replaced below, where alpha is known
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
    """The largest exponent in (0, 1] with which each bucket's effective sample size is at least a fraction of its size.

    Args:
        log_weight: ``[E]``, before tempering.
        bucket_ids: ``[E]``.
        num_buckets: B.
        fraction: in (0, 1].

    Returns:
        ``[B]`` float64.
    """
    # The effective sample size of w^alpha falls as alpha grows, so it crosses the bound once: bisection finds where.
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
    """The estimated probability under p, for each (group, position) bucket, that a sequence is alive there.

        E_p[sum_t r_t] = sum_t P_p(alive at t) E_p[r_t | alive at t]

    A sequence is alive at t if it has a token there. Weights normalised over the sequences alive at t estimate only the
    second factor. This function estimates the first: the share of the sequences alive at t in the group's total weight.
    A sequence that has ended counts with the weight at its last token, an empty one with 1.

    Args:
        prefix: ``[T]``, the sum of x up to each token, before tempering.
        alpha: ``[B]``, the exponents.
        keys: ``[B]``, group times ``longest`` plus position, ascending.
        bucket_ids: ``[T]``.
        groups: ``[S]``.
        lengths: ``[S]``.
        longest: the length of the longest sequence, at least 1.

    Returns:
        ``[B]`` float64, in [0, 1].
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
    """Weights exp(log_weight) divided by the sum of their bucket.

    Args:
        log_weight: ``[E]``; -inf is a weight of 0.
        bucket_ids: ``[E]`` int64.
        truncate: c >= 1. Weights above c times the mean weight of their bucket are reduced to that value, and the
            bucket is normalised again. This is done once, so in a bucket of M elements the largest weight can still be
            above c / M. Ionides takes c = sqrt(M).

    Returns:
        ``[E]``, of the dtype of ``log_weight``; each bucket sums to 1.

    Raises:
        ValueError: the shapes differ; ``truncate`` is below 1; or a bucket holds NaN or +inf, or nothing but -inf.

    Source: truncated importance sampling, Ionides 2008.
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
    """Effective sample size of each bucket: (sum w)^2 / sum w^2.

    Args:
        weights: ``[E]``, not negative; they need not be normalised.
        bucket_ids: ``[E]`` int64.

    Returns:
        ``[B]`` float64, from 1 to the number of elements.

    Source: Kish 1965.
    """
    num_buckets = count_buckets(bucket_ids)
    total = bucket_sum(weights, bucket_ids, num_buckets)
    return total**2 / bucket_sum(weights.double() ** 2, bucket_ids, num_buckets)


def log_partition(log_weight: Tensor, bucket_ids: Tensor) -> Tensor:
    """Estimate of log Z from each bucket: the logsumexp of its log weights, minus the log of their number.

    Args:
        log_weight: ``[E]``.
        bucket_ids: ``[E]`` int64.

    Returns:
        ``[B]`` float64, in nats.

    Source: guided cost learning, Finn et al. 2016.
    """
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
    expert_groups: Tensor | None = None,
) -> Coefficients:
    """The constants c_t with which sum_t c_t r_t has the gradient of the maximum-entropy inverse-RL loss.

    With N expert sequences and G groups of rollouts:

    * an expert token has c_t = -1/N, whichever group its sequence is in; with ``expert_groups`` it has -1/(G N_g), for
      N_g experts in its group and G groups of experts;
    * a rollout token has c_t = m_b w_e, for its element e in bucket b. The mass m_b depends on the kind of weights. For
      weights of sequences it is 1/G, which averages log Z over the groups; for ``token``, 1/G times the mean length of
      the group's sequences; for ``per_decision``, 1/G times the estimated probability under p that a sequence is alive
      at t.

    ``normalize="token"`` divides each side by the absolute value of its sum. An expert token then has -1 over the
    number of expert tokens, and a rollout token c_t / sum_t' c_t'. So the loss compares mean rewards per token, and a
    constant that is added to every reward changes nothing. With one group, and weights w_j of sequences with rewards
    R_j and lengths T_j, the term of the rollouts is sum_j w_j R_j / sum_j w_j T_j; its denominator is a constant to
    autograd.

    Args:
        weights: ``[E]``, normalised (:func:`self_normalize`), of the rollouts that estimate log Z; smoothed or not.
        log_weights: the log weights from which ``weights`` were computed.
        policy_cu_seqlens: ``[S+1]`` of the rollouts.
        expert_cu_seqlens: ``[S+1]`` of the experts.
        normalize: ``"sequence"`` or ``"token"``.
        expert_groups: ``[S]`` integers, one for each expert; experts of one prompt share an id. The loss is then the
            mean over prompts of log Z(x) - mean_{E(x)} R, if the groups are those of the rollouts. ``None``: all
            experts have one weight.

    Returns:
        :class:`Coefficients`.

    Raises:
        TypeError, ValueError: as :func:`repirl_kernels.packed.check_packed`.
        ValueError: a side has no tokens (without both, the loss has no minimum); ``weights`` is not ``[E]``, or holds
            NaN or an infinite value; ``expert_groups`` is not ``[S]``; ``normalize`` is unknown.

    Sources: maximum-entropy inverse RL, Ziebart et al. 2008; rePIRL, Wu et al., ICML 2026.
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
    if expert_groups is None:
        expert = torch.full((num_expert,), -1.0 / num_experts, dtype=torch.float64, device=weights.device)
    else:
        if expert_groups.shape != (num_experts,):
            raise ValueError(
                f"expert_groups must have one id for each of the {num_experts} experts, got shape "
                f"{tuple(expert_groups.shape)}"
            )
        groups, num_groups = dense_group_ids(expert_groups, expert_cu_seqlens, "prompt")
        share = -1.0 / (num_groups * bucket_sizes(groups, num_groups).double())
        expert = share[groups][sequence_ids(expert_cu_seqlens, num_expert)].to(weights.device)
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
    contested: bool = False,
) -> dict[str, float]:
    """Diagnostics of importance weights and rewards, to be logged during training.

    Args:
        log_weights: of the rollouts.
        weights: ``[E]``, the result of :func:`self_normalize`.
        reward: ``[T]`` of the rollouts.
        cu_seqlens: ``[S+1]`` of the rollouts.
        expert_reward: ``[T]`` of the experts, or ``None``.
        expert_cu_seqlens: ``[S+1]`` of the experts; needed with ``expert_reward``.
        contested: take the mean effective sample size over buckets with more than one element only. In a bucket of one
            its share is 1 whatever the weights are.

    Returns:
        A number for each name:

        * ``ess``: effective sample size, mean over buckets; NaN with ``contested`` if all buckets have one element.
        * ``ess_fraction``: the same, as a fraction of the bucket's elements.
        * ``lone``: the share of buckets with one element; only with ``contested``.
        * ``max_weight``: the largest weight among buckets with more than one element; 1 if there is no such bucket.
        * ``pareto_k``: the largest k_hat of a bucket; NaN if none has enough elements.
        * ``log_z``: :func:`log_partition`, mean over buckets. For ``trajectory`` weights with an exponent of 1 it
          estimates log Z; for others it is only the log of the mean weight.
        * ``alpha``: the exponent, mean over buckets.
        * ``reward_mean``, ``reward_std``: over the tokens of the rollouts.
        * ``reward_length_correlation``: over sequences, experts included, between the sum of rewards and the length;
          0 if one of the two is constant.
        * ``reward_gap``: mean reward of an expert token minus that of a rollout token; only with ``expert_reward``.

    Raises:
        ValueError: ``expert_reward`` comes without ``expert_cu_seqlens``.
    """
    with torch.no_grad():
        bucket_ids = log_weights.bucket_ids
        num_buckets = count_buckets(bucket_ids)
        count = bucket_sizes(bucket_ids, num_buckets)
        ess = effective_sample_size(weights, bucket_ids)
        ess_fraction = ess / count
        alone = count <= 1
        if contested:
            ess, ess_fraction = ess[~alone], ess_fraction[~alone]
        k_hat = pareto_smooth(log_weights.log_weight, bucket_ids)[1]
        k_hat = k_hat[~k_hat.isnan()]
        of_several = weights[~alone[bucket_ids]]
        lengths = cu_seqlens.diff().double()
        sums = segment_sum(reward.double(), cu_seqlens)
        result = {
            "ess": _mean(ess) if ess.numel() or not contested else math.nan,
            "ess_fraction": _mean(ess_fraction) if ess.numel() or not contested else math.nan,
            "max_weight": float(of_several.max()) if of_several.numel() else 1.0,
            "pareto_k": float(k_hat.max()) if k_hat.numel() else math.nan,
            "log_z": _mean(log_partition(log_weights.log_weight, bucket_ids)),
            "alpha": _mean(log_weights.alpha),
            "reward_mean": _mean(reward),
            "reward_std": float(reward.double().std(correction=0)) if reward.numel() else 0.0,
        }
        if contested:
            result["lone"] = _mean(alone)
        if expert_reward is not None:
            if expert_cu_seqlens is None:
                raise ValueError("expert_reward needs expert_cu_seqlens")
            result["reward_gap"] = _mean(expert_reward) - result["reward_mean"]
            sums = torch.cat([sums, segment_sum(expert_reward.double(), expert_cu_seqlens)])
            lengths = torch.cat([lengths, expert_cu_seqlens.diff().double()])
        result["reward_length_correlation"] = _correlation(sums, lengths)
        return result


def _mean(values: Tensor) -> float:
    """The mean as a number; 0 if there are no values."""
    return float(values.double().mean()) if values.numel() else 0.0


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two tensors ``[S]``; 0 if one of them is constant."""
    if x.numel() < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 1e-12 else 0.0
