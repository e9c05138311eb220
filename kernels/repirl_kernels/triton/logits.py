"""``token_stats`` of given logits: the forward pass reads them once, the backward pass reads them once and writes their
gradient once.

One program reads one row, or one split of a long row, and keeps the row's running sums; ``merge_splits_kernel`` merges
the splits. Axes: N rows, V vocabulary.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from repirl_kernels.operands import Options
from repirl_kernels.reference import ForwardResult, RowGradients

from . import tiles
from .rows import exponentials, logit_gradient, merge_splits_kernel, move_sum, rescale, shifted_sum, soft_cap


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def logits_forward_kernel(
    logits_ptr,
    targets_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    shifted_ptr,
    argmax_ptr,
    inverse_temperatures_ptr,
    num_rows,
    num_splits,
    vocab_size,
    stride_logits,
    inverse_temperature,
    softcap,
    inverse_softcap,
    HAS_SOFTCAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    SPLIT_VOCAB: tl.constexpr,
):
    """Partial sums of one row over one vocabulary split; the program of split 0 also reads the target's logit."""
    # Tell the compiler what the host has checked: these are multiples of ALIGN, so that whole vectors can be loaded.
    vocab_size = vocab_size // ALIGN * ALIGN
    stride_logits = stride_logits // ALIGN * ALIGN
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    row_ptr = logits_ptr + row * stride_logits
    if EXTRAS:
        inverse_temperature = tl.load(inverse_temperatures_ptr + row)
    if split == 0:
        s_target = tl.load(row_ptr + tl.load(targets_ptr + row)).to(tl.float32)
        if HAS_SOFTCAP:
            s_target, _ = soft_cap(s_target, softcap, inverse_softcap)
        tl.store(target_ptr + row, s_target * inverse_temperature)

    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted = tl.zeros((), tl.float32)
    shifted = tl.zeros((), tl.float32)
    best_column = tl.full((), -1, tl.int32)
    start = split * SPLIT_VOCAB
    stop = tl.minimum(start + SPLIT_VOCAB, vocab_size)
    for first in range(start, stop, BLOCK_VOCAB):
        columns = first + tl.arange(0, BLOCK_VOCAB)
        s = tl.load(row_ptr + columns, mask=columns < stop, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            s, _ = soft_cap(s, softcap, inverse_softcap)
            s = tl.where(columns < stop, s, float("-inf"))
        if EXTRAS:
            largest, place = tl.max(s, axis=0, return_indices=True)
            best_column = tl.where(largest * inverse_temperature > maximum, first + place, best_column)
        else:
            largest = tl.max(s, axis=0)
        new_maximum = tl.maximum(maximum, largest * inverse_temperature)
        total, weighted = rescale(maximum, new_maximum, total, weighted)
        if EXTRAS:
            shifted = move_sum(maximum, new_maximum, shifted, first - start)
            shifted += tl.sum(shifted_sum(s, inverse_temperature, new_maximum, columns < stop), axis=0)
        maximum = new_maximum
        power, power_shifted = exponentials(s, inverse_temperature, maximum)
        total += tl.sum(power, axis=0)
        weighted += tl.sum(power_shifted, axis=0)

    partial = split.to(tl.int64) * num_rows + row
    tl.store(maximum_ptr + partial, maximum)
    tl.store(total_ptr + partial, total)
    tl.store(weighted_ptr + partial, weighted)
    if EXTRAS:
        tl.store(shifted_ptr + partial, shifted)
        tl.store(argmax_ptr + partial, best_column)


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def logits_backward_kernel(
    mass_ptr,
    onehot_ptr,
    slope_ptr,
    uniform_ptr,
    inverse_temperatures_ptr,
    logits_ptr,
    targets_ptr,
    logsumexp_ptr,
    mean_logit_ptr,
    dlogits_ptr,
    num_columns,
    vocab_size,
    stride_logits,
    stride_dlogits,
    inverse_temperature,
    softcap,
    inverse_softcap,
    HAS_SOFTCAP: tl.constexpr,
    EXTRAS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    """Gradient of one row's logits over one block of columns; 0 in columns >= ``vocab_size``."""
    vocab_size = vocab_size // ALIGN * ALIGN
    num_columns = num_columns // ALIGN * ALIGN
    stride_logits = stride_logits // ALIGN * ALIGN
    stride_dlogits = stride_dlogits // ALIGN * ALIGN
    num_blocks = tl.cdiv(num_columns, BLOCK_VOCAB)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    columns = (tl.program_id(0) % num_blocks) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    valid = columns < vocab_size
    s = tl.load(logits_ptr + row * stride_logits + columns, mask=valid, other=0.0).to(tl.float32)
    if EXTRAS:
        inverse_temperature = tl.load(inverse_temperatures_ptr + row)
    chain = inverse_temperature
    if HAS_SOFTCAP:
        s, cap_slope = soft_cap(s, softcap, inverse_softcap)
        chain = cap_slope * inverse_temperature
    dz = logit_gradient(
        s,
        columns == tl.load(targets_ptr + row),
        tl.load(mass_ptr + row),
        tl.load(onehot_ptr + row),
        tl.load(slope_ptr + row),
        tl.load(logsumexp_ptr + row),
        tl.load(mean_logit_ptr + row),
        inverse_temperature,
        True,
    )
    if EXTRAS:
        dz += tl.load(uniform_ptr + row)
    dlogits = tl.where(valid, dz * chain, 0.0).to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + row * stride_dlogits + columns, dlogits, mask=columns < num_columns)


def logits_forward(
    logits: Tensor, targets: Tensor, options: Options, row_temperature: Tensor | None = None
) -> ForwardResult:
    """Statistics ``[N]`` of ``logits [N, V]``; see :func:`merge_splits`.

    ``targets [N]`` are int64 in ``[0, vocab_size)``; columns from ``vocab_size`` on are not read. Rows may be
    strided, columns are contiguous. Raises TypeError for logits that are not float32, float16 or bfloat16.
    """
    tiles.check_dtype("logits", logits)
    num_rows, softcap, vocab_size = logits.shape[0], options.softcap, options.vocab_size
    extras = tiles.needs_extras(options, row_temperature)
    arch = tiles.architecture(logits.device, tiles.is_interpreted(logits_forward_kernel))
    tile = tiles.row_tile(arch, softcap is not None, extras)
    align = tiles.alignment(logits, vocab_size)
    num_splits = triton.cdiv(vocab_size, tile.split_vocab)
    partials = tiles.empty_partials(num_splits, num_rows, logits.device, extras)
    tiles.launch(
        logits_forward_kernel,
        num_rows * num_splits,
        dict(
            logits_ptr=logits,
            targets_ptr=targets,
            **partials,
            num_rows=num_rows,
            num_splits=num_splits,
            vocab_size=vocab_size,
            stride_logits=logits.stride(0),
            **tiles.temperature_arguments(options, row_temperature, extras, logits),
            **tiles.softcap_arguments(softcap),
        ),
        _forward_constants(tile, align, softcap is not None, extras),
    )
    return merge_splits(partials, num_rows, num_splits, options, extras, tile.split_vocab)


def logits_backward(
    gradients: RowGradients,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    row_temperature: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of ``logits [N, V]`` in ``dtype`` (by default their own); 0 in columns from ``vocab_size`` on.

    If ``logits`` are a part of the vocabulary, a target outside ``[0, V)`` is in another part.
    """
    dtype = dtype or logits.dtype
    num_rows, num_columns = logits.shape
    softcap, vocab_size = options.softcap, options.vocab_size
    extras = row_temperature is not None or gradients.uniform is not None
    interpreted = tiles.is_interpreted(logits_backward_kernel)
    arch = tiles.architecture(logits.device, interpreted)
    tile = tiles.row_tile(arch, softcap is not None, extras)
    align = min(tiles.alignment(logits, vocab_size), tiles.alignment(logits, num_columns))
    dlogits = torch.empty((num_rows, num_columns), dtype=tiles.gradient_dtype(dtype, interpreted), device=logits.device)
    tiles.launch(
        logits_backward_kernel,
        num_rows * triton.cdiv(num_columns, tile.block_vocab),
        dict(
            **tiles.gradient_arguments(gradients),
            logits_ptr=logits,
            targets_ptr=targets,
            dlogits_ptr=dlogits,
            num_columns=num_columns,
            vocab_size=vocab_size,
            stride_logits=logits.stride(0),
            stride_dlogits=num_columns,
            **tiles.temperature_arguments(options, row_temperature, extras, logits),
            **tiles.softcap_arguments(softcap),
        ),
        _backward_constants(tile, align, softcap is not None, extras),
    )
    return dlogits.to(dtype)


def merge_splits(
    partials: dict[str, Tensor], num_rows: int, num_splits: int, options: Options, extras: bool, split_columns: int
) -> ForwardResult:
    """Statistics ``[N]`` from the partial sums ``[num_splits, N]`` that a forward kernel wrote.

    A split has ``split_columns`` columns, the last one possibly fewer. Statistics that were not computed are ``None``.
    All are float32, except ``logsumexp``: it is the sum of two float32 numbers, in float64, because the backward pass
    needs it without rounding.
    """
    outputs = {
        f"{name}_ptr": torch.empty(num_rows, dtype=dtype, device=partials["total_ptr"].device)
        for name, dtype in (
            ("logprob", torch.float32),
            ("logsumexp", torch.float64),
            ("target_logit", torch.float32),
            ("entropy", torch.float32),
            ("mean_logprob", torch.float32),
            ("best_column", torch.int64),
            ("max_logit", torch.float32),
        )
    }
    tiles.launch(
        merge_splits_kernel,
        triton.cdiv(num_rows, tiles.MERGE_ROWS),
        dict(
            **partials,
            **outputs,
            num_rows=num_rows,
            num_splits=num_splits,
            vocab_size=options.vocab_size,
            split_columns=split_columns,
        ),
        _merge_constants(extras),
    )
    logprob, logsumexp, target_logit, entropy, mean_logprob, best_column, max_logit = outputs.values()
    return ForwardResult(
        logprob,
        logsumexp,
        target_logit,
        entropy if options.with_entropy else None,
        mean_logprob if options.label_smoothing else None,
        best_column if options.with_argmax else None,
        max_logit if options.with_argmax else None,
    )


def variants(arch: str) -> Iterator[tiles.Variant]:
    """Every specialisation of this module's kernels that can be launched on ``arch``."""
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for align in (16 // itemsize, 1):
            for softcap, extras in itertools.product((False, True), repeat=2):
                tile = tiles.row_tile(arch, softcap, extras)
                words = [dtype] + ["softcap"] * softcap + ["extras"] * extras + ["unaligned"] * (align == 1)
                label = " ".join(words)
                divisible = ["dlogits_ptr"] + ["logits_ptr"] * (align > 1)
                forward = _forward_constants(tile, align, softcap, extras)
                yield tiles.Variant.of(logits_forward_kernel, label, {"logits_ptr": dtype}, forward, divisible[1:])
                # Logits that linear_forward kept are float32, and their gradients have the operands' dtype.
                for gradient in ("bf16", "fp16", "fp32") if dtype == "fp32" else (dtype,):
                    pointers = {"logits_ptr": dtype, "dlogits_ptr": gradient}
                    constants = _backward_constants(tile, align, softcap, extras)
                    suffix = "" if gradient == dtype else f" to {gradient}"
                    yield tiles.Variant.of(logits_backward_kernel, label + suffix, pointers, constants, divisible)
    for extras in (False, True):
        label = "fp32" + " extras" * extras
        yield tiles.Variant.of(merge_splits_kernel, label, {"logsumexp_ptr": "fp64"}, _merge_constants(extras), [])


def _forward_constants(tile: tiles.RowTile, align: int, has_softcap: bool, extras: bool) -> dict[str, int | bool]:
    return {**_backward_constants(tile, align, has_softcap, extras), "SPLIT_VOCAB": tile.split_vocab}


def _backward_constants(tile: tiles.RowTile, align: int, has_softcap: bool, extras: bool) -> dict[str, int | bool]:
    return {
        "HAS_SOFTCAP": has_softcap,
        "EXTRAS": extras,
        "ALIGN": align,
        "BLOCK_VOCAB": tile.block_vocab,
        "num_warps": tile.num_warps,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }


def _merge_constants(extras: bool) -> dict[str, int | bool]:
    launch = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    return {"EXTRAS": extras, "BLOCK_ROWS": tiles.MERGE_ROWS, **launch}
