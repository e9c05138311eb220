"""What all Triton kernels here share: a row's running statistics, their merge, and the gradient's formula.

Statistics run in base 2 on shifted logits. With ``z = s / T`` (``s`` the logit before the temperature), ``m``
the running maximum of ``z`` and ``d = (z - m) log2(e)``, a row carries

    total     sum_v 2^d
    weighted  sum_v 2^d d

Nothing but differences to the maximum is ever summed, so a common offset of the logits costs no accuracy.
A new maximum moves ``d`` by ``shift <= 0``: ``weighted`` becomes ``2^shift (weighted + shift total)``.

Forward and backward round ``z`` alike, as plain PyTorch does: for logits of 1e4 a rounding is 1e-3, and a
probability of 1 would else come back as 0.999. The compiler must therefore not fuse the product into the
difference that follows: kernels are compiled without contraction, fused multiply-adds are written out.
"""

import triton
import triton.language as tl

from . import tiles

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def safe_maximum(maximum):
    """0 in place of -inf: nothing but banned tokens seen so far, and ``-inf - -inf`` would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def rescale(old_maximum, new_maximum, total, weighted):
    """``total`` and ``weighted`` of ``old_maximum``, expressed for ``new_maximum``."""
    # While the old maximum is -inf both sums are 0; the shift -inf would turn them into NaN.
    shift = tl.where(old_maximum == float("-inf"), 0.0, old_maximum - safe_maximum(new_maximum)) * _LOG2_E
    factor = tl.exp2(shift)
    return factor * total, factor * (weighted + shift * total)


@triton.jit
def exponentials(s, inverse_temperature, maximum):
    """``2^d`` and ``2^d d``, where ``0 * -inf`` counts as 0."""
    d = (s * inverse_temperature - safe_maximum(maximum)) * _LOG2_E
    power = tl.exp2(d)
    return power, power * tl.where(power == 0.0, 0.0, d)


@triton.jit
def soft_cap(x, softcap, inverse_softcap):
    """``softcap * tanh(x / softcap)`` and its derivative ``1 - tanh^2``."""
    y = tl.abs(x) * inverse_softcap
    decay = tl.exp(-2.0 * y)
    ratio = decay / (1.0 + decay)
    # 1 - 2 ratio cancels for small y; a polynomial in y^2, fitted to a relative error of 7e-9 on [0, 0.65],
    # does not.
    x_near = tl.minimum(y, 1.0)
    w = x_near * x_near
    near = tl.fma(w, -0.00551516, 0.02046942)
    near = tl.fma(near, w, -0.05368802)
    near = tl.fma(near, w, 0.1333083)
    near = tl.fma(near, w, -0.3333326)
    tanh = tl.where(y < 0.6, tl.fma(x_near, w * near, x_near), tl.fma(ratio, -2.0, 1.0))
    # 1 - tanh^2 cancels where the cap saturates; 4 decay / (1 + decay)^2 is the same and does not.
    slope = 4.0 * ratio * (1.0 - ratio)
    return tl.where(x < 0, -softcap, softcap) * tanh, slope


@triton.jit
def logit_gradient(
    s,
    is_target,
    g_logprob,
    g_logsumexp,
    g_target_logit,
    g_entropy,
    logsumexp,
    mean_logit,
    inverse_temperature,
):
    """``d loss / d z`` of every logit; arguments of one row broadcast over its columns."""
    z = s * inverse_temperature
    probability = tl.exp(z - logsumexp)
    slope = tl.fma(mean_logit - z, g_entropy, g_logsumexp - g_logprob)
    # A banned token has p = 0 and z = -inf: its gradient is 0, not 0 * inf.
    dz = probability * tl.where(probability == 0.0, 0.0, slope)
    return dz + tl.where(is_target, g_target_logit + g_logprob, 0.0)


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def merge_splits_kernel(
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    logprob_ptr,
    logsumexp_ptr,
    target_logit_ptr,
    entropy_ptr,
    mean_logit_ptr,
    num_rows,
    num_splits,
    BLOCK_ROWS: tl.constexpr,
):
    """Merge the splits' partial sums ``[num_splits, N]``, in order, into the five statistics ``[N]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    for split in range(num_splits):
        offsets = rows + split * tl.full((1,), 1, tl.int64) * num_rows
        other_maximum = tl.load(maximum_ptr + offsets, mask=inside, other=0.0)
        other_total = tl.load(total_ptr + offsets, mask=inside, other=1.0)
        other_weighted = tl.load(weighted_ptr + offsets, mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, other_maximum)
        total, weighted = rescale(maximum, new_maximum, total, weighted)
        other_total, other_weighted = rescale(other_maximum, new_maximum, other_total, other_weighted)
        maximum = new_maximum
        total += other_total
        weighted += other_weighted
    z_target = tl.load(target_ptr + rows, mask=inside, other=0.0)
    # A row of nothing but -inf has no distribution.
    log_total = tl.where(maximum == float("-inf"), float("nan"), tl.log(total))
    mean_shifted = tl.div_rn(weighted, total) * _LN_2
    tl.store(logprob_ptr + rows, (z_target - maximum) - log_total, mask=inside)
    # In float64, for the backward pass: what float32 loses at large offsets would be a relative error of p.
    tl.store(logsumexp_ptr + rows, maximum.to(tl.float64) + log_total.to(tl.float64), mask=inside)
    tl.store(target_logit_ptr + rows, z_target, mask=inside)
    tl.store(entropy_ptr + rows, log_total - mean_shifted, mask=inside)
    tl.store(mean_logit_ptr + rows, maximum + mean_shifted, mask=inside)
