"""``linear_token_stats`` backward, vocabulary slab by slab.

For each slab a Triton kernel computes the logits again and writes their gradient ``[N, slab]`` in the operands' dtype.
The vendor's matrix products then compute the slab's rows of dW, which are written once, and add the slab's share of dH
to a float32 ``[N, D]`` accumulator. No memory of size ``[N, V]`` and no float32 ``[V, D]`` is needed, and the order of
the sums is fixed.

Axes: N rows, D features, V vocabulary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from repirl_kernels.operands import Options
from repirl_kernels.reference import RowGradients, rows_above

from . import tiles
from .linear_forward import (
    bias_argument,
    block_indices,
    choose_flags,
    halves,
    linear_constants,
    linear_variants,
    logits_tile,
    operand_alignment,
    with_extras_bias,
)
from .logits import logits_backward
from .rows import logit_gradient, soft_cap


@triton.jit
def store_gradient(
    s,
    bias_ptr,
    row_ptrs,
    inside,
    targets,
    within,
    slab_start,
    slab_stop,
    mass,
    onehot,
    slope,
    uniform,
    logsumexp,
    mean_logit,
    inverse_temperature,
    softcap,
    inverse_softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EXTRAS: tl.constexpr,
):
    """Store the gradient of the logits ``s`` (before bias, softcap and temperature), columns ``within`` of a slab."""
    columns = slab_start + within
    if HAS_BIAS:
        s += tl.load(bias_ptr + columns, mask=columns < slab_stop, other=0.0)[None, :]
    scale = inverse_temperature[:, None] if EXTRAS else inverse_temperature
    chain = scale
    if HAS_SOFTCAP:
        s, cap_slope = soft_cap(s, softcap, inverse_softcap)
        chain = cap_slope * scale
    dlogits = logit_gradient(
        s,
        columns[None, :] == targets[:, None],
        mass[:, None],
        onehot[:, None],
        slope[:, None],
        logsumexp[:, None],
        mean_logit[:, None],
        scale,
        ENTROPY,
    )
    if EXTRAS:
        dlogits += uniform[:, None]
    dlogits = chain * dlogits
    tl.store(
        row_ptrs[:, None] + within[None, :],
        dlogits.to(row_ptrs.dtype.element_ty),
        mask=inside[:, None] & (columns < slab_stop)[None, :],
    )


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def linear_dlogits_kernel(
    mass_ptr,
    onehot_ptr,
    slope_ptr,
    uniform_ptr,
    inverse_temperatures_ptr,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    logsumexp_ptr,
    mean_logit_ptr,
    dlogits_ptr,
    num_rows,
    hidden_size,
    slab_start,
    slab_stop,
    stride_hidden,
    stride_weight,
    stride_dlogits,
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
    """One tile of the gradient of the logits before softcap and temperature, in columns ``[slab_start, slab_stop)``."""
    num_column_blocks = tl.cdiv(slab_stop - slab_start, BLOCK_VOCAB)
    row_block, column_block = block_indices(tl.cdiv(num_rows, BLOCK_ROWS), num_column_blocks, GROUP_ROWS)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    safe_rows = tl.minimum(rows, num_rows - 1)
    within = column_block * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    columns = slab_start + within
    s = logits_tile(
        hidden_ptr,
        weight_ptr,
        safe_rows,
        tl.minimum(columns, slab_stop - 1),
        hidden_size,
        stride_hidden,
        stride_weight,
        ALIGN,
        UPCAST,
        BLOCK_ROWS,
        BLOCK_VOCAB,
        BLOCK_HIDDEN,
    )
    targets = tl.load(targets_ptr + safe_rows).to(tl.int32)
    mass = tl.load(mass_ptr + safe_rows)
    onehot = tl.load(onehot_ptr + safe_rows)
    slope = tl.load(slope_ptr + safe_rows) if ENTROPY else mass
    uniform = tl.load(uniform_ptr + safe_rows) if EXTRAS else mass
    scale = tl.load(inverse_temperatures_ptr + safe_rows) if EXTRAS else inverse_temperature
    logsumexp = tl.load(logsumexp_ptr + safe_rows)
    mean_logit = tl.load(mean_logit_ptr + safe_rows)
    row_ptrs = dlogits_ptr + rows.to(tl.int64) * stride_dlogits
    left, right = halves(s, BLOCK_ROWS, BLOCK_VOCAB)
    for half in tl.static_range(2):
        store_gradient(
            left if half == 0 else right,
            bias_ptr,
            row_ptrs,
            rows < num_rows,
            targets,
            column_block * BLOCK_VOCAB + half * (BLOCK_VOCAB // 2) + tl.arange(0, BLOCK_VOCAB // 2),
            slab_start,
            slab_stop,
            mass,
            onehot,
            slope,
            uniform,
            logsumexp,
            mean_logit,
            scale,
            softcap,
            inverse_softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            ENTROPY,
            EXTRAS,
        )


def linear_backward(
    gradients: RowGradients,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    row_temperature: Tensor | None = None,
    logits: Tensor | None = None,
    dweight_sum: Tensor | None = None,
    skip_below: Tensor | None = None,
    slab_bytes: int = tiles.SLAB_BYTES,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(dhidden [N, D], dweight [V, D], dbias [V])`` in the operands' dtypes, ``None`` where not needed.

    With the ``logits`` that :func:`linear_forward` wrote, they are not computed again. With ``dweight_sum``, float32
    ``[V, D]``, the weight's gradient is added to it, and ``None`` is returned instead. If all gradients of a row's
    logits in a slab are below its ``skip_below``, both products leave the row out in this slab (which makes the host
    wait for the GPU).

    ``slab_bytes`` is the largest size of the gradient buffer of a slab, which has at least one tile of columns. No
    other memory grows with N·V.
    """
    num_rows, hidden_size = hidden.shape
    vocab_size = options.vocab_size
    interpreted = tiles.is_interpreted(linear_dlogits_kernel)
    arch = tiles.architecture(hidden.device, interpreted)
    align = operand_alignment(hidden, weight)
    extras = row_temperature is not None or gradients.uniform is not None
    flags = choose_flags(options, bias, hidden.dtype, align, extras)
    kernel_bias = with_extras_bias(bias, vocab_size, flags, hidden.device)
    tile = tiles.backward_tile(arch, hidden.dtype, align, flags.has_bias, flags.has_softcap, extras)
    width = tiles.slab_width(num_rows, vocab_size, hidden.element_size(), tile.block_vocab, slab_bytes)
    constants = linear_constants(tile, align, flags, interpreted)
    arguments = dict(
        **tiles.gradient_arguments(gradients),
        hidden_ptr=hidden,
        weight_ptr=weight,
        bias_ptr=bias_argument(kernel_bias, weight),
        targets_ptr=targets,
        num_rows=num_rows,
        hidden_size=hidden_size,
        stride_hidden=hidden.stride(0),
        stride_weight=weight.stride(0),
        stride_dlogits=width,
        **tiles.temperature_arguments(options, row_temperature, extras, hidden),
        **tiles.softcap_arguments(options.softcap),
    )

    buffer = torch.empty(
        (num_rows, width if logits is None else 0),
        dtype=tiles.gradient_dtype(hidden.dtype, interpreted),
        device=hidden.device,
    )
    dhidden = torch.zeros((num_rows, hidden_size), dtype=torch.float32, device=hidden.device) if need_hidden else None
    dweight = None
    if need_weight and dweight_sum is None:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    dbias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
    if dweight is not None:
        dweight[vocab_size:] = 0
    for start in range(0, vocab_size, width):
        stop = min(start + width, vocab_size)
        if logits is not None:
            of_slab = options._replace(vocab_size=stop - start)
            dlogits = logits_backward(
                gradients, logits[:, start:stop], targets - start, of_slab, row_temperature, hidden.dtype
            )
        else:
            tiles.launch(
                linear_dlogits_kernel,
                triton.cdiv(num_rows, tile.block_rows) * triton.cdiv(stop - start, tile.block_vocab),
                dict(**arguments, dlogits_ptr=buffer, slab_start=start, slab_stop=stop),
                constants,
            )
            dlogits = buffer[:, : stop - start].to(hidden.dtype)
        if dbias is not None:
            torch.sum(dlogits, dim=0, dtype=torch.float32, out=dbias[start:stop])
        row_indices, hidden_part = None, hidden
        if skip_below is not None:
            row_indices = rows_above(dlogits, skip_below)
            dlogits, hidden_part = dlogits[row_indices], hidden[row_indices]
        if dweight_sum is not None:
            _accumulate_product(dweight_sum[start:stop], dlogits.T, hidden_part)
        if dweight is not None:
            _product_into(dweight[start:stop], dlogits.T, hidden_part)
        if dhidden is not None:
            if row_indices is None:
                _accumulate_product(dhidden, dlogits, weight[start:stop])
            else:
                part = torch.zeros((row_indices.shape[0], hidden_size), dtype=torch.float32, device=hidden.device)
                _accumulate_product(part, dlogits, weight[start:stop])
                dhidden.index_add_(0, row_indices, part)
    if dhidden is not None:
        dhidden = dhidden.to(hidden.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return dhidden, dweight, dbias


def variants(arch: str) -> Iterator[tiles.Variant]:
    """Every specialisation of this module's kernel that can be launched on ``arch``."""
    yield from linear_variants(linear_dlogits_kernel, tiles.backward_tile, arch)


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.is_cuda:
        torch.mm(a, b, out=out)
    else:
        # The interpreter runs on a CPU, where a half-precision product may be summed in half precision.
        out.copy_(a.float() @ b.float())


def _accumulate_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` in float32."""
    if a.dtype == torch.float32 or not a.is_cuda:
        out.addmm_(a.float(), b.float())
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
