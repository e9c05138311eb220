"""``linear_token_stats`` forward: statistics of ``hidden @ weight.T``; the logits stay in registers.

One program computes the logits of a block of rows and one vocabulary split, tile by tile with float32 accumulation. It
adds each tile to the rows' running sums, and writes three sums for each row; ``merge_splits_kernel`` merges the splits.
float32 operands are multiplied in IEEE float32 (not TF32), which is as exact as PyTorch's default.

Axes: N rows, D features, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from repirl_kernels.operands import Options
from repirl_kernels.reference import ForwardResult

from . import tiles
from .logits import logits_forward, merge_splits
from .rows import exponentials, move_sum, rescale, shifted_sum, soft_cap


@triton.jit
def logits_tile(
    hidden_ptr,
    weight_ptr,
    rows,
    columns,
    hidden_size,
    stride_hidden,
    stride_weight,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """float32 logits of ``rows`` x ``columns`` before bias, softcap and temperature; all indices are in range."""
    # Tell the compiler what the host has checked: these are multiples of ALIGN, so that whole vectors can be loaded.
    hidden_size = hidden_size // ALIGN * ALIGN
    stride_hidden = stride_hidden // ALIGN * ALIGN
    stride_weight = stride_weight // ALIGN * ALIGN
    features = tl.arange(0, BLOCK_HIDDEN)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden + features[None, :]
    weight_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight + features[:, None]
    s = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        inside = features < hidden_size - first
        h = tl.load(hidden_ptrs, mask=inside[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        if UPCAST:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        s = tl.dot(h, w, s, input_precision="ieee")
        hidden_ptrs += BLOCK_HIDDEN
        weight_ptrs += BLOCK_HIDDEN
    return s


@triton.jit
def fold_tile(
    s,
    bias_ptr,
    columns,
    targets,
    vocab_size,
    maximum,
    total,
    weighted,
    s_target,
    shifted,
    best_column,
    num_seen,
    inverse_temperature,
    softcap,
    inverse_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
):
    """Add the logits ``s`` of ``columns`` to the rows' running sums and target logits.

    ``inverse_temperature`` is a number, or with EXTRAS one for each row; ``num_seen`` columns of the split were added
    before.
    """
    if HAS_BIAS:
        s += tl.load(bias_ptr + columns, mask=columns < vocab_size, other=0.0)[None, :]
    if HAS_SOFTCAP:
        s, _ = soft_cap(s, softcap, inverse_softcap)
    s = tl.where((columns < vocab_size)[None, :], s, float("-inf"))
    s_target += tl.sum(tl.where(columns[None, :] == targets[:, None], s, 0.0), axis=1)
    if EXTRAS:
        largest, place = tl.max(s, axis=1, return_indices=True)
        largest *= inverse_temperature
        best_column = tl.where(largest > maximum, num_seen + place, best_column)
        of_columns = inverse_temperature[:, None]
    else:
        largest = tl.max(s, axis=1) * inverse_temperature
        of_columns = inverse_temperature
    new_maximum = tl.maximum(maximum, largest)
    total, weighted = rescale(maximum, new_maximum, total, weighted)
    power, power_shifted = exponentials(s, of_columns, new_maximum[:, None])
    total += tl.sum(power, axis=1)
    if ENTROPY:
        weighted += tl.sum(power_shifted, axis=1)
    if EXTRAS:
        valid = (columns < vocab_size)[None, :]
        shifted = move_sum(maximum, new_maximum, shifted, num_seen)
        shifted += tl.sum(shifted_sum(s, of_columns, new_maximum[:, None], valid), axis=1)
    return new_maximum, total, weighted, s_target, shifted, best_column


@triton.jit
def halves(s, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr):
    """The left and the right half of the columns: processing one after the other needs fewer registers."""
    return s.reshape(BLOCK_ROWS, 2, BLOCK_VOCAB // 2).permute(0, 2, 1).split()


@triton.jit
def block_indices(num_row_blocks, num_column_blocks, GROUP_ROWS: tl.constexpr):
    """(row block, column block) of this program; GROUP_ROWS row blocks share a column block, then take the next."""
    pid = tl.program_id(0)
    group = pid // (GROUP_ROWS * num_column_blocks)
    first_row_block = group * GROUP_ROWS
    group_size = tl.minimum(num_row_blocks - first_row_block, GROUP_ROWS)
    within = pid - group * (GROUP_ROWS * num_column_blocks)
    return first_row_block + within % group_size, within // group_size


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def linear_forward_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    shifted_ptr,
    argmax_ptr,
    inverse_temperatures_ptr,
    num_rows,
    hidden_size,
    vocab_size,
    num_splits,
    tiles_per_split,
    stride_hidden,
    stride_weight,
    inverse_temperature,
    softcap,
    inverse_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """Partial sums ``[num_splits, N]`` of a block of rows over one split, and the logits of targets in it."""
    row_block, split = block_indices(tl.cdiv(num_rows, BLOCK_ROWS), num_splits, GROUP_ROWS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    # Indices beyond the end are clamped to the last row or column. This is cheaper than masks, and their results are
    # not used.
    safe_rows = tl.minimum(rows, num_rows - 1)
    targets = tl.load(targets_ptr + safe_rows).to(tl.int32)

    maximum = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    s_target = tl.zeros((BLOCK_ROWS,), tl.float32)
    shifted = tl.zeros((BLOCK_ROWS,), tl.float32)
    best_column = tl.full((BLOCK_ROWS,), -1, tl.int32)
    scale = tl.load(inverse_temperatures_ptr + safe_rows) if EXTRAS else inverse_temperature
    start = split * tiles_per_split * BLOCK_VOCAB
    stop = tl.minimum(start + tiles_per_split * BLOCK_VOCAB, vocab_size)
    for first in range(start, stop, BLOCK_VOCAB):
        columns = first + tl.arange(0, BLOCK_VOCAB)
        s = logits_tile(
            hidden_ptr,
            weight_ptr,
            safe_rows,
            tl.minimum(columns, vocab_size - 1),
            hidden_size,
            stride_hidden,
            stride_weight,
            ALIGN,
            UPCAST,
            BLOCK_ROWS,
            BLOCK_VOCAB,
            BLOCK_HIDDEN,
        )
        left, right = halves(s, BLOCK_ROWS, BLOCK_VOCAB)
        for half in tl.static_range(2):
            first_column = first + half * (BLOCK_VOCAB // 2)
            maximum, total, weighted, s_target, shifted, best_column = fold_tile(
                left if half == 0 else right,
                bias_ptr,
                first_column + tl.arange(0, BLOCK_VOCAB // 2),
                targets,
                vocab_size,
                maximum,
                total,
                weighted,
                s_target,
                shifted,
                best_column,
                # Counted from the split's start. If this half begins beyond the last column, the count is too large,
                # but then the maximum does not change and the count has no effect.
                first_column - start,
                scale,
                softcap,
                inverse_softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
                ENTROPY,
                EXTRAS,
            )

    partials = rows + split.to(tl.int64) * num_rows
    tl.store(maximum_ptr + partials, maximum, mask=inside)
    tl.store(total_ptr + partials, total, mask=inside)
    tl.store(weighted_ptr + partials, weighted, mask=inside)
    if EXTRAS:
        tl.store(shifted_ptr + partials, shifted, mask=inside)
        tl.store(argmax_ptr + partials, start + best_column, mask=inside)
    tl.store(target_ptr + rows, s_target * scale, mask=inside & (targets >= start) & (targets < stop))


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    row_temperature: Tensor | None = None,
    logits: Tensor | None = None,
) -> ForwardResult:
    """Statistics ``[N]``; see :func:`merge_splits`.

    ``hidden [N, D]`` and ``weight [V, D]`` have one dtype (float32, float16 or bfloat16; else TypeError) and
    contiguous features; ``targets [N]`` are int64 in ``[0, vocab_size)``; weights and bias from
    ``vocab_size`` on are not read.

    If ``logits``, float32 ``[N, vocab_size]``, is given, the logits with bias are written to it, so that the backward
    pass need not compute them again. In this case the vendor's library computes the product.
    """
    tiles.check_dtype("hidden", hidden)
    softcap, vocab_size = options.softcap, options.vocab_size
    if logits is not None:
        _logits_into(logits, hidden, weight[:vocab_size])
        if bias is not None:
            logits += bias[:vocab_size]
        return logits_forward(logits, targets, options, row_temperature)
    num_rows, hidden_size = hidden.shape
    interpreted = tiles.is_interpreted(linear_forward_kernel)
    arch = tiles.architecture(hidden.device, interpreted)
    align = operand_alignment(hidden, weight)
    extras = tiles.needs_extras(options, row_temperature)
    flags = choose_flags(options, bias, hidden.dtype, align, extras)
    bias = with_extras_bias(bias, vocab_size, flags, hidden.device)
    tile = tiles.forward_tile(arch, hidden.dtype, align, flags.has_bias, flags.has_softcap, flags.extras)
    tiles_per_split, num_splits = tiles.split_tiles(vocab_size, tile.block_vocab, arch)
    partials = tiles.empty_partials(num_splits, num_rows, hidden.device, flags.extras)
    tiles.launch(
        linear_forward_kernel,
        triton.cdiv(num_rows, tile.block_rows) * num_splits,
        dict(
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=bias_argument(bias, weight),
            targets_ptr=targets,
            **partials,
            num_rows=num_rows,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_splits=num_splits,
            tiles_per_split=tiles_per_split,
            stride_hidden=hidden.stride(0),
            stride_weight=weight.stride(0),
            **tiles.temperature_arguments(options, row_temperature, flags.extras, hidden),
            **tiles.softcap_arguments(softcap),
        ),
        linear_constants(tile, align, flags, interpreted),
    )
    return merge_splits(partials, num_rows, num_splits, options, flags.extras, tiles_per_split * tile.block_vocab)


def _logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype == torch.float32 or not hidden.is_cuda:
        torch.mm(hidden.float(), weight.float().T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)


def operand_alignment(hidden: Tensor, weight: Tensor) -> int:
    """Elements of a 16-byte vector if all rows of both operands are whole, aligned vectors; else 1."""
    return min(tiles.alignment(hidden, hidden.shape[1]), tiles.alignment(weight, weight.shape[1]))


def bias_argument(bias: Tensor | None, weight: Tensor) -> Tensor:
    """The bias in float32, the one type the kernels read; without a bias, any pointer (it is not read)."""
    if bias is None:
        return torch.empty(1, dtype=torch.float32, device=weight.device)
    return bias.to(torch.float32).contiguous()


class Flags(NamedTuple):
    """What a linear kernel is compiled for."""

    has_bias: bool
    has_softcap: bool
    entropy: bool
    extras: bool


def choose_flags(options: Options, bias: Tensor | None, dtype: torch.dtype, align: int, extras: bool) -> Flags:
    """The variant to launch. To keep the number small, rare cases run in a variant that can do more than they need."""
    has_bias, has_softcap = bias is not None, options.softcap is not None
    plain = not has_bias and not has_softcap and not extras and align > 1 and dtype != torch.float32
    return Flags(has_bias or extras, has_softcap, options.with_entropy or not plain, extras)


def with_extras_bias(bias: Tensor | None, vocab_size: int, flags: Flags, device: torch.device) -> Tensor | None:
    """The bias; zeros if the variant needs a bias and there is none."""
    if bias is None and flags.has_bias:
        return torch.zeros(vocab_size, dtype=torch.float32, device=device)
    return bias


def linear_constants(tile: tiles.LinearTile, align: int, flags: Flags, interpreted: bool) -> dict[str, int | bool]:
    """Compile-time arguments and launch options of the linear kernels."""
    return {
        "HAS_BIAS": flags.has_bias,
        "HAS_SOFTCAP": flags.has_softcap,
        "ENTROPY": flags.entropy,
        "EXTRAS": flags.extras,
        "ALIGN": align,
        # Triton's interpreter multiplies the bit patterns of bfloat16 numbers: give it float32.
        "UPCAST": interpreted,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_VOCAB": tile.block_vocab,
        "BLOCK_HIDDEN": tile.block_hidden,
        "GROUP_ROWS": tiles.GROUP_ROWS,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def variants(arch: str) -> Iterator[tiles.Variant]:
    """All specialisations of this module's kernel that can be launched on ``arch``."""
    yield from linear_variants(linear_forward_kernel, tiles.forward_tile, arch)


