"""Functions that the Triton kernels share: running statistics of a row, their merge, and the gradient of a logit.

The statistics are sums of powers of 2, relative to the running maximum. With a logit ``s`` before the temperature, ``z
= s / T``, ``m`` the maximum of ``z`` so far and ``d = (z - m) log2(e)``, each row has

    total     sum_v 2^d
    weighted  sum_v 2^d d

Only differences to the maximum are summed, so a common offset of the logits costs no accuracy. When the maximum rises,
every ``d`` changes by the same ``shift <= 0``: ``total`` becomes ``2^shift total``, and ``weighted`` becomes ``2^shift
(weighted + shift total)``.

Forward and backward pass must round ``z`` in the same way, as plain PyTorch does. For logits of 1e4 the rounding error
is 1e-3; if the passes rounded differently, a probability of 1 could become 0.999 in the backward pass. So the compiler
must not fuse the product ``s * (1 / T)`` with the subtraction after it: the kernels are compiled without contraction,
and fused multiply-adds are written explicitly.
"""

import triton
import triton.language as tl

from . import tiles

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def safe_maximum(maximum):
    """``maximum``, or 0 where it is -inf: with only banned tokens so far, ``-inf - -inf`` would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def rescale(old_maximum, new_maximum, total, weighted):
    """``total`` and ``weighted``, converted from ``old_maximum`` to ``new_maximum``."""
    # While the old maximum is -inf, both sums are 0; a shift of -inf would make them NaN.
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
    # 1 - 2 ratio loses digits to cancellation for small y. The polynomial in y^2 does not: it is fitted on [0, 0.65]
    # with a relative error of 7e-9.
    x_near = tl.minimum(y, 1.0)
    w = x_near * x_near
    near = tl.fma(w, -0.00551516, 0.02046942)
    near = tl.fma(near, w, -0.05368802)
    near = tl.fma(near, w, 0.1333083)
    near = tl.fma(near, w, -0.3333326)
    tanh = tl.where(y < 0.6, tl.fma(x_near, w * near, x_near), tl.fma(ratio, -2.0, 1.0))
    # 1 - tanh^2 loses digits to cancellation where tanh is near 1; the same number as 4 decay / (1 + decay)^2 does not.
    slope = 4.0 * ratio * (1.0 - ratio)
    return tl.where(x < 0, -softcap, softcap) * tanh, slope


@triton.jit
def shifted_sum(s, inverse_temperature, maximum, valid):
    """``d`` of every valid logit, 0 for the others. The mean logit is computed from their sum."""
    return tl.where(valid, (s * inverse_temperature - safe_maximum(maximum)) * _LOG2_E, 0.0)


@triton.jit
def move_sum(old_maximum, new_maximum, shifted, num_columns):
    """``shifted``, a sum of ``num_columns`` values ``d``, converted from ``old_maximum`` to ``new_maximum``."""
    shift = tl.where(old_maximum == float("-inf"), 0.0, old_maximum - safe_maximum(new_maximum)) * _LOG2_E
    return shifted + shift * num_columns


@triton.jit
def logit_gradient(
    s,
    is_target,
    mass,
    onehot,
    slope,
    logsumexp,
    mean_logit,
    inverse_temperature,
    ENTROPY: tl.constexpr,
):
    """``d loss / d z`` of every logit, without ``uniform``; a row's arguments broadcast over its columns."""
    z = s * inverse_temperature
    probability = tl.exp(z - logsumexp)
    dz = probability * mass
    if ENTROPY:
        factor = tl.fma(mean_logit - z, slope, mass)
        # A banned token has p = 0 and z = -inf: its gradient is 0, not 0 * inf.
        dz = probability * tl.where(probability == 0.0, 0.0, factor)
    return dz + tl.where(is_target, onehot, 0.0)


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def merge_splits_kernel(
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    shifted_ptr,
    argmax_ptr,
    logprob_ptr,
    logsumexp_ptr,
    target_logit_ptr,
    entropy_ptr,
    mean_logprob_ptr,
    best_column_ptr,
    max_logit_ptr,
    num_rows,
    num_splits,
    vocab_size,
    split_columns,
    EXTRAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Merge the splits' partial sums ``[num_splits, N]``, in order, into the statistics ``[N]``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    shifted = tl.zeros((BLOCK_ROWS,), tl.float32)
    best_column = tl.full((BLOCK_ROWS,), -1, tl.int32)
    for split in range(num_splits):
        offsets = rows + split * tl.full((1,), 1, tl.int64) * num_rows
        other_maximum = tl.load(maximum_ptr + offsets, mask=inside, other=0.0)
        other_total = tl.load(total_ptr + offsets, mask=inside, other=1.0)
        other_weighted = tl.load(weighted_ptr + offsets, mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, other_maximum)
        total, weighted = rescale(maximum, new_maximum, total, weighted)
        other_total, other_weighted = rescale(other_maximum, new_maximum, other_total, other_weighted)
        if EXTRAS:
            first = split * split_columns
            other_shifted = tl.load(shifted_ptr + offsets, mask=inside, other=0.0)
            num_columns = tl.minimum(split_columns, vocab_size - first)
            shifted = move_sum(maximum, new_maximum, shifted, first)
            shifted += move_sum(other_maximum, new_maximum, other_shifted, num_columns)
            column = tl.load(argmax_ptr + offsets, mask=inside, other=0)
            best_column = tl.where(other_maximum > maximum, column, best_column)
        maximum = new_maximum
        total += other_total
        weighted += other_weighted
    z_target = tl.load(target_ptr + rows, mask=inside, other=0.0)
    # A row in which all logits are -inf has no distribution.
    log_total = tl.where(maximum == float("-inf"), float("nan"), tl.log(total))
    mean_shifted = tl.div_rn(weighted, total) * _LN_2
    tl.store(logprob_ptr + rows, (z_target - maximum) - log_total, mask=inside)
    # In float64 for the backward pass: with a large offset of the logits, rounding it to float32 would be a large
    # relative error of every probability.
    tl.store(logsumexp_ptr + rows, maximum.to(tl.float64) + log_total.to(tl.float64), mask=inside)
    tl.store(target_logit_ptr + rows, z_target, mask=inside)
    tl.store(entropy_ptr + rows, log_total - mean_shifted, mask=inside)
    if EXTRAS:
        mean_logprob = tl.div_rn(shifted, tl.zeros_like(shifted) + vocab_size) * _LN_2 - log_total
        tl.store(mean_logprob_ptr + rows, mean_logprob, mask=inside)
        tl.store(best_column_ptr + rows, best_column.to(tl.int64), mask=inside)
        tl.store(max_logit_ptr + rows, maximum, mask=inside)
