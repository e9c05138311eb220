"""``linear_token_loss``: a loss of token statistics, with gradients that are computed in the forward pass.

The rows are divided into chunks. For each chunk the forward pass computes the logits, their statistics, the loss and
its derivatives, the gradient of the logits, and from this the gradients of hidden states and weights. That takes three
matrix products; ``linear_token_stats`` followed by ``backward()`` takes four, because it computes the logits twice.
In return it needs more memory: for the logits of one chunk (or, on a CPU, their exponentials in bfloat16) and, if
weights are in half precision and there is more than one chunk, for the sum of the weight's gradient in float32.

Axes: N rows (tokens), D features, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repirl_kernels import native
from repirl_kernels.backends import choose_backend
from repirl_kernels.operands import (
    LinearOperands,
    Options,
    check_integer,
    check_main_grad,
    prepare_linear,
    refuse_forward_mode,
    statistics_dtype,
)
from repirl_kernels.operators import OPERATOR_TAGS, under_transforms
from repirl_kernels.ops import (
    AnyTokenStats,
    as_stats,
    linear_backward,
    linear_forward,
    linear_token_stats,
)
from repirl_kernels.rows import RowStats, check_rows, empty_stats, fake_gradients, kept_rows, refuse_double_backward

# Default sizes of the logits in memory. On a GPU every chunk reads and writes the sum of the weight's gradient, so
# fewer and larger chunks are faster.
_CHUNK_BYTES_CPU, _CHUNK_BYTES_GPU = 256 << 20, 2 << 30


class TokenLoss(NamedTuple):
    """What :func:`linear_token_loss` returns.

    Attributes:
        loss: the sum of ``token_loss``, a scalar. Call its ``backward()``: the gradients are there already, and are
            multiplied by the one that comes in.
        token_loss: ``[*]``, the shape of ``targets``; what ``loss_fn`` returned for each row, 0 in ignored rows;
            detached.
        stats: :class:`TokenStats` of all rows, each ``[*]``; detached. With ``with_argmax=True``
            :class:`TokenStatsWithArgmax`.
    """

    loss: Tensor
    token_loss: Tensor
    stats: AnyTokenStats


LossFunction = Callable[[Any, slice], Tensor]


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: LossFunction,
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
    main_grad: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> TokenLoss:
    """The sum of a per-token loss of the statistics; its gradients are computed in the forward pass.

    This takes three matrix products of the size of the logits instead of four.

    ``loss_fn`` may be any differentiable function of the four statistics of each row. It is called once for each chunk
    of rows, with the statistics and the range of these rows, so that it can select their advantages or old
    log-probabilities. It must return one loss for each row, already with its weight and normaliser::

        def loss_fn(stats, rows):
            ratio = torch.exp(stats.logprob - old_logprob[rows])
            return -ratio * advantage[rows] / num_tokens - 0.01 / num_tokens * stats.entropy

        linear_token_loss(hidden, weight, targets, loss_fn).loss.backward()

    Gradients are those of ``linear_token_stats`` followed by the same loss, with one difference: they are rounded to
    the dtype of their tensor before they are multiplied by a factor on ``.loss``. So with float16, apply a loss scale
    inside ``loss_fn``, or small gradients become 0. No gradient is computed under ``torch.no_grad()``, or if no
    argument requires one.

    Where a gradient cannot be computed in the forward pass, it is computed in the backward pass, by four products:
    under ``torch.func`` transforms, and under ``torch.compile`` in a region that is checkpointed.

    Args:
        hidden, weight, targets, bias, temperature, softcap, ignore_index, row_mask, vocab_size, label_smoothing,
            with_entropy, with_argmax, backend: as in :func:`repirl_kernels.linear_token_stats`.
        loss_fn: ``loss_fn(stats, rows) -> [R]``, where ``stats`` are the statistics of ``[R]``, ``rows`` is a
            ``slice`` of the flattened rows of length R. In ignored rows the statistics are 0, and the loss does not
            count. It is differentiated only with respect to ``stats``. A row's loss may depend on the statistics of
            other rows only if there is one chunk. If there are several, this is checked: ``loss_fn`` is called twice
            more with all rows, once with the same statistics, where it must return the same losses, and once with
            slightly changed ones, to measure how much rounding changes its result.
        main_grad: contiguous float32 ``[V, D]`` (float64 for float64 operands), the weight's gradient accumulator where
            one is used besides ``weight.grad`` (Megatron's ``weight.main_grad``). The weight's gradient is added to it
            in the forward pass, without another buffer, and ``weight`` gets none from autograd. ``backward()`` must
            then start from this loss with an upstream gradient of 1: scale the loss in ``loss_fn``. Do not use it in
            checkpointed regions: they run the forward pass twice, which adds the gradient twice. If ``loss_fn`` raises,
            or its losses depend on the chunk, some chunks have already been added.
        chunk_bytes: the largest size of the logits in memory (but at least one row); 256 MiB on a CPU and 2 GiB
            elsewhere by default. The logits are float32. For bfloat16 operands without a softcap, the native CPU
            backend instead keeps their exponentials in bfloat16; only gradients are computed from these, the
            statistics still from float32 logits. Values that it puts into the memory of the weight's gradient do not
            count.

    Returns:
        :class:`TokenLoss`.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`repirl_kernels.linear_token_stats`.
        TypeError: ``loss_fn`` returns losses that are not floating-point numbers.
        ValueError: ``loss_fn`` returns another shape, uses a tensor that requires a gradient (it would silently
            get none: detach it), or gives losses that depend on the chunk; ``main_grad`` has another shape, device or
            layout, or is given although the backward pass computes the gradient; ``chunk_bytes`` is not positive.
        RuntimeError: in backward, an upstream gradient other than 1 with ``main_grad``; not checked where
            ``torch.compile`` traces the backward.
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
    )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of statistics and rows, got {loss_fn!r}")
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES_CPU if hidden.device.type == "cpu" else _CHUNK_BYTES_GPU
    chunk_bytes = check_integer("chunk_bytes", chunk_bytes)
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be > 0, got {chunk_bytes}")
    dtype = statistics_dtype(operands.hidden.dtype)
    if main_grad is not None:
        check_main_grad(main_grad, weight, dtype)
    if operands.bias is not None:
        operands = operands._replace(bias=operands.bias.to(dtype))  # sums over chunks are rounded once
    leaves = (operands.hidden, operands.weight, operands.bias)
    needs = [torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves]
    if under_transforms() or (any(needs) and torch.compiler.is_compiling() and not _differentiates_while_traced()):
        if main_grad is not None:
            raise ValueError(
                "main_grad gets the weight's gradient in the forward pass, which cannot compute it under torch.func "
                "transforms or in a checkpointed region under torch.compile: leave main_grad out"
            )
        return _by_autograd(operands, options, loss_fn, targets)
    num_rows = operands.hidden.shape[0]
    keep = kept_rows(operands.targets, operands.row_mask, options.ignore_index)
    with torch.no_grad():
        num_chunks, memory = _plan(operands, options, needs, main_grad, chunk_bytes)
        if num_chunks > 1 and not torch.compiler.is_compiling():
            # Check before the first chunk adds to main_grad. Messages name rows by their place among all rows.
            check_rows(operands.targets, operands.row_temperature, keep, options.vocab_size)
        chunks = []
        for chunk in range(num_chunks):
            rows = slice(chunk * num_rows // num_chunks, (chunk + 1) * num_rows // num_chunks)
            chunks.append(_run_chunk(operands, rows, keep[rows], loss_fn, memory, options, needs))
        token_loss = torch.cat([chunk.losses for chunk in chunks])
        stats = RowStats(*(torch.cat(column) for column in zip(*(chunk.stats for chunk in chunks), strict=True)))
        loss = token_loss.sum()
        if num_chunks > 1:
            at_once = []
            for factor in (1.0, 1.0 + 2.0**-20):
                losses = loss_fn(_copied(as_stats(stats, operands.targets, options), factor), slice(0, num_rows))
                _check_losses(losses, operands.targets, uses_other_leaves=False)
                at_once.append(torch.where(keep, losses, 0).to(token_loss.dtype))
            loss = _check_chunks(loss, token_loss, *at_once, num_chunks)
        if any(needs):
            dhidden = torch.cat([chunk.dhidden for chunk in chunks])
            dweight = memory.dweight
            if dweight is None and main_grad is None:
                total = memory.weight_sum
                dweight = chunks[0].dweight if total is None else total.to(operands.weight.dtype)
            dbias = torch.stack([chunk.dbias for chunk in chunks]).sum(dim=0)
    if any(needs):
        loss = _attach_gradients(
            loss,
            operands.hidden,
            operands.weight,
            operands.bias,
            dhidden,
            dweight,
            dbias,
        )
    return TokenLoss(loss, token_loss.reshape(targets.shape), as_stats(stats, targets, options))


def _differentiates_while_traced() -> bool:
    """Whether a loss can be differentiated in the forward pass that ``torch.compile`` traces.

    This needs ``torch.func.vjp``, which does not work together with hooks on saved tensors. A checkpointed region,
    which is traced as a separate graph, sets such hooks.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.current_tracer.parent is None


# While torch.compile traces, it calls this function and takes the result as a constant.
_differentiates_while_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _by_autograd(operands: LinearOperands, options: Options, loss_fn: LossFunction, targets: Tensor) -> TokenLoss:
    """The same loss through ``linear_token_stats``; its backward pass computes the logits again."""
    hidden, weight, flat_targets, bias, row_mask, row_temperature = operands
    stats = linear_token_stats(
        hidden,
        weight,
        flat_targets,
        bias=bias,
        temperature=options.temperature if row_temperature is None else row_temperature,
        row_mask=row_mask,
        **{name: value for name, value in options._asdict().items() if name not in ("temperature", "backend")},
        backend=options.backend or None,
    )
    losses = loss_fn(_copied(stats), slice(0, hidden.shape[0]))
    _check_losses(losses, flat_targets, uses_other_leaves=False)
    keep = kept_rows(flat_targets, row_mask, options.ignore_index)
    losses = torch.where(keep, losses, 0).to(stats.logprob.dtype)
    columns: list[Any] = [None if column is None else column.detach().reshape(targets.shape) for column in stats]
    return TokenLoss(losses.sum(), losses.detach().reshape(targets.shape), type(stats)(*columns))


class _Memory(NamedTuple):
    """Memory that all chunks use: logits ``[R, V]``, or the native backend's buffer with or without ``dweight``."""

    logits: Tensor | None
    weight_sum: Tensor | None
    dweight: Tensor | None


def _plan(
    operands: LinearOperands,
    options: Options,
    needs: list[bool],
    main_grad: Tensor | None,
    chunk_bytes: int,
) -> tuple[int, _Memory]:
    """The number of chunks, and the memory for one."""
    (num_rows, num_features), vocab_size = operands.hidden.shape, options.vocab_size
    device, operand_dtype = operands.hidden.device, operands.hidden.dtype
    dtype = statistics_dtype(operand_dtype)
    own_buffer = _has_own_buffer(device.type, operand_dtype, options.backend or None)
    # With a single chunk the weight's gradient is written only once, at the end; until then its memory is free.
    in_gradient = own_buffer and needs[1] and main_grad is None

    def bytes_of(rows: int, in_gradient: bool) -> int:
        if own_buffer:
            return native.buffer_bytes(rows, num_features, operand_dtype, options, in_gradient)
        return rows * vocab_size * dtype.itemsize

    num_chunks = 1
    if bytes_of(num_rows, in_gradient) > chunk_bytes:
        if torch.compiler.is_compiling():
            # torch.compile makes a graph for each number of chunks, so use only powers of two.
            num_chunks = 2
            while num_chunks < num_rows and bytes_of(-(-num_rows // num_chunks), False) > chunk_bytes:
                num_chunks *= 2
        else:
            num_chunks = max(1, -(-num_rows // max(1, chunk_bytes // bytes_of(1, False))))
    in_gradient = in_gradient and num_chunks == 1
    weight_sum = main_grad
    if needs[1] and main_grad is None and num_chunks > 1:
        weight_sum = torch.zeros(operands.weight.shape, dtype=dtype, device=device)
    if not any(needs):
        return num_chunks, _Memory(None, weight_sum, None)
    step = -(-num_rows // num_chunks)
    if not own_buffer:
        return num_chunks, _Memory(torch.empty((step, vocab_size), dtype=dtype, device=device), weight_sum, None)
    # Never empty: torch.compile would make another graph for an empty tensor.
    buffer = torch.empty(torch.sym_max(bytes_of(step, in_gradient), 64), dtype=torch.uint8, device=device)
    dweight = torch.empty(operands.weight.shape, dtype=operand_dtype, device=device) if in_gradient else None
    return num_chunks, _Memory(buffer, weight_sum, dweight)


def _has_own_buffer(device: str, dtype: torch.dtype, backend: str | None) -> bool:
    return choose_backend(device, dtype, backend) == "native" and native.has_products(dtype)


# The same as torch.compiler.assume_constant_result, which imports the whole compiler.
_has_own_buffer._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Chunk(NamedTuple):
    """One chunk's losses and statistics, each ``[R]``, and gradients; those not needed are empty tensors."""

    losses: Tensor
    stats: RowStats
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


def _run_chunk(
    operands: LinearOperands,
    rows: slice,
    keep: Tensor,
    loss_fn: LossFunction,
    memory: _Memory,
    options: Options,
    needs: list[bool],
) -> _Chunk:
    hidden, targets = operands.hidden[rows], operands.targets[rows]
    row_mask = None if operands.row_mask is None else operands.row_mask[rows]
    row_temperature = None if operands.row_temperature is None else operands.row_temperature[rows]
    chunk_operands = (hidden, operands.weight, targets, operands.bias, row_mask, row_temperature)
    logits, weight_sum, dweight_memory = memory
    if logits is not None and logits.dim() == 2:
        logits = logits[: hidden.shape[0]]
    row_stats = RowStats(*_chunk_forward(*chunk_operands, logits, dweight_memory, *options))
    stats = as_stats(row_stats, targets, options)
    upstream: tuple[Tensor | None, ...] = ()
    if any(needs):
        losses, upstream = _differentiate(loss_fn, stats, rows, keep)
    else:
        losses = loss_fn(_copied(stats), rows)
        _check_losses(losses, targets, uses_other_leaves=False)
    losses = torch.where(keep, losses, 0).to(row_stats.logprob.dtype)
    if not any(needs):
        return _Chunk(losses, row_stats, *[hidden.new_empty(0)] * 3)
    saved = (row_stats.logsumexp, row_stats.entropy if options.with_entropy else None, row_stats.logsumexp_low)
    dhidden, dweight, dbias = _chunk_backward(
        *upstream, *saved, *needs, *chunk_operands, logits, weight_sum, dweight_memory, *options
    )
    return _Chunk(losses, row_stats, dhidden, dweight, dbias)


def _copied(stats: AnyTokenStats, factor: float = 1.0) -> AnyTokenStats:
    """A copy for a loss function, which may change its arguments; the four statistics are multiplied by ``factor``."""
    columns: list[Any] = [None if column is None else column * factor for column in stats[:4]]
    return type(stats)(*columns, *(column.clone() for column in stats[4:] if column is not None))


def _differentiate(
    loss_fn: LossFunction, stats: AnyTokenStats, rows: slice, keep: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The losses ``[R]``, and the gradients of the sum of those that count with respect to the four statistics."""
    given = [column for column in stats[:4] if column is not None]

    def losses_of(*columns: Tensor) -> Tensor:
        # The fourth statistic is the entropy. Fields without a gradient are copied here, too: loss_fn may change its
        # arguments, and under a transform only tensors that were made inside it can be changed.
        four = [*(column.clone() for column in columns), None][:4]  # copies: a leaf cannot be changed in place
        fields: list[Any] = [*four, *(column.clone() for column in stats[4:] if column is not None)]
        return loss_fn(type(stats)(*fields), rows)

    with torch.enable_grad():
        if torch.compiler.is_compiling():  # which traces vjp, but not autograd.grad
            losses, pull_back, *_ = torch.func.vjp(losses_of, *given)
            _check_losses(losses, stats.logprob, losses.requires_grad)
            upstream = pull_back(keep.to(losses.dtype))
            return losses.detach(), (*upstream, None)[:4]
        # Hooks of a surrounding graph (activation checkpointing, offloading) must not apply to this separate graph.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            leaves = [column.detach().requires_grad_() for column in given]
            losses = losses_of(*leaves)
            _check_losses(losses, stats.logprob, _has_other_leaves(losses, leaves))
            if not losses.requires_grad:
                return losses, (*(torch.zeros_like(column) for column in given), None)[:4]
            upstream = torch.autograd.grad(losses, leaves, keep.to(losses.dtype), materialize_grads=True)
            return losses.detach(), (*upstream, None)[:4]


def _check_losses(losses: Tensor, expected: Tensor, uses_other_leaves: bool) -> None:
    if not isinstance(losses, Tensor) or losses.shape != expected.shape:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"loss_fn must return one loss for each of the rows, {tuple(expected.shape)}, got {got}")
    if not losses.is_floating_point():
        raise TypeError(f"loss_fn must return losses of a floating-point dtype, got {losses.dtype}")
    if not torch.compiler.is_compiling() and not under_transforms():
        refuse_forward_mode(losses, what="losses that loss_fn returns")
    if uses_other_leaves:
        raise ValueError(
            "loss_fn uses a tensor that requires a gradient, and would give it none: detach it. Only the statistics "
            "are differentiated here; linear_token_stats with a loss of its own differentiates all"
        )


def _has_other_leaves(losses: Tensor, leaves: list[Tensor]) -> bool:
    """Whether the graph of ``losses`` ends in leaves that are not among ``leaves``."""
    known = {id(leaf) for leaf in leaves}
    nodes, seen = [getattr(losses, "grad_fn", None)], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


@torch.library.custom_op("repirl_kernels::check_chunks", mutates_args=(), tags=OPERATOR_TAGS)
def _check_chunks(loss: Tensor, by_chunk: Tensor, at_once: Tensor, shifted: Tensor, num_chunks: int) -> Tensor:
    """Return ``loss``. Raise ValueError if a row's loss depends on which other rows are in its chunk.

    ``shifted`` are the losses for statistics that were changed by a few rounding errors.
    """

    def largest(values: Tensor) -> Tensor:
        return values.abs().nan_to_num(nan=0.0, posinf=0.0).amax()

    # In another slice of the rows, a loss may be rounded differently, but must not differ otherwise. Where a loss is
    # the difference of close numbers (a KL near 0), rounding errors may exceed any fraction of it.
    rounding = largest(shifted - at_once)
    tolerance = 1e-4 * at_once.abs() + 1e-6 * largest(at_once) + 4 * rounding
    same = ((by_chunk - at_once).abs() <= tolerance) | (by_chunk == at_once) | (by_chunk.isnan() & at_once.isnan())
    if not same.all():
        row = int((~same).nonzero()[0])
        raise ValueError(
            f"loss_fn gives row {row} the loss {float(by_chunk[row]):.6g} in its chunk and {float(at_once[row]):.6g} "
            f"among all rows: a row's loss may not depend on the rows around it, as there are {num_chunks} chunks. Put "
            "normalisers into the function from outside, or give a chunk_bytes that holds all rows"
        )
    return loss.clone()


@_check_chunks.register_fake
def _check_chunks_fake(loss: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(loss)


@torch.library.custom_op("repirl_kernels::linear_chunk_forward", mutates_args=("logits", "dweight"), tags=OPERATOR_TAGS)
def _chunk_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    logits: Tensor | None,
    dweight: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics. The logits of the rows that count are written to the first rows of ``logits``."""
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    return linear_forward(hidden, weight, targets, bias, row_mask, row_temperature, options, logits, dweight)


@_chunk_forward.register_fake
def _chunk_forward_fake(hidden: Tensor, *rest: Any) -> RowStats:
    options = Options(*rest[7:])
    return empty_stats(hidden, options.with_entropy, options.with_argmax)


@torch.library.custom_op(
    "repirl_kernels::linear_chunk_backward", mutates_args=("logits", "weight_sum", "dweight"), tags=OPERATOR_TAGS
)
def _chunk_backward(
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
    logits: Tensor,
    weight_sum: Tensor | None,
    dweight: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight (if there is no ``weight_sum`` or ``dweight`` for it) and bias, or empty tensors."""
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    return linear_backward(
        (g_logprob, g_logsumexp, g_target_logit, g_entropy),
        (logsumexp, entropy, logsumexp_low),
        *(hidden, weight, targets, bias, row_mask, row_temperature, options),
        *(need_hidden, need_weight, need_bias),
        *(logits, weight_sum, dweight),
    )


@_chunk_backward.register_fake
def _chunk_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = arguments[7:10]
    (hidden, weight, _, bias), (weight_sum, dweight) = arguments[10:14], arguments[17:19]
    return fake_gradients(hidden, weight, bias, need_hidden, need_weight and weight_sum is dweight is None, need_bias)


@torch.library.custom_op("repirl_kernels::attach_gradients", mutates_args=())
def _attach_gradients(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dhidden: Tensor,
    dweight: Tensor | None,
    dbias: Tensor,
) -> Tensor:
    """Return ``loss`` so that its gradients with respect to hidden, weight and bias are the given ones.

    Without ``dweight``, the weight's gradient was already added to main_grad, for an upstream gradient of 1.
    """
    return loss.clone()


@_attach_gradients.register_fake
def _attach_gradients_fake(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dhidden: Tensor,
    dweight: Tensor | None,
    dbias: Tensor,
) -> Tensor:
    return torch.empty_like(loss)


def _attach_gradients_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, _, _, dhidden, dweight, dbias = inputs
    ctx.save_for_backward(dhidden, dweight, dbias)


def _attach_gradients_autograd(ctx, upstream):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        refuse_double_backward(ctx)
    gradients = ctx.saved_tensors
    # Unless the graph is kept, these are now the only references: a gradient need not be copied to become `.grad`.
    ctx.maybe_clear_saved_tensors()
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    # The operations of a traced graph cannot depend on a value.
    traced = torch.compiler.is_compiling() or type(upstream) is not Tensor
    scale = None if not traced and not keeps_graph and upstream == 1 else upstream
    if ctx.needs_input_grad[2] and gradients[1] is None and not traced and upstream != 1:
        raise RuntimeError(
            f"with main_grad the weight's gradient is computed in the forward pass, for an upstream gradient of 1, got "
            f"{float(upstream)}: put the scale into loss_fn"
        )
    return (
        None,
        *(
            None if not needed or gradient is None else gradient if scale is None else gradient * scale
            for needed, gradient in zip(ctx.needs_input_grad[1:4], gradients, strict=True)
        ),
        None,
        None,
        None,
    )


_attach_gradients.register_autograd(_attach_gradients_autograd, setup_context=_attach_gradients_context)
