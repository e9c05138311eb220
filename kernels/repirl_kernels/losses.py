"""Rewards and losses as pure functions of per-token statistics, packed end to end.

Axes: T tokens (response tokens only) of S sequences, see `packed`. Losses are per token. They are added up with weights
that are normalised over the whole batch, so the gradient does not depend on how the batch is divided or packed.

Sources: rePIRL, Wu et al., ICML 2026; maximum-entropy IRL, Ziebart et al. 2008; guided cost learning, Finn et
al. 2016; PPO, Schulman et al. 2017; inverse soft-Q learning, Garg et al. 2021; implicit rewards, Rafailov et
al. 2023 and Cui et al. 2025.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from repirl_kernels.importance import irl_coefficients, log_importance_weights, log_partition, self_normalize
from repirl_kernels.packed import bucket_sum, check_choice, check_finite, check_number, check_packed, sequence_ids
from repirl_kernels.pareto import pareto_smooth

REWARD_KINDS = ("value", "logit", "soft_q", "logprob", "implicit")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
KL_ESTIMATORS = ("k1", "k2", "k3")
SMOOTHINGS = ("none", "psis")
RATIOS = ("token", "sequence")
FORMS = ("clip", "cispo")

# Its exponential is finite in float32. A token whose ratio is larger than e^20 gets no gradient.
_MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """What :func:`policy_loss` returns: tensors [T], of which only ``loss`` is differentiable."""

    loss: Tensor
    ratio: Tensor
    """pi_theta / pi_old, of the token or of its sequence."""
    clipped: Tensor
    """bool: whether the clip removed the gradient; in the form "cispo", whether it changed the ratio."""
    kl: Tensor
    """The estimate of the KL divergence to the reference, in nats; 0 without a reference."""
    sampler_ratio: Tensor
    """pi_old / mu after truncation; 1 if the correction is off."""
    truncated: Tensor
    """bool: whether pi_old / mu was truncated."""


def token_rewards(
    kind: str,
    *,
    value: Tensor | None = None,
    logprob: Tensor | None = None,
    logsumexp: Tensor | None = None,
    target_logit: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """The reward r_t of every token, computed from a PRM's outputs.

    | kind       | r_t                                              | needs                               |
    |------------|--------------------------------------------------|-------------------------------------|
    | `value`    | value_t                                          | value                               |
    | `logit`    | target_logit_t                                   | target_logit                        |
    | `soft_q`   | target_logit_t - gamma logsumexp_{t+1} (end: 0)  | target_logit, logsumexp, cu_seqlens |
    | `logprob`  | logprob_t                                        | logprob                             |
    | `implicit` | beta (logprob_t - ref_logprob_t)                 | logprob, ref_logprob                |

    Args:
        kind: the definition of the reward, a row of the table.
        value: [T], the output of a value head.
        logprob: [T], log pi of the token under the PRM, in nats.
        logsumexp: [T], log of the sum of the exponentials of all logits.
        target_logit: [T], the token's logit.
        ref_logprob: [T], log pi of the token under the PRM's reference.
        cu_seqlens: [S + 1], where each sequence begins, and where the last one ends.
        gamma: the discount of `soft_q`, in [0, 1].
        beta: the factor of `implicit`.

    Returns:
        [T], differentiable with respect to the inputs. NaN and infinities in the inputs stay in the result.
        `log_importance_weights` later refuses NaN and +inf, and accepts -inf.

    Raises:
        ValueError: the kind is unknown, an input is missing, or gamma or beta is out of range.

    Source: soft_q, Garg et al. 2021; implicit, Rafailov et al. 2023 and Cui et al. 2025.
    """
    check_choice("kind", kind, REWARD_KINDS)
    check_number("beta", beta)
    if kind == "value":
        return _needed(kind, "value", value)
    if kind == "logit":
        return _needed(kind, "target_logit", target_logit)
    if kind == "logprob":
        return _needed(kind, "logprob", logprob)
    if kind == "implicit":
        return beta * (_needed(kind, "logprob", logprob) - _needed(kind, "ref_logprob", ref_logprob).detach())
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")
    target_logit = _needed(kind, "target_logit", target_logit)
    logsumexp = _needed(kind, "logsumexp", logsumexp)
    cu_seqlens = _needed(kind, "cu_seqlens", cu_seqlens)
    check_packed(cu_seqlens, target_logit=target_logit, logsumexp=logsumexp)
    if logsumexp.numel() == 0:
        return target_logit
    ids = sequence_ids(cu_seqlens, logsumexp.numel())
    has_next = torch.cat([ids[1:] == ids[:-1], torch.zeros_like(ids[:1], dtype=torch.bool)])
    following = torch.cat([logsumexp[1:], logsumexp[:1]])
    return target_logit - gamma * torch.where(has_next, following, 0.0)


def _needed(kind: str, name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"rewards of kind {kind!r} need {name}, got None")
    return tensor


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    entropy: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    row_mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampler_ratio_cap: float | None = None,
    entropy_coefficient: float = 0.0,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    clip_dual: float | None = None,
    form: str = "clip",
    ratio: str = "token",
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss of every token, [T].

        loss_t = - min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) min(pi_old / mu, cap)
                 - entropy_coefficient H_t + kl_coefficient KL_t

    The first factor is PPO's clipped objective with ratio = pi / pi_old. The factor min(pi_old / mu, cap) corrects for
    the mismatch between the trainer's log-probabilities before the update and those of the engine that sampled.

    Other first factors:

    - `clip_dual` c (Ye et al. 2020): where A < 0 it is max(min(...), c A), so that the loss is at most -c A.
    - `form` "cispo" (MiniMax 2025): clip(ratio, 1 - clip_low, 1 + clip_high) A logprob, with the clipped ratio constant
      to autograd. No token loses its gradient. clip_low 1 leaves out the lower bound.
    - `ratio` "sequence" (GSPO, Zheng et al. 2025): the ratio of each token is exp(mean over the sequence of
      log pi - log pi_old). In the form "clip" the gradient of a token is that ratio times A times its own grad logprob,
      so that the loss, averaged within sequences, has the gradient of the sequence's ratio times A.

    KL_t estimates KL(pi || pi_ref) from d = logprob - ref_logprob: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d.
    The derivative of k1 itself has mean zero under pi and as a loss would have no effect, so k1 gets the score-function
    gradient d * grad logprob, which is also the gradient of k2. On policy, these are unbiased for the gradient of
    KL(pi || pi_ref), and the gradient of k3 is unbiased for that of KL(pi_ref || pi).

    Args:
        logprob: [T], log pi under the trained policy. If it is NaN or infinite, so is the loss; trainers see by this
            that the update must be skipped.
        old_logprob: [T], log pi_old: the trainer's log-probabilities before the update.
        advantage: [T], A.
        entropy: [T], H under the trained policy, in nats.
        sampler_logprob: [T], log mu, as the engine reported it. Some engines report NaN for tokens of probability near
            1; replace NaN by old_logprob.
        ref_logprob: [T], log pi_ref.
        row_mask: [T] bool. Where it is False the inputs may hold any values, the loss is 0 without a gradient, and
            ratio and sampler_ratio are 1.
        clip_low: how far below 1 the ratio may go, in [0, 1].
        clip_high: how far above 1 the ratio may go.
        sampler_ratio_cap: the largest pi_old / mu; None leaves the factor out.
        entropy_coefficient: weight of the entropy.
        kl_coefficient: weight of the KL term.
        kl_estimator: "k1", "k2" or "k3".
        clip_dual: c, larger than 1; None leaves it out.
        form: "clip" or "cispo".
        ratio: "token" or "sequence".
        cu_seqlens: [S + 1], where each sequence begins, and where the last one ends; for the ratio of sequences only.
            All tokens of a sequence must be here.

    Returns:
        :class:`PolicyLoss`. Gradients flow only through logprob and entropy.

    Raises:
        ValueError: shapes differ, an option is out of range, a term is on but its input is missing, or old_logprob,
            advantage, ref_logprob or (with a cap) sampler_logprob is not finite where row_mask is True. Values are not
            checked under `torch.compile`, under `torch.func`, or while a CUDA graph is captured: they cannot be read.

    Source: PPO, Schulman et al. 2017.
    """
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_choice("form", form, FORMS)
    check_choice("ratio", ratio, RATIOS)
    if clip_dual is not None and not 1.0 < clip_dual < math.inf:
        raise ValueError(f"clip_dual must be larger than 1 and finite, or None for no such bound; got {clip_dual!r}")
    if clip_dual is not None and form == "cispo":
        raise ValueError(f"clip_dual is {clip_dual!r}, but the form 'cispo' is not bounded by it")
    inputs = {"old_logprob": old_logprob, "advantage": advantage, "entropy": entropy}
    inputs |= {"sampler_logprob": sampler_logprob, "ref_logprob": ref_logprob, "row_mask": row_mask}
    for name, tensor in inputs.items():
        if tensor is not None and tensor.shape != logprob.shape:
            raise ValueError(f"{name} must have logprob's shape {tuple(logprob.shape)}, got {tuple(tensor.shape)}")
    if not 0.0 <= clip_low <= 1.0:
        raise ValueError(f"clip_low must lie in [0, 1], got {clip_low!r}")
    if not clip_high >= 0.0:
        raise ValueError(f"clip_high must be at least 0, got {clip_high!r}")
    if sampler_ratio_cap is not None and not sampler_ratio_cap > 0.0:
        raise ValueError(f"sampler_ratio_cap must be positive, or None for no correction; got {sampler_ratio_cap!r}")
    check_number("entropy_coefficient", entropy_coefficient)
    check_number("kl_coefficient", kl_coefficient)
    if row_mask is not None and row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be bool, got {row_mask.dtype}")

    advantage = advantage.detach().to(logprob.dtype)
    check_finite(
        row_mask,
        old_logprob=old_logprob,
        advantage=advantage,
        sampler_logprob=None if sampler_ratio_cap is None else sampler_logprob,
        ref_logprob=ref_logprob,
    )
    if row_mask is not None:
        logprob, old_logprob, advantage = (
            torch.where(row_mask, values, 0.0) for values in (logprob, old_logprob, advantage)
        )
        entropy, sampler_logprob, ref_logprob = (
            None if values is None else torch.where(row_mask, values, 0.0)
            for values in (entropy, sampler_logprob, ref_logprob)
        )
    log_ratio = logprob - old_logprob.detach()
    if ratio == "sequence":
        log_ratio = _sequence_log_ratio(log_ratio, cu_seqlens, row_mask)
    ratios = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    bounded = ratios.clamp(1.0 - clip_low, 1.0 + clip_high)
    if form == "cispo":
        clipped = (bounded != ratios).detach()
        loss = -bounded.detach() * advantage * logprob
    else:
        gain = torch.minimum(bounded * advantage, ratios * advantage)
        if clip_dual is not None:
            gain = torch.where(advantage < 0, torch.maximum(gain, clip_dual * advantage), gain)
        # Not "!=": a NaN is not clipped, so that it reaches the gradient.
        clipped = ((gain < ratios * advantage) | (gain > ratios * advantage)).detach()
        loss = -torch.where(clipped, gain.detach(), ratios * advantage)

    sampler_ratio = torch.ones_like(ratios).detach()
    truncated = torch.zeros_like(clipped)
    if sampler_ratio_cap is not None:
        if sampler_logprob is None:
            raise ValueError(f"sampler_ratio_cap is {sampler_ratio_cap!r} but sampler_logprob is None")
        mismatch = (old_logprob - sampler_logprob).detach().clamp(max=_MAX_LOG_RATIO).exp()
        truncated = mismatch > sampler_ratio_cap
        sampler_ratio = mismatch.clamp(max=sampler_ratio_cap)
        loss = loss * sampler_ratio
    if entropy_coefficient != 0.0:
        if entropy is None:
            raise ValueError(f"entropy_coefficient is {entropy_coefficient!r} but entropy is None")
        loss = loss - entropy_coefficient * entropy
    kl = torch.zeros_like(ratios).detach()
    if ref_logprob is not None:
        kl_term = _kl(logprob, ref_logprob.detach(), kl_estimator)
        kl = kl_term.detach()
        if kl_coefficient != 0.0:
            loss = loss + kl_coefficient * kl_term
    elif kl_coefficient != 0.0:
        raise ValueError(f"kl_coefficient is {kl_coefficient!r} but ref_logprob is None")
    return PolicyLoss(loss, ratios.detach(), clipped, kl, sampler_ratio, truncated)


