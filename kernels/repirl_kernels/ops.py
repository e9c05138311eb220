"""``token_stats`` and ``linear_token_stats``: custom operators and their gradients.

The work that all backends share is done here, so that a backend gets only the rows that count. Inputs are checked and
flattened (``operands.py``), ignored rows are removed before the product, rows without an upstream gradient are removed
before the product of the backward pass, and results are put back in their places. Rows must be removed, not set to
zero and multiplied: a NaN in an ignored row would otherwise reach a gradient.

How many rows are left depends on the values of the data, so the removal happens inside the custom operators.
To ``torch.compile`` and to fake tensors they have static shapes.

Axes: N rows (tokens), D features, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from repirl_kernels.backends import backend_module, repeats_products
from repirl_kernels.operands import Options, check_integer, prepare_linear, prepare_logits
from repirl_kernels.operators import OPERATOR_TAGS, under_transforms
from repirl_kernels.rows import (
    RowStats,
    SavedStats,
    Upstream,
    are_saturated,
    check_rows,
    compact,
    contiguous,
    empty_stats,
    fake_gradients,
    fold_upstream,
    gradients_or_empty,
    kept_rows,
    live_rows,
    no_context,
    one_by_one,
    put,
    put_stats,
    refuse_double_backward,
    replace_stats,
    row_indices,
    skip_below,
    take,
    take_live,
    take_some,
    transformed,
    upstream_of,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """Statistics of each row's distribution over the vocabulary at that row's target.

    All four have the shape of ``targets``, are differentiable, and are float32 (float64 for float64 inputs).
    They refer to the final logits, after bias, softcap and temperature. Rows that are ignored hold 0.
    """

    logprob: Tensor
    """log p(target), in nats. With label smoothing eps: (1 - eps) log p(target) + eps sum_v log p_v / V."""
    logsumexp: Tensor
    """log of the partition function."""
    target_logit: Tensor
    """The target's final logit, smoothed like ``logprob``."""
    entropy: Any  # Tensor or None: which one depends on with_entropy
    """-sum p log p, in nats; ``None`` with ``with_entropy=False``."""


class TokenStatsWithArgmax(NamedTuple):
    """:class:`TokenStats` and the token that greedy decoding would choose; the result with ``with_argmax=True``."""

    logprob: Tensor
    logsumexp: Tensor
    target_logit: Tensor
    entropy: Any
    argmax: Tensor
    """The first column with the largest logit, int64; -1 in rows that are ignored or hold NaN. No gradient."""
    max_logit: Tensor
    """The largest final logit. No gradient."""


