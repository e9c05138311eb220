"""What every operator does with rows around a backend: which ones count, what their statistics and gradients keep.

A backend sees only rows that matter. Rows are removed before a product and put back after it, never zeroed and
multiplied: a NaN in a row that does not count must not reach a gradient.

Axes: N rows (tokens).
"""

import torch
from torch import Tensor

from repirl_kernels.reference import statistics_dtype


def kept_rows(targets: Tensor, row_mask: Tensor | None, ignore_index: int) -> Tensor:
    keep = targets != ignore_index
    return keep if row_mask is None else keep & row_mask


def row_indices(keep: Tensor) -> Tensor | None:
    """Indices of the rows to keep; ``None`` if that is all of them, so that nothing needs to be copied."""
    rows = keep.nonzero().squeeze(-1)
    return None if rows.shape[0] == keep.shape[0] else rows


def take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    if rows is not None:
        return tensor.index_select(0, rows)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def put(values: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    if rows is None:
        return values
    result = values.new_zeros((num_rows, *values.shape[1:]))
    return result.index_copy_(0, rows, values)


def check_target_values(targets: Tensor, keep: Tensor, vocab_size: int) -> None:
    out_of_range = keep & ((targets < 0) | (targets >= vocab_size))
    if out_of_range.any():
        row = int(out_of_range.nonzero()[0])
        raise ValueError(
            f"target {int(targets[row])} in row {row} is outside [0, {vocab_size}); "
            "give rows that do not count the ignore_index, or mask them with row_mask"
        )


def split_logsumexp(logprob: Tensor, logsumexp: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
    """``logsumexp`` in the dtype of the statistics, and what that rounding lost.

    A backend may return logsumexp in float64, which has what float32 loses up to offsets of 1e8. Else
    ``target_logit`` and ``logprob`` know it better than its own rounded value: ``L = z_a - log p_a``, where
    log p_a has no large terms. But for an improbable target log p_a is itself large, and its rounding no
    better than that of L.
    """
    rounded = logsumexp.to(logprob.dtype)
    limit = 1e8 if logsumexp.dtype == torch.float64 else 0.0
    by_target = (logprob.abs() < rounded.abs().clamp(max=64.0)) & (rounded.abs() > limit)
    lost = (logsumexp - rounded).to(logprob.dtype)
    return rounded, torch.where(by_target, (target_logit - rounded) - logprob, lost)


def fold_upstream(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upstream gradients ``(g_logsumexp, g_target_logit, g_entropy)`` that mean all four, and ``mean_logit``.

    A backend computes ``p_v = exp(z_v - L)`` and ``z_v - b`` from L and b as rounded to the statistics'
    dtype. With logits around 1e4 that rounding is 5e-4, and so would be the gradient's relative error. But
    what the rounded L and b lack is the same for a whole row, so it is put into the row's coefficients:

        p_v (g_L - g_p - g_H (z_v - b)) = p'_v ((g_L - g_p + g_H b_low) r - g_H r (z_v - b')),
        p'_v = exp(z_v - L'),  r = exp(-L_low),  L = L' + L_low,  b = b' + b_low
    """
    mean_logit = logsumexp - entropy
    mean_logit_low = ((logsumexp - mean_logit) - entropy) + logsumexp_low
    scale = torch.exp(-logsumexp_low)
    return (
        (g_logsumexp - g_logprob + g_entropy * mean_logit_low) * scale,
        g_target_logit + g_logprob,
        g_entropy * scale,
        mean_logit,
    )


def skip_below(mass: Tensor, onehot: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N]``: below this, a gradient of a logit counts as negligible in its row."""
    return torch.finfo(dtype).eps / 32 * torch.stack([mass, onehot, slope]).abs().amax(dim=0)


def empty_stats(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(rows.dtype)
    logprob, logsumexp, target_logit, entropy, logsumexp_low = (
        torch.zeros(rows.shape[0], dtype=dtype, device=rows.device) for _ in range(5)
    )
    return logprob, logsumexp, target_logit, entropy, logsumexp_low


def live_rows(upstream: tuple[Tensor, ...], keep: Tensor) -> Tensor:
    live = torch.zeros_like(keep)
    for gradient in upstream:
        live |= gradient != 0  # NaN != 0: a poisoned gradient is passed on, not hidden
    return live & keep


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def refuse_double_backward(ctx, *gradients) -> None:  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "repirl_kernels: token statistics have first gradients only; a gradient of a gradient "
        "(create_graph=True) is not implemented. Compute it from plain PyTorch logits instead."
    )


def no_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Double backward is refused, so nothing is kept for it."""


def put_stats(
    logprob: Tensor, logsumexp: Tensor, target_logit: Tensor, entropy: Tensor, rows: Tensor | None, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four statistics and what :func:`split_logsumexp` says that logsumexp lost, each put back to ``[N]``."""
    logsumexp, logsumexp_low = split_logsumexp(logprob, logsumexp, target_logit)
    return (
        put(logprob, rows, num_rows),
        put(logsumexp, rows, num_rows),
        put(target_logit, rows, num_rows),
        put(entropy, rows, num_rows),
        put(logsumexp_low, rows, num_rows),
    )


def gradients_or_empty(
    hidden: Tensor, weight: Tensor, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """An empty tensor for a gradient that is not needed: operators return no ``None``."""
    return (
        hidden.new_empty(0) if dhidden is None else dhidden,
        weight.new_empty(0) if dweight is None else dweight,
        hidden.new_empty(0) if dbias is None else dbias,
    )


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward operator returns, in shape and dtype."""
    return gradients_or_empty(
        hidden,
        weight,
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None,
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None,
        None if bias is None or not need_bias else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device),
    )


def compact(logits: Tensor, rows: Tensor) -> None:
    """Move ``rows``, in ascending order, to the front, a few at a time: a row is never overwritten before its turn."""
    first = 0
    for some in rows.split(64):
        logits[first : first + some.shape[0]] = logits[some]
        first += some.shape[0]