def _sequence_log_ratio(log_ratio: Tensor, cu_seqlens: Tensor | None, row_mask: Tensor | None) -> Tensor:
    """The mean of the log-ratios [T] over each sequence, at each token, with the gradient of the token's own.

    Tokens without `row_mask` have a log-ratio of 0 and do not count.
    """
    if cu_seqlens is None:
        raise ValueError("ratio 'sequence' needs cu_seqlens, got None")
    if not torch.compiler.is_compiling():
        check_packed(cu_seqlens, logprob=log_ratio)
    ids = sequence_ids(cu_seqlens, log_ratio.numel())
    counts = torch.ones_like(ids) if row_mask is None else row_mask.long()
    num_sequences = cu_seqlens.numel() - 1
    size = bucket_sum(counts, ids, num_sequences).clamp(min=1)
    mean = (bucket_sum(log_ratio.detach(), ids, num_sequences) / size)[ids].to(log_ratio.dtype)
    mean = torch.where(counts > 0, mean, 0.0)
    return mean + (log_ratio - log_ratio.detach())


def _kl(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    difference = logprob - ref_logprob
    if estimator == "k1":
        score = difference**2 / 2
        return difference.detach() + score - score.detach()
    if estimator == "k2":
        return difference**2 / 2
    return torch.exp((-difference).clamp(max=_MAX_LOG_RATIO)) - 1 + difference


def aggregate_weights(
    cu_seqlens: Tensor,
    aggregation: str = "token_mean",
    *,
    constant_length: int | None = None,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
) -> Tensor:
    """The weights with which token losses are added up: the loss of the batch is `(weights * loss).sum()`.

    | aggregation       | weight of a token in sequence i          |
    |-------------------|------------------------------------------|
    | `token_mean`      | 1 / num_tokens                           |
    | `sequence_mean`   | 1 / (num_sequences T_i), T_i its length  |
    | `constant_length` | 1 / (num_sequences constant_length)      |

    Args:
        cu_seqlens: [S + 1], where each sequence begins, and where the last one ends.
        aggregation: a row of the table.
        constant_length: a number of tokens, for `constant_length` only.
        num_tokens: the number of tokens in the whole batch; None for those of these sequences.
        num_sequences: the number of sequences in the whole batch; None for these, with empty ones.

    Returns:
        [T] float32.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_packed(cu_seqlens)
    lengths = cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    num_tokens = total if num_tokens is None else num_tokens
    num_sequences = lengths.numel() if num_sequences is None else num_sequences
    if num_tokens < total or num_sequences < lengths.numel():
        raise ValueError(
            f"num_tokens and num_sequences count the whole batch: at least {total} and {lengths.numel()} "
            f"here, got {num_tokens} and {num_sequences}"
        )
    if aggregation == "constant_length" and (constant_length is None or constant_length < 1):
        raise ValueError(f"aggregation 'constant_length' needs constant_length >= 1, got {constant_length!r}")
    if aggregation == "sequence_mean":
        each = 1.0 / (num_sequences * lengths.clamp(min=1).double())
        return each.repeat_interleave(lengths).float()
    denominator = num_tokens if aggregation == "token_mean" else num_sequences * (constant_length or 1)
    return torch.full((total,), 1.0 / max(denominator, 1), dtype=torch.float32, device=cu_seqlens.device)


def irl_token_loss(
    reward: Tensor, coefficient: Tensor, *, reward_l2: float = 0.0, num_tokens: int | None = None
) -> Tensor:
    """The second pass of the IRL gradient: c_t r_t + reward_l2 r_t^2 / num_tokens for every token.

    The derivative of the sum of these terms is the gradient of the maximum-entropy IRL loss.

    Args:
        reward: [T], r_t. If it is NaN or infinite, so is the loss.
        coefficient: [T], c_t from `importance.irl_coefficients`.
        reward_l2: weight of the mean squared reward.
        num_tokens: the number of tokens in the whole batch, experts and rollouts together.

    Returns:
        [T], differentiable with respect to `reward`.

    Raises:
        ValueError: shapes differ, or a coefficient is NaN or infinite.
    """
    if coefficient.shape != reward.shape:
        raise ValueError(f"coefficient must have reward's shape {tuple(reward.shape)}, got {tuple(coefficient.shape)}")
    check_number("reward_l2", reward_l2)
    check_finite(coefficient=coefficient)
    loss = coefficient.detach().to(reward.dtype) * reward
    if reward_l2 != 0.0:
        if num_tokens is None or num_tokens < 1:
            raise ValueError(f"reward_l2 needs num_tokens >= 1, the whole batch's; got {num_tokens!r}")
        loss = loss + (reward_l2 / num_tokens) * reward**2
    return loss


def irl_loss(
    expert_reward: Tensor,
    expert_cu_seqlens: Tensor,
    policy_reward: Tensor,
    sampler_logprob: Tensor,
    policy_cu_seqlens: Tensor,
    *,
    group_ids: Tensor | None = None,
    base_logprob: Tensor | None = None,
    kind: str = "trajectory",
    temper: float = 1.0,
    target_ess: float | None = None,
    group_by: str = "prompt",
    smooth: str = "none",
    truncate: float | None = None,
    normalize: str = "sequence",
    reward_l2: float = 0.0,
) -> Tensor:
    """The maximum-entropy IRL loss in one pass. It defines what the gradient of the two passes must be.

        loss = - mean_{expert} R + mean_groups log Z,     log Z = (logsumexp_j alpha log w_j - log M) / alpha
               + reward_l2 mean_t r_t^2

    expert_reward is [T of the experts]; policy_reward, sampler_logprob and base_logprob are [T of the rollouts];
    group_ids is [S] of the rollouts. Options are those of `log_importance_weights`, `self_normalize` (truncate),
    `pareto_smooth` (smooth "psis") and `irl_coefficients` (normalize; autograd takes its denominators as constants).

    For weights of kind `trajectory` and `token` this is an ordinary loss. (For `token`, log Z is that of tokens, times
    the number of tokens per sequence.) Weights of other kinds, and weights that are smoothed or truncated, approximate
    the gradient of log Z, not log Z. For them sum_t c_t r_t with constant c takes the place of log Z.

    Returns:
        A differentiable scalar.
    """
    check_choice("smooth", smooth, SMOOTHINGS)
    log_weights = log_importance_weights(
        policy_reward,
        sampler_logprob,
        policy_cu_seqlens,
        group_ids=group_ids,
        kind=kind,
        base_logprob=base_logprob,
        temper=temper,
        target_ess=target_ess,
        group_by=group_by,
    )
    check_packed(expert_cu_seqlens, expert_reward=expert_reward)
    shaped = log_weights.log_weight.detach()
    if smooth == "psis":
        shaped = pareto_smooth(shaped, log_weights.bucket_ids)[0]
    weights = self_normalize(shaped, log_weights.bucket_ids, truncate=truncate)
    coefficients = irl_coefficients(weights, log_weights, policy_cu_seqlens, expert_cu_seqlens, normalize=normalize)
    expert_term = (coefficients.expert * expert_reward.double()).sum()
    if kind in ("trajectory", "token") and smooth == "none" and truncate is None:
        log_z = log_partition(log_weights.log_weight, log_weights.bucket_ids) / log_weights.alpha
        policy_term = (log_weights.mass * log_z).sum()
        if normalize == "token":
            unnormalized = irl_coefficients(weights, log_weights, policy_cu_seqlens, expert_cu_seqlens)
            policy_term = policy_term / unnormalized.policy.sum()
    else:
        policy_term = (coefficients.policy * policy_reward.double()).sum()
    loss = expert_term + policy_term
    if reward_l2 != 0.0:
        rewards = torch.cat([expert_reward.double(), policy_reward.double()])
        loss = loss + reward_l2 * (rewards**2).mean()
    if not math.isfinite(float(loss.detach())):
        raise ValueError(f"the inverse-RL loss is {float(loss.detach())}; rewards must be finite")
    return loss.to(torch.promote_types(expert_reward.dtype, policy_reward.dtype))