AnyTokenStats = TokenStats | TokenStatsWithArgmax


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    with_entropy: bool = True,
    with_argmax: bool = False,
    backend: str | None = None,
) -> AnyTokenStats:
    """Log-probability, logsumexp, target logit and entropy of logits that already exist, reading them once.

    Args:
        logits: ``[*, V]``, float32, bfloat16, float16 or float64.
        targets: ``[*]``, any integer dtype, each in ``[0, vocab_size)`` or equal to ``ignore_index``.
        temperature: final logits are divided by it; > 0. A tensor ``[*]`` gives each row its own; it gets no gradient.
        softcap: ``c`` in ``c * tanh(logits / c)``, applied before the temperature; > 0, or ``None`` for none.
        ignore_index: rows with this target are ignored, even if it is in ``[0, vocab_size)``.
        row_mask: ``[*]`` bool; rows with ``False`` are ignored whatever their target and logits hold.
        vocab_size: only the first ``vocab_size`` columns take part; the others (padding) get zero gradient.
        label_smoothing: the share, in [0, 1), of the target's mass that is spread evenly over the vocabulary, as in
            ``torch.nn.functional.cross_entropy``. With a banned token (a logit of -inf) the result is -inf, as there.
        with_entropy: ``False`` does not compute the entropy; it is ``None`` then.
        with_argmax: ``True`` gives a :class:`TokenStatsWithArgmax`.
        backend: ``"reference"``, ``"triton"`` or ``"native"`` to force one; see :func:`choose_backend`.

    Returns:
        :class:`TokenStats` (or :class:`TokenStatsWithArgmax`) with tensors of the shape of ``targets``; ignored rows
        hold 0 and pass zero gradients.

    Raises:
        TypeError: a dtype or an option's type is not supported, or an argument is a DTensor.
        ValueError: a shape, a device, an option or a target's value is wrong. Values of targets are
            checked when the operator runs, also under ``torch.compile``.
        RuntimeError: the forced backend is not installed; or a second derivative is computed.
        NotImplementedError: a forward-mode derivative is computed.
    """
    rows, options = prepare_logits(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        row_mask=row_mask,
        vocab_size=vocab_size,
        label_smoothing=label_smoothing,
        with_entropy=with_entropy,
        with_argmax=with_argmax,
        backend=backend,
    )
    operator = _token_stats_transformed if under_transforms() else _token_stats
    return as_stats(operator(*rows, *options), targets, options)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    with_entropy: bool = True,
    with_argmax: bool = False,
    tp_group: "ProcessGroup | None" = None,
    skip_negligible: bool = False,
    backend: str | None = None,
) -> AnyTokenStats:
    """Token statistics of ``softcap(hidden @ weight.T + bias) / temperature`` without holding the logits.

    Statistics are computed in float32 whatever the operands' dtype: with bfloat16 operands the logits are
    never rounded to bfloat16. ``hidden`` and ``weight`` of different dtypes are computed in the dtype that
    both promote to; under ``torch.autocast`` both are cast to the autocast dtype first, as
    ``torch.nn.functional.linear`` does (neither casts float64). Gradients have the dtype of their tensor.

    Args:
        hidden: ``[*, D]``, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, one of the same dtypes. A DTensor is refused: call this inside the ``forward``
            of the FSDP module that owns the weight, or pass ``weight.full_tensor()``.
        targets: ``[*]``, any integer dtype, each in ``[0, vocab_size)`` or equal to ``ignore_index``.
        bias: ``[V]`` or ``None``; ``-inf`` bans a token.
        temperature: final logits are divided by it; > 0. A tensor ``[*]`` gives each row its own; it gets no gradient.
        softcap: ``c`` in ``c * tanh(z / c)``, applied after the bias, before the temperature; > 0, or
            ``None``.
        ignore_index: rows with this target are ignored, even if it is in ``[0, vocab_size)``.
        row_mask: ``[*]`` bool; rows with ``False`` are ignored whatever they hold, and cost no product.
        vocab_size: only the first ``vocab_size`` rows of ``weight`` take part; the others get zero gradient.
        label_smoothing, with_entropy, with_argmax: as in :func:`token_stats`.
        tp_group: a process group whose ranks each hold a part of the vocabulary; see below.
        skip_negligible: in the backward products, leave out the parts of the vocabulary in which all gradients of a
            row's logits are very small: below 1/32 of the epsilon of the operands' dtype, relative to the row's
            upstream gradients. This is faster if distributions are peaked. It causes a small bias, because many very
            small terms of the same sign can have a sum that is not small.
        backend: ``"reference"``, ``"triton"`` or ``"native"`` to force one; see :func:`choose_backend`.

    Vocabulary-parallel: with ``tp_group``, ``weight [V_r, D]`` and ``bias [V_r]`` are this rank's shard. Concatenated
    in rank order, the shards are the vocabulary; their sizes may differ, and may be 0. ``targets`` are global columns,
    and ``vocab_size`` counts global columns. ``hidden``, ``targets``, ``row_mask`` and all options must be the same on
    every rank of the group, and so must the upstream gradients of the statistics: those of the whole loss, not divided
    by the number of ranks. All ranks return the same statistics. ``hidden`` gets its whole gradient on every rank,
    already summed over the ranks: do not sum it again. ``weight`` and ``bias`` get the gradient of their shard.

    Returns:
        :class:`TokenStats` (or :class:`TokenStatsWithArgmax`) with tensors of the shape of ``targets``; ignored rows
        hold 0 and pass zero gradients.

    Raises:
        TypeError: a dtype or an option's type is not supported, or an argument is a DTensor.
        ValueError: a shape, a device, an option or a target's value is wrong, options exclude each other, or ranks
            disagree about the rows.
            Values of targets are checked when the operator runs, also under ``torch.compile``.
        RuntimeError: the forced backend is not installed; or a second derivative is computed.
        NotImplementedError: a forward-mode derivative is computed.
    """
    operands, options = prepare_linear(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        row_mask=row_mask,
        vocab_size=vocab_size,
        label_smoothing=label_smoothing,
        with_entropy=with_entropy,
        with_argmax=with_argmax,
        backend=backend,
        is_shard=tp_group is not None,
    )
    if not isinstance(skip_negligible, bool):
        raise TypeError(f"skip_negligible must be True or False, got {skip_negligible!r}")
    if skip_negligible and options.label_smoothing:
        raise ValueError(
            "skip_negligible would leave out the small gradient that label_smoothing gives every column: use one"
        )
    if tp_group is not None:
        # Imported when first used: not every build of torch has process groups.
        from repirl_kernels.parallel import vocab_parallel_token_stats

        global_size = None if vocab_size is None else check_integer("vocab_size", vocab_size)
        outputs = vocab_parallel_token_stats(operands, options, global_size, skip_negligible, tp_group)
        return as_stats(outputs, targets, options)
    operator = _linear_token_stats_transformed if under_transforms() else _linear_token_stats
    return as_stats(operator(*operands, skip_negligible, *options), targets, options)


