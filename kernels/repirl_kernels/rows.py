"""Code around the backends: it selects the rows that count, and prepares their statistics and gradients.

A backend gets only the rows that count. The others are removed before a product, and put back after it. They must not
be set to zero and multiplied: a NaN in an ignored row would otherwise reach a gradient.

Axes: N rows (tokens).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repirl_kernels.operands import LARGEST_SCALE, SMALLEST_SCALE, statistics_dtype
from repirl_kernels.reference import ForwardResult, RowGradients

# Upstream: the upstream gradients of logprob, logsumexp, target_logit and entropy. SavedStats: logsumexp, entropy, and
# the rounding error of logsumexp. Without entropy, both have ``None`` in its place.
Upstream = tuple[Tensor, Tensor, Tensor, Tensor | None]
SavedStats = tuple[Tensor, Tensor | None, Tensor]
# The argmax of a row that has no argmax.
NO_COLUMN = -1


def kept_rows(targets: Tensor, row_mask: Tensor | None, ignore_index: int) -> Tensor:
    keep = targets != ignore_index
    return keep if row_mask is None else keep & row_mask


def row_indices(keep: Tensor) -> Tensor | None:
    """Indices of the rows to keep; ``None`` for all rows, so that nothing has to be copied."""
    rows = keep.nonzero().squeeze(-1)
    return None if rows.shape[0] == keep.shape[0] else rows


def take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    if rows is not None:
        return tensor.index_select(0, rows)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def take_some(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return None if tensor is None else take(tensor, rows)


def take_live(upstream: Upstream, stats: SavedStats, rows: Tensor | None) -> tuple[Upstream, SavedStats]:
    """The upstream gradients and statistics of ``rows``."""
    g_logprob, g_logsumexp, g_target_logit, g_entropy = upstream
    logsumexp, entropy, logsumexp_low = stats
    return (
        (take(g_logprob, rows), take(g_logsumexp, rows), take(g_target_logit, rows), take_some(g_entropy, rows)),
        (take(logsumexp, rows), take_some(entropy, rows), take(logsumexp_low, rows)),
    )


def upstream_of(gradients: tuple[Tensor, ...], with_entropy: bool) -> Upstream:
    """The gradients of the four statistics; ``None`` if the entropy was not computed."""
    g_logprob, g_logsumexp, g_target_logit, g_entropy = (gradient.contiguous() for gradient in gradients[:4])
    return g_logprob, g_logsumexp, g_target_logit, g_entropy if with_entropy else None


def replace_stats(stats: SavedStats, fresh: "RowStats", where: Tensor) -> SavedStats:
    """``stats``, with some rows replaced by those of ``fresh``."""
    logsumexp, entropy, logsumexp_low = stats
    return (
        torch.where(where, fresh.logsumexp, logsumexp),
        None if entropy is None else torch.where(where, fresh.entropy, entropy),
        torch.where(where, fresh.logsumexp_low, logsumexp_low),
    )


def put(values: Tensor, rows: Tensor | None, num_rows: int, fill: int = 0) -> Tensor:
    if rows is None:
        return values
    result = values.new_full((num_rows, *values.shape[1:]), fill)
    return result.index_copy_(0, rows, values)


def check_rows(targets: Tensor, row_temperature: Tensor | None, keep: Tensor, vocab_size: int) -> None:
    """ValueError for a target outside the vocabulary or a temperature out of range, in rows that count."""
    out_of_range = keep & ((targets < 0) | (targets >= vocab_size))
    if out_of_range.any():
        row = int(out_of_range.nonzero()[0])
        raise ValueError(
            f"target {int(targets[row])} in row {row} is outside [0, {vocab_size}); "
            "give rows that do not count the ignore_index, or mask them with row_mask"
        )
    if row_temperature is None:
        return
    lowest, highest = SMALLEST_SCALE, LARGEST_SCALE
    if row_temperature.dtype == torch.float64:
        lowest, highest = torch.finfo(torch.float64).tiny, torch.finfo(torch.float64).max
    wrong = keep & ~((row_temperature >= lowest) & (row_temperature <= highest))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"temperature {float(row_temperature[row])} in row {row} is outside [{lowest:.3g}, {highest:.3g}]"
        )


def split_logsumexp(logprob: Tensor, logsumexp: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
    """``logsumexp`` in the dtype of the statistics, and the error of rounding it to this dtype.

    If a backend returns logsumexp in float64, the error is computed from that; this works for offsets up to 1e8. Else
    ``L = z_a - log p_a`` gives a more exact value, because log p_a has no large terms. But if the target is improbable,
    log p_a is itself large, and its rounding error is as large as that of L.
    """
    rounded = logsumexp.to(logprob.dtype)
    limit = 1e8 if logsumexp.dtype == torch.float64 else 0.0
    by_target = (logprob.abs() < rounded.abs().clamp(max=64.0)) & (rounded.abs() > limit)
    lost = (logsumexp - rounded).to(logprob.dtype)
    return rounded, torch.where(by_target, (target_logit - rounded) - logprob, lost)


def are_saturated(logsumexp: Tensor, entropy: Tensor | None) -> Tensor:
    """Rows whose gradient is wrong if the backward pass rounds their logits differently from the forward pass.

    If a probability p is nearly 1, the gradient is 1 - p, which is tiny, but the last bit of a logit of 3200 changes
    the computed p by 2e-4. The backward pass has fewer rows, and torch may then sum a product in another order.
    """
    large = logsumexp.abs() > 64
    return large if entropy is None else large & (entropy < 1)


def fold_upstream(upstream: Upstream, stats: SavedStats, label_smoothing: float, vocab_size: int) -> RowGradients:
    """Combine the four upstream gradients of each row into the coefficients that a backend needs.

    A backend computes ``p_v = exp(z_v - L)`` and ``z_v - b`` from L and b as rounded to the statistics'
    dtype. With logits around 1e4 the rounding error is 5e-4, and the relative error of the gradient would be the
    same. But the rounding errors of L and b are the same in a whole row, so the row's coefficients correct them:

        p_v (g_L - g_p - g_H (z_v - b)) = p'_v ((g_L - g_p + g_H b_low) r - g_H r (z_v - b')),
        p'_v = exp(z_v - L'),  r = exp(-L_low),  L = L' + L_low,  b = b' + b_low
    """
    g_logprob, g_logsumexp, g_target_logit, g_entropy = upstream
    logsumexp, entropy, logsumexp_low = stats
    scale = torch.exp(-logsumexp_low)
    mass, slope, mean_logit = g_logsumexp - g_logprob, None, logsumexp
    if g_entropy is not None and entropy is not None:
        mean_logit = logsumexp - entropy
        mean_logit_low = ((logsumexp - mean_logit) - entropy) + logsumexp_low
        mass = mass + g_entropy * mean_logit_low
        slope = g_entropy * scale
    of_target = g_target_logit + g_logprob
    uniform = None
    if label_smoothing:
        uniform = of_target * (label_smoothing / vocab_size)
        of_target = of_target * (1 - label_smoothing)
    return RowGradients(mass * scale, of_target, slope, uniform, logsumexp, mean_logit)


def skip_below(gradients: RowGradients, dtype: torch.dtype) -> Tensor:
    """``[N]``: a gradient of a logit smaller than this is negligible in its row."""
    sizes = [x.abs() for x in (gradients.mass, gradients.onehot, gradients.slope) if x is not None]
    return torch.finfo(dtype).eps / 32 * torch.stack(sizes).amax(dim=0)


class RowStats(NamedTuple):
    """The outputs of an operator, each ``[N]``; an output that was not computed has no elements."""

    logprob: Tensor
    logsumexp: Tensor
    target_logit: Tensor
    entropy: Tensor
    logsumexp_low: Tensor
    """The rounding error of ``logsumexp``, for the backward pass."""
    argmax: Tensor
    max_logit: Tensor


def empty_stats(rows: Tensor, with_entropy: bool, with_argmax: bool) -> RowStats:
    """The outputs for rows that do not count: 0, and -1 as the argmax."""
    dtype = statistics_dtype(rows.dtype)

    def zeros(wanted: bool = True) -> Tensor:
        return torch.zeros(rows.shape[0] if wanted else 0, dtype=dtype, device=rows.device)

    argmax = torch.full((rows.shape[0] if with_argmax else 0,), NO_COLUMN, dtype=torch.int64, device=rows.device)
    return RowStats(zeros(), zeros(), zeros(), zeros(with_entropy), zeros(), argmax, zeros(with_argmax))


def live_rows(upstream: Upstream, keep: Tensor) -> Tensor:
    live = torch.zeros_like(keep)
    for gradient in upstream:
        if gradient is None:
            continue
        live |= gradient != 0  # true for NaN: a NaN gradient is passed on, not hidden
    return live & keep


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def refuse_double_backward(ctx, *gradients) -> None:  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "repirl_kernels: token statistics have first gradients only; a gradient of a gradient "
        "(create_graph=True) is not implemented. Compute it from plain PyTorch logits instead."
    )


def transformed(
    operator: Callable[..., Any], context: Callable[..., None], gradient: Callable[..., Any]
) -> Callable[..., Any]:
    """``operator`` and its gradient in the form that ``torch.func`` needs: that ignores an operator's own autograd."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(context)
        backward = staticmethod(gradient)

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def jvp(ctx, *tangents):  # type: ignore[no-untyped-def]
            refuse_double_backward(ctx)

    return Transformed.apply