def linear_variants(kernel: Any, tile_of: Callable[..., tiles.LinearTile], arch: str) -> Iterator[tiles.Variant]:
    """Variants of a linear kernel: operand types by alignment by flags; float16 with bias and softcap, or neither."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for align in (16 // dtype.itemsize, 1):
            all_flags = [Flags(b, s, True, False) for b, s in itertools.product((False, True), repeat=2)]
            all_flags += [Flags(True, has_softcap, True, True) for has_softcap in (False, True)]
            if align > 1 and dtype != torch.float32:
                all_flags.append(Flags(False, False, False, False))
            for flags in all_flags:
                if dtype == torch.float16 and (flags.has_bias != flags.has_softcap or flags.extras):
                    continue  # the same instructions as for bfloat16, except for the operands' type
                tile = tile_of(arch, dtype, align, flags.has_bias, flags.has_softcap, flags.extras)
                yield linear_variant(kernel, tile, dtype, align, flags)


def linear_variant(kernel: Any, tile: tiles.LinearTile, dtype: torch.dtype, align: int, flags: Flags) -> tiles.Variant:
    """The specialisation of a linear kernel for ``tile`` and operands of ``dtype`` aligned to ``align`` elements."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    words = [name, f"{tile.block_rows}x{tile.block_vocab}x{tile.block_hidden}/{tile.num_stages}"]
    words += ["bias"] * flags.has_bias + ["softcap"] * flags.has_softcap
    words += ["no entropy"] * (not flags.entropy) + ["extras"] * flags.extras + ["unaligned"] * (align == 1)
    return tiles.Variant.of(
        kernel,
        " ".join(words),
        {"hidden_ptr": name, "weight_ptr": name, "dlogits_ptr": name},
        linear_constants(tile, align, flags, interpreted=False),
        divisible=["dlogits_ptr", "stride_dlogits"] + (["hidden_ptr", "weight_ptr"] if align > 1 else []),
    )