def as_stats(outputs: Any, targets: Tensor, options: Options) -> AnyTokenStats:
    """An operator's outputs in the shape of ``targets``."""
    row = RowStats(*outputs[: len(RowStats._fields)])
    entropy = row.entropy if options.with_entropy else None
    stats = TokenStats(row.logprob, row.logsumexp, row.target_logit, entropy)
    columns: list[Any] = [None if column is None else column.reshape(targets.shape) for column in stats]
    if not options.with_argmax:
        return TokenStats(*columns)
    # The argmax and its logit have no gradient.
    return TokenStatsWithArgmax(*columns, *(x.detach().reshape(targets.shape) for x in (row.argmax, row.max_logit)))


@torch.library.custom_op("repirl_kernels::token_stats", mutates_args=(), tags=OPERATOR_TAGS)
def _token_stats(
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    keep = kept_rows(targets, row_mask, ignore_index)
    check_rows(targets, row_temperature, keep, vocab_size)
    functions = backend_module(logits, backend)
    rows = row_indices(keep)
    num_rows = logits.shape[0]
    if num_rows == 0 or (rows is not None and rows.shape[0] == 0):
        return empty_stats(logits, with_entropy, with_argmax)
    with torch.autocast(logits.device.type, enabled=False):
        result = functions.logits_forward(
            take(logits, rows), take(targets, rows), options, take_some(row_temperature, rows)
        )
    return put_stats(result, label_smoothing, rows, num_rows)


@_token_stats.register_fake
def _token_stats_fake(logits: Tensor, *rest: Any) -> RowStats:
    return _empty_stats_of(logits, *rest[3:])


def _empty_stats_of(rows: Tensor, *options: Any) -> RowStats:
    given = Options(*options)
    return empty_stats(rows, given.with_entropy, given.with_argmax)


@torch.library.custom_op("repirl_kernels::token_stats_backward", mutates_args=(), tags=OPERATOR_TAGS)
def _token_stats_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    logsumexp_low: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> Tensor:
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    upstream = (g_logprob, g_logsumexp, g_target_logit, g_entropy)
    stats = (logsumexp, entropy, logsumexp_low)
    rows = row_indices(live_rows(upstream, kept_rows(targets, row_mask, ignore_index)))
    num_rows = logits.shape[0]
    if num_rows == 0 or (rows is not None and rows.shape[0] == 0):
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    gradients = fold_upstream(*take_live(upstream, stats, rows), label_smoothing, vocab_size)
    with torch.autocast(logits.device.type, enabled=False):
        dlogits = backend_module(logits, backend).logits_backward(
            gradients, take(logits, rows), take(targets, rows), options, take_some(row_temperature, rows)
        )
    return put(dlogits, rows, num_rows)


@_token_stats_backward.register_fake
def _token_stats_backward_fake(g_logprob, g_logsumexp, g_target_logit, g_entropy, logits: Tensor, *rest: Any) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    options: Options,
    logits: Tensor | None = None,
    dweight: Tensor | None = None,
) -> RowStats:
    """Statistics ``[N]``. The logits of the rows that count are written to the first rows of ``logits``.

    For the native backend ``logits`` may be a buffer of bytes instead, and ``dweight`` more memory for the same values
    (see ``native.linear_forward``).
    """
    keep = kept_rows(targets, row_mask, options.ignore_index)
    check_rows(targets, row_temperature, keep, options.vocab_size)
    functions = backend_module(hidden, options.backend)
    rows = row_indices(keep)
    num_rows = hidden.shape[0]
    num_kept = num_rows if rows is None else rows.shape[0]
    if num_kept == 0:
        return empty_stats(hidden, options.with_entropy, options.with_argmax)
    kept: dict[str, Any] = {} if logits is None else {"logits": logits[:num_kept]}
    if logits is not None and logits.dim() == 1:
        kept = {"logits": logits, "dweight": dweight}
    with torch.autocast(hidden.device.type, enabled=False):
        result = functions.linear_forward(
            take(hidden, rows), take(weight, None), take(targets, rows), contiguous(bias), options,
            take_some(row_temperature, rows), **kept,
        )  # fmt: skip
    return put_stats(result, options.label_smoothing, rows, num_rows)