def one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The ``torch.vmap`` rule of an operator that returns a tensor or a tuple of them: one call for each index."""

    def rule(info, in_dims, *arguments):  # type: ignore[no-untyped-def]
        results = []
        for index in range(info.batch_size):
            pairs = zip(arguments, in_dims, strict=True)
            results.append(operator(*(x if dim is None else x.select(dim, index) for x, dim in pairs)))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def no_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    """Keep nothing for the double backward pass, which raises an error."""


def put_stats(result: ForwardResult, label_smoothing: float, rows: Tensor | None, num_rows: int) -> RowStats:
    """Apply label smoothing to a backend's statistics of ``rows``, and put them back into tensors ``[N]``."""
    logprob, target_logit = result.logprob, result.target_logit
    if label_smoothing:
        assert result.mean_logprob is not None
        mean_logit = result.mean_logprob + result.logsumexp
        smoothed = (1 - label_smoothing) * logprob + label_smoothing * result.mean_logprob
        target_logit = ((1 - label_smoothing) * target_logit + label_smoothing * mean_logit).to(logprob.dtype)
        logprob = smoothed.to(logprob.dtype)
    logsumexp, logsumexp_low = split_logsumexp(logprob, result.logsumexp, target_logit)
    entropy, argmax, max_logit = result.entropy, result.argmax, result.max_logit
    if argmax is not None and max_logit is not None:  # a row without a distribution has none
        argmax = torch.where(logsumexp.isnan(), NO_COLUMN, argmax)
        max_logit = torch.where(logsumexp.isnan(), torch.nan, max_logit)
    return RowStats(
        put(logprob, rows, num_rows),
        put(logsumexp, rows, num_rows),
        put(target_logit, rows, num_rows),
        logprob.new_empty(0) if entropy is None else put(entropy, rows, num_rows),
        put(logsumexp_low, rows, num_rows),
        logprob.new_empty(0, dtype=torch.int64) if argmax is None else put(argmax, rows, num_rows, NO_COLUMN),
        logprob.new_empty(0) if max_logit is None else put(max_logit, rows, num_rows),
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
    """Empty tensors with the shapes and dtypes that a backward operator returns."""
    return gradients_or_empty(
        hidden,
        weight,
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None,
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None,
        None if bias is None or not need_bias else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device),
    )


def compact(logits: Tensor, rows: Tensor) -> None:
    """Move ``rows``, in ascending order, to the front, 64 at a time: no row is overwritten before it was moved."""
    first = 0
    for part in rows.split(64):
        logits[first : first + part.shape[0]] = logits[part]
        first += part.shape[0]