def linear_backward(
    upstream: Upstream,
    stats: SavedStats,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    options: Options,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    logits: Tensor | None = None,
    weight_sum: Tensor | None = None,
    dweight: Tensor | None = None,
    skip_negligible: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; one that is not needed is returned as an empty tensor.

    ``upstream`` holds the gradients of the four statistics; ``stats`` holds logsumexp, entropy and the rounding error
    of logsumexp (without entropy, that is ``None`` in both). ``logits`` is what :func:`linear_forward` filled; it is
    overwritten. With ``weight_sum`` the weight's gradient is added to it; with the ``dweight`` of the forward pass it
    is written there. In both cases an empty tensor is returned in its place.
    """
    keep = kept_rows(targets, row_mask, options.ignore_index)
    live = live_rows(upstream, keep)
    rows = row_indices(live)
    num_rows = hidden.shape[0]
    num_live = num_rows if rows is None else rows.shape[0]
    need_bias = need_bias and bias is not None
    dhidden: Tensor | None = None
    new_dweight: Tensor | None = None
    dbias: Tensor | None = None
    if num_live == 0:
        if need_hidden:
            dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if dweight is not None:
            dweight.zero_()
        elif need_weight and weight_sum is None:
            new_dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        if bias is not None and need_bias:
            dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
        return gradients_or_empty(hidden, weight, dhidden, new_dweight, dbias)
    kept: dict[str, Any] = {}
    if logits is not None:
        still_live = live[keep]
        places = row_indices(still_live)
        kept = {"logits": logits, "num_logits_rows": len(still_live), "logits_rows": places, "dweight": dweight}
        if logits.dim() == 2:
            if places is not None:
                compact(logits, places)
            kept = {"logits": logits[:num_live]}
    functions = backend_module(hidden, options.backend)
    live_operands = (take(hidden, rows), take(weight, None), take(targets, rows), contiguous(bias), options)
    temperatures = take_some(row_temperature, rows)
    with torch.autocast(hidden.device.type, enabled=False):
        live_upstream, live_stats = take_live(upstream, stats, rows)
        if logits is None and not repeats_products(hidden, options.backend):
            saturated = are_saturated(live_stats[0], live_stats[1])
            if saturated.any():
                fresh = put_stats(
                    functions.linear_forward(*live_operands, temperatures), options.label_smoothing, None, num_live
                )
                live_stats = replace_stats(live_stats, fresh, saturated)
        gradients = fold_upstream(live_upstream, live_stats, options.label_smoothing, options.vocab_size)
        dhidden, new_dweight, dbias = functions.linear_backward(
            gradients, *live_operands, need_hidden, need_weight, need_bias, temperatures,
            dweight_sum=weight_sum if need_weight else None,
            skip_below=skip_below(gradients, hidden.dtype) if skip_negligible else None,
            **kept,
        )  # fmt: skip
    if dhidden is not None:
        dhidden = put(dhidden, rows, num_rows)
    return gradients_or_empty(hidden, weight, dhidden, None if dweight is not None else new_dweight, dbias)


@torch.library.custom_op("repirl_kernels::linear_token_stats", mutates_args=(), tags=OPERATOR_TAGS)
def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    skip_negligible: bool,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    return linear_forward(hidden, weight, targets, bias, row_mask, row_temperature, options)


@_linear_token_stats.register_fake
def _linear_token_stats_fake(hidden: Tensor, *rest: Any) -> RowStats:
    return _empty_stats_of(hidden, *rest[6:])


@torch.library.custom_op("repirl_kernels::linear_token_stats_backward", mutates_args=(), tags=OPERATOR_TAGS)
def _linear_token_stats_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    logsumexp_low: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    skip_negligible: bool,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; one that is not needed is returned as an empty tensor."""
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    return linear_backward(
        (g_logprob, g_logsumexp, g_target_logit, g_entropy),
        (logsumexp, entropy, logsumexp_low),
        *(hidden, weight, targets, bias, row_mask, row_temperature, options),
        *(need_hidden, need_weight, need_bias),
        skip_negligible=skip_negligible,
    )


@_linear_token_stats_backward.register_fake
def _linear_token_stats_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs, (hidden, weight, _, bias) = arguments[7:10], arguments[10:14]
    return fake_gradients(hidden, weight, bias, *needs)


def _token_stats_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, targets, row_mask, row_temperature, *options = inputs
    ctx.options = Options(*options)
    stats = RowStats(*output)
    entropy = stats.entropy if ctx.options.with_entropy else None
    ctx.save_for_backward(logits, targets, row_mask, row_temperature, stats.logsumexp, entropy, stats.logsumexp_low)


def _token_stats_autograd(ctx, *gradients):  # type: ignore[no-untyped-def]
    upstream = upstream_of(gradients, ctx.options.with_entropy)
    operator = _token_stats_backward_transformed if under_transforms() else _token_stats_backward
    dlogits = operator(*upstream, *ctx.saved_tensors, *ctx.options)
    return dlogits, *[None] * (3 + len(Options._fields))


def _linear_token_stats_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *operands, ctx.skip_negligible = inputs[:7]
    ctx.options = Options(*inputs[7:])
    stats = RowStats(*output)
    entropy = stats.entropy if ctx.options.with_entropy else None
    ctx.save_for_backward(*operands, stats.logsumexp, entropy, stats.logsumexp_low)


def _linear_token_stats_autograd(ctx, *gradients):  # type: ignore[no-untyped-def]
    *operands, logsumexp, entropy, logsumexp_low = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    operator = _linear_token_stats_backward_transformed if under_transforms() else _linear_token_stats_backward
    dhidden, dweight, dbias = operator(
        *upstream_of(gradients, ctx.options.with_entropy),
        *(logsumexp, entropy, logsumexp_low),
        *(need_hidden, need_weight, need_bias),
        *operands,
        ctx.skip_negligible,
        *ctx.options,
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * (3 + len(Options._fields)),
    )


_token_stats.register_autograd(_token_stats_autograd, setup_context=_token_stats_context)
_linear_token_stats.register_autograd(_linear_token_stats_autograd, setup_context=_linear_token_stats_context)
_token_stats_backward.register_autograd(refuse_double_backward, setup_context=no_context)
_linear_token_stats_backward.register_autograd(refuse_double_backward, setup_context=no_context)
for _operator in (_token_stats, _linear_token_stats, _token_stats_backward, _linear_token_stats_backward):
    _operator.register_vmap(one_by_one(_operator))


_token_stats_transformed = transformed(_token_stats, _token_stats_context, _token_stats_autograd)
_linear_token_stats_transformed = transformed(
    _linear_token_stats, _linear_token_stats_context, _linear_token_stats_autograd
)
_token_stats_backward_transformed = transformed(_token_stats_backward, no_context, refuse_double_backward)
_linear_token_stats_backward_transformed = transformed(_linear_token_stats_backward, no_context, refuse_double_backward)
