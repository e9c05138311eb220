"""Alternative kernels for ``linear_token_stats`` on a Hopper GPU, checked in float64 and timed beside a bare product.

    python -m bench.candidates --list
    python -m bench.candidates NAME --rows 16384 --features 4096 --columns 131072 --device cuda --json FILE

Run each candidate in a separate process with a time limit: a faulty warp-specialised kernel may hang. ``FILE`` is
written after the check, and again after the timing; a candidate with wrong results is not timed. ``--device cpu``
(under ``TRITON_INTERPRET=1``, in float32) checks the sums on tiny tiles, without timing. The Gluon candidate needs a
GPU.

The kernels here keep a row's maximum in base 2: with ``x = s log2(e) / T`` they sum ``2^(x - m)`` and ``2^(x - m) (x -
m)``, which takes one fused multiply-add and one ``exp2`` per element. Logits must be finite (no banned tokens).

Axes: N rows, D features, V vocabulary.
"""

import argparse
import json
import math
import os
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from repirl_kernels.operands import Options
from repirl_kernels.reference import ForwardResult, RowGradients
from repirl_kernels.rows import fold_upstream
from repirl_kernels.triton import tiles
from repirl_kernels.triton.linear_backward import linear_backward, linear_dlogits_kernel
from repirl_kernels.triton.linear_forward import (
    Flags,
    block_indices,
    halves,
    linear_constants,
    linear_forward,
    linear_forward_kernel,
)
from repirl_kernels.triton.logits import logits_backward_kernel, merge_splits
from repirl_kernels.triton.rows import logit_gradient
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.turns import wait_for_turn

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:
    gluon = None

CHECKED_ROWS = 256
# Largest relative errors due to rounding: statistics are float32, gradients have the operands' dtype.
LARGEST_ERROR = {"forward": 1e-4, "dlogits": 1e-2, "backward": 1e-2}
SEED = 20
TEMPERATURE = 0.7
# Arguments of the production kernels that the candidates do not take.
NOT_IN_CANDIDATES = ("uniform_ptr", "inverse_temperatures_ptr")
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 5, 40, 0.6
MAX_PRODUCT_BYTES = 12 * 2**30
MIB = 2**20

# Used in place of -inf: 0 times this number is 0, so no select is needed.
_LOW = tl.constexpr(-1e30)

FLAT_TILES = ((128, 256, 64, 4, 8), (128, 256, 64, 3, 8), (128, 128, 64, 4, 8))


# --- forward ------------------------------------------------------------------------------------------------------


@triton.jit
def fold_base2(s, maximum, total, weighted, scale):
    """Add the finite logits ``s`` to the running sums; ``maximum`` is that of ``s * scale``."""
    new_maximum = tl.maximum(maximum, tl.max(s, axis=1) * scale)
    shift = maximum - new_maximum
    factor = tl.exp2(shift)
    weighted = factor * tl.fma(shift, total, weighted)
    total = factor * total
    d = tl.fma(s, scale, -new_maximum[:, None])
    power = tl.exp2(d)
    return new_maximum, total + tl.sum(power, axis=1), weighted + tl.sum(power * d, axis=1)


@triton.jit
def fold_whole_tile(
    s,
    first,
    targets,
    vocab_size,
    maximum,
    total,
    weighted,
    s_target,
    scale,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
):
    """Add the tile that begins at column ``first`` to the running sums; only the last tile is masked."""
    half_vocab: tl.constexpr = BLOCK_VOCAB // 2
    left, right = halves(s, BLOCK_ROWS, BLOCK_VOCAB)
    columns = first + tl.arange(0, half_vocab)
    if first + BLOCK_VOCAB > vocab_size:
        left = tl.where((columns < vocab_size)[None, :], left, _LOW)
        right = tl.where((columns + half_vocab < vocab_size)[None, :], right, _LOW)
    hits = tl.max(((targets >= first) & (targets < first + BLOCK_VOCAB)).to(tl.int32), axis=0)
    if hits > 0:
        s_target += tl.sum(tl.where(columns[None, :] == targets[:, None], left, 0.0), axis=1)
        s_target += tl.sum(tl.where((columns + half_vocab)[None, :] == targets[:, None], right, 0.0), axis=1)
    maximum, total, weighted = fold_base2(left, maximum, total, weighted, scale)
    maximum, total, weighted = fold_base2(right, maximum, total, weighted, scale)
    return maximum, total, weighted, s_target


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def descriptor_forward_kernel(
    hidden_desc,
    weight_desc,
    targets_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    num_rows,
    hidden_size,
    vocab_size,
    num_splits,
    tiles_per_split,
    inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """``linear_forward_kernel`` with TMA loads. FLAT: one loop over tiles and D, so that loads go on between tiles."""
    row_block, split = block_indices(tl.cdiv(num_rows, BLOCK_ROWS), num_splits, GROUP_ROWS)
    first_row = row_block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1).to(tl.int32)
    scale = inverse_temperature * 1.4426950408889634
    maximum = tl.full((BLOCK_ROWS,), _LOW, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    s_target = tl.zeros((BLOCK_ROWS,), tl.float32)
    start = split * tiles_per_split * BLOCK_VOCAB
    stop = tl.minimum(start + tiles_per_split * BLOCK_VOCAB, vocab_size)
    steps = tl.cdiv(hidden_size, BLOCK_HIDDEN)
    if FLAT:
        s = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
        step = 0
        first = start
        for _ in tl.range(0, tl.cdiv(stop - start, BLOCK_VOCAB) * steps, num_stages=STAGES):
            h = hidden_desc.load([first_row, step * BLOCK_HIDDEN])
            w = weight_desc.load([first, step * BLOCK_HIDDEN])
            s = tl.dot(h, w.T, s, input_precision="ieee")
            step += 1
            if step == steps:
                maximum, total, weighted, s_target = fold_whole_tile(
                    s, first, targets, vocab_size, maximum, total, weighted, s_target, scale, BLOCK_ROWS, BLOCK_VOCAB
                )
                s = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
                step = 0
                first += BLOCK_VOCAB
    else:
        for first in tl.range(start, stop, BLOCK_VOCAB):
            s = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                h = hidden_desc.load([first_row, step * BLOCK_HIDDEN])
                w = weight_desc.load([first, step * BLOCK_HIDDEN])
                s = tl.dot(h, w.T, s, input_precision="ieee")
            maximum, total, weighted, s_target = fold_whole_tile(
                s, first, targets, vocab_size, maximum, total, weighted, s_target, scale, BLOCK_ROWS, BLOCK_VOCAB
            )
    partials = rows + split.to(tl.int64) * num_rows
    tl.store(maximum_ptr + partials, maximum * 0.6931471805599453, mask=inside)
    tl.store(total_ptr + partials, total, mask=inside)
    tl.store(weighted_ptr + partials, weighted, mask=inside)
    here = inside & (targets >= start) & (targets < stop)
    tl.store(target_ptr + rows, s_target * inverse_temperature, mask=here)


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def block_statistics_kernel(
    logits_ptr,
    targets_ptr,
    maximum_ptr,
    total_ptr,
    weighted_ptr,
    target_ptr,
    slab_start,
    num_columns,
    stride_logits,
    inverse_temperature,
    BLOCK_VOCAB: tl.constexpr,
):
    """One row's partial sums over a block of logits, columns from ``slab_start`` on; each lane has its own sums."""
    # Tell the compiler that these are multiples of four, so that four values are loaded at a time.
    stride_logits = stride_logits // 4 * 4
    num_columns = num_columns // 4 * 4
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    scale = inverse_temperature * 1.4426950408889634
    target = tl.load(targets_ptr + row) - slab_start
    if (target >= 0) & (target < num_columns):
        tl.store(target_ptr + row, tl.load(row_ptr + target) * inverse_temperature)
    lanes = tl.arange(0, BLOCK_VOCAB)
    maximum = tl.full((BLOCK_VOCAB,), _LOW, tl.float32)
    total = tl.zeros((BLOCK_VOCAB,), tl.float32)
    weighted = tl.zeros((BLOCK_VOCAB,), tl.float32)
    for first in range(0, num_columns, BLOCK_VOCAB):
        s = tl.load(row_ptr + first + lanes, mask=first + lanes < num_columns, other=_LOW)
        new_maximum = tl.maximum(maximum, s * scale)
        shift = maximum - new_maximum
        factor = tl.exp2(shift)
        weighted = factor * tl.fma(shift, total, weighted)
        total = factor * total
        maximum = new_maximum
        d = tl.fma(s, scale, -maximum)
        power = tl.exp2(d)
        total += power
        weighted += power * d
    top = tl.max(maximum, axis=0)
    shift = maximum - top
    factor = tl.exp2(shift)
    weighted = factor * tl.fma(shift, total, weighted)
    tl.store(maximum_ptr + row, top * 0.6931471805599453)
    tl.store(total_ptr + row, tl.sum(factor * total, axis=0))
    tl.store(weighted_ptr + row, tl.sum(weighted, axis=0))


if gluon is not None:
    _tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

    @gluon.jit
    def work_indices(work, num_row_blocks, num_splits, GROUP_ROWS: gl.constexpr):
        """(row block, split) of work item ``work``; ``block_indices`` does the same for a program."""
        group = work // (GROUP_ROWS * num_splits)
        first = group * GROUP_ROWS
        size = min(num_row_blocks - first, GROUP_ROWS)
        within = work - group * (GROUP_ROWS * num_splits)
        return first + within % size, within // size

    @gluon.jit
    def load_tiles(
        hidden_desc,
        weight_desc,
        hidden_buffers,
        weight_buffers,
        full,
        empty,
        num_row_blocks,
        num_splits,
        tiles_per_split,
        num_tiles,
        steps,
        BLOCK_ROWS: gl.constexpr,
        BLOCK_VOCAB: gl.constexpr,
        BLOCK_HIDDEN: gl.constexpr,
        STAGES: gl.constexpr,
        GROUP_ROWS: gl.constexpr,
    ):
        """The producer warp: loads the operands of this persistent program's work items into the ring of stages."""
        count = 0
        for work in range(gl.program_id(0), num_row_blocks * num_splits, gl.num_programs(0)):
            row_block, split = work_indices(work, num_row_blocks, num_splits, GROUP_ROWS)
            first = split * tiles_per_split
            for tile in range(first, min(first + tiles_per_split, num_tiles)):
                for step in range(steps):
                    stage = count % STAGES
                    mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
                    mbarrier.expect(full.index(stage), (BLOCK_ROWS + BLOCK_VOCAB) * BLOCK_HIDDEN * 2)
                    for half in gl.static_range(2):
                        _tma_load(
                            hidden_desc,
                            [row_block * BLOCK_ROWS + half * (BLOCK_ROWS // 2), step * BLOCK_HIDDEN],
                            full.index(stage),
                            hidden_buffers.index(stage * 2 + half),
                        )
                    _tma_load(
                        weight_desc,
                        [tile * BLOCK_VOCAB, step * BLOCK_HIDDEN],
                        full.index(stage),
                        weight_buffers.index(stage),
                    )
                    count += 1

    @gluon.jit
    def fold_rows(
        HALF: gl.constexpr,
        hidden_buffers,
        weight_buffers,
        full,
        empty,
        targets_ptr,
        maximum_ptr,
        total_ptr,
        weighted_ptr,
        target_ptr,
        num_rows,
        vocab_size,
        inverse_temperature,
        num_row_blocks,
        num_splits,
        tiles_per_split,
        num_tiles,
        steps,
        BLOCK_ROWS: gl.constexpr,
        BLOCK_VOCAB: gl.constexpr,
        STAGES: gl.constexpr,
        GROUP_ROWS: gl.constexpr,
    ):
        """A consumer warpgroup: the products and the running sums of half of the tile's rows."""
        height: gl.constexpr = BLOCK_ROWS // 2
        product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_VOCAB, 16])
        of_rows: gl.constexpr = gl.SliceLayout(1, product)
        of_columns: gl.constexpr = gl.SliceLayout(0, product)
        scale = inverse_temperature * 1.4426950408889634
        count = 0
        for work in range(gl.program_id(0), num_row_blocks * num_splits, gl.num_programs(0)):
            row_block, split = work_indices(work, num_row_blocks, num_splits, GROUP_ROWS)
            rows = row_block * BLOCK_ROWS + HALF * height + gl.arange(0, height, of_rows)
            inside = rows < num_rows
            targets = gl.load(targets_ptr + rows, mask=inside, other=-1).to(gl.int32)
            maximum = gl.full([height], -1e30, gl.float32, of_rows)
            total = gl.full([height], 0.0, gl.float32, of_rows)
            weighted = gl.full([height], 0.0, gl.float32, of_rows)
            s_target = gl.full([height], 0.0, gl.float32, of_rows)
            first = split * tiles_per_split
            last = min(first + tiles_per_split, num_tiles)
            for tile in range(first, last):
                acc = gl.zeros([height, BLOCK_VOCAB], gl.float32, product)
                for step in range(steps):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    h = hidden_buffers.index(stage * 2 + HALF)
                    w = weight_buffers.index(stage).permute((1, 0))
                    acc = warpgroup_mma(h, w, acc, use_acc=step > 0, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                    # One product may still run, so only the stage before this one is free.
                    if step > 0:
                        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
                    count += 1
                s = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
                columns = tile * BLOCK_VOCAB + gl.arange(0, BLOCK_VOCAB, of_columns)
                if (tile + 1) * BLOCK_VOCAB > vocab_size:
                    s = gl.where((columns < vocab_size)[None, :], s, -1e30)
                here = (targets >= tile * BLOCK_VOCAB) & (targets < (tile + 1) * BLOCK_VOCAB)
                if gl.max(here.to(gl.int32), axis=0) > 0:
                    s_target += gl.sum(gl.where(columns[None, :] == targets[:, None], s, 0.0), axis=1)
                new_maximum = gl.maximum(maximum, gl.max(s, axis=1) * scale)
                shift = maximum - new_maximum
                factor = gl.exp2(shift)
                weighted = factor * (shift * total + weighted)
                total = factor * total
                maximum = new_maximum
                # The compiler contracts this to a fused multiply-add; Gluon's own does not broadcast.
                d = s * scale - maximum[:, None]
                power = gl.exp2(d)
                total += gl.sum(power, axis=1)
                weighted += gl.sum(power * d, axis=1)
            partials = rows + split.to(gl.int64) * num_rows
            gl.store(maximum_ptr + partials, maximum * 0.6931471805599453, mask=inside)
            gl.store(total_ptr + partials, total, mask=inside)
            gl.store(weighted_ptr + partials, weighted, mask=inside)
            here = inside & (targets >= first * BLOCK_VOCAB) & (targets < last * BLOCK_VOCAB)
            gl.store(target_ptr + rows, s_target * inverse_temperature, mask=here)

    @gluon.jit
    def fold_upper(
        hidden_buffers, weight_buffers, full, empty, targets_ptr, maximum_ptr, total_ptr, weighted_ptr, target_ptr,
        num_rows, vocab_size, inverse_temperature, num_row_blocks, num_splits, tiles_per_split, num_tiles, steps,
        BLOCK_ROWS: gl.constexpr, BLOCK_VOCAB: gl.constexpr, STAGES: gl.constexpr, GROUP_ROWS: gl.constexpr,
    ):  # fmt: skip
        fold_rows(
            0, hidden_buffers, weight_buffers, full, empty, targets_ptr, maximum_ptr, total_ptr, weighted_ptr,
            target_ptr, num_rows, vocab_size, inverse_temperature, num_row_blocks, num_splits, tiles_per_split,
            num_tiles, steps, BLOCK_ROWS, BLOCK_VOCAB, STAGES, GROUP_ROWS,
        )  # fmt: skip

    @gluon.jit
    def fold_lower(
        hidden_buffers, weight_buffers, full, empty, targets_ptr, maximum_ptr, total_ptr, weighted_ptr, target_ptr,
        num_rows, vocab_size, inverse_temperature, num_row_blocks, num_splits, tiles_per_split, num_tiles, steps,
        BLOCK_ROWS: gl.constexpr, BLOCK_VOCAB: gl.constexpr, STAGES: gl.constexpr, GROUP_ROWS: gl.constexpr,
    ):  # fmt: skip
        fold_rows(
            1, hidden_buffers, weight_buffers, full, empty, targets_ptr, maximum_ptr, total_ptr, weighted_ptr,
            target_ptr, num_rows, vocab_size, inverse_temperature, num_row_blocks, num_splits, tiles_per_split,
            num_tiles, steps, BLOCK_ROWS, BLOCK_VOCAB, STAGES, GROUP_ROWS,
        )  # fmt: skip

    @gluon.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
    def specialised_forward_kernel(
        hidden_desc,
        weight_desc,
        targets_ptr,
        maximum_ptr,
        total_ptr,
        weighted_ptr,
        target_ptr,
        num_rows,
        hidden_size,
        vocab_size,
        num_splits,
        tiles_per_split,
        inverse_temperature,
        BLOCK_ROWS: gl.constexpr,
        BLOCK_VOCAB: gl.constexpr,
        BLOCK_HIDDEN: gl.constexpr,
        STAGES: gl.constexpr,
        GROUP_ROWS: gl.constexpr,
    ):
        """Persistent kernel: a producer warp and two consumer warpgroups, which share each tile of the weight."""
        num_row_blocks = gl.cdiv(num_rows, BLOCK_ROWS)
        num_tiles = gl.cdiv(vocab_size, BLOCK_VOCAB)
        steps = gl.cdiv(hidden_size, BLOCK_HIDDEN)
        hidden_buffers = gl.allocate_shared_memory(
            gl.bfloat16, [2 * STAGES, BLOCK_ROWS // 2, BLOCK_HIDDEN], hidden_desc.layout
        )
        weight_buffers = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_VOCAB, BLOCK_HIDDEN], weight_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
        # The tuples are written in the call: assigned to a name, they would lose their compile-time constants.
        gl.warp_specialize(
            [
                (fold_upper, (
                hidden_buffers, weight_buffers, full, empty, targets_ptr, maximum_ptr, total_ptr, weighted_ptr,
                target_ptr, num_rows, vocab_size, inverse_temperature, num_row_blocks, num_splits, tiles_per_split,
                num_tiles, steps, BLOCK_ROWS, BLOCK_VOCAB, STAGES, GROUP_ROWS,
                )),
                (fold_lower, (
                hidden_buffers, weight_buffers, full, empty, targets_ptr, maximum_ptr, total_ptr, weighted_ptr,
                target_ptr, num_rows, vocab_size, inverse_temperature, num_row_blocks, num_splits, tiles_per_split,
                num_tiles, steps, BLOCK_ROWS, BLOCK_VOCAB, STAGES, GROUP_ROWS,
                )),
                (load_tiles, (
                hidden_desc, weight_desc, hidden_buffers, weight_buffers, full, empty, num_row_blocks, num_splits,
                tiles_per_split, num_tiles, steps, BLOCK_ROWS, BLOCK_VOCAB, BLOCK_HIDDEN, STAGES, GROUP_ROWS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


# --- gradient of the logits -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=tiles.RUNTIME_ARGUMENTS)
def quarters_dlogits_kernel(
    hidden_desc,
    weight_desc,
    output,
    mass_ptr,
    onehot_ptr,
    slope_ptr,
    targets_ptr,
    logsumexp_ptr,
    mean_logit_ptr,
    num_rows,
    hidden_size,
    slab_start,
    slab_stop,
    stride_output,
    inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    TMA_STORES: tl.constexpr,
):
    """A tile of a slab's gradient, in quarters. The slab's width is a multiple of the tile's: no column is masked."""
    num_column_blocks = tl.cdiv(slab_stop - slab_start, BLOCK_VOCAB)
    row_block, column_block = block_indices(tl.cdiv(num_rows, BLOCK_ROWS), num_column_blocks, GROUP_ROWS)
    first_row = row_block * BLOCK_ROWS
    first_column = column_block * BLOCK_VOCAB
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    safe_rows = tl.minimum(rows, num_rows - 1)
    s = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        h = hidden_desc.load([first_row, first])
        w = weight_desc.load([slab_start + first_column, first])
        s = tl.dot(h, w.T, s, input_precision="ieee")
    targets = tl.load(targets_ptr + safe_rows).to(tl.int32) - slab_start
    mass = tl.load(mass_ptr + safe_rows)
    onehot = tl.load(onehot_ptr + safe_rows)
    slope = tl.load(slope_ptr + safe_rows)
    logsumexp = tl.load(logsumexp_ptr + safe_rows)
    mean_logit = tl.load(mean_logit_ptr + safe_rows)
    quarter_vocab: tl.constexpr = BLOCK_VOCAB // 4
    left, right = halves(s, BLOCK_ROWS, BLOCK_VOCAB)
    for half in tl.static_range(2):
        first_quarter, second_quarter = halves(left if half == 0 else right, BLOCK_ROWS, BLOCK_VOCAB // 2)
        for quarter in tl.static_range(2):
            first = first_column + (half * 2 + quarter) * quarter_vocab
            columns = first + tl.arange(0, quarter_vocab)
            dlogits = inverse_temperature * logit_gradient(
                first_quarter if quarter == 0 else second_quarter,
                columns[None, :] == targets[:, None],
                mass[:, None],
                onehot[:, None],
                slope[:, None],
                logsumexp[:, None],
                mean_logit[:, None],
                inverse_temperature,
                True,
            )
            if TMA_STORES:
                output.store([first_row, first], dlogits.to(output.dtype))
            else:
                pointers = output + rows.to(tl.int64)[:, None] * (stride_output // 8 * 8) + columns[None, :]
                tl.store(pointers, dlogits.to(output.dtype.element_ty), mask=(rows < num_rows)[:, None])


# --- candidates -----------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Inputs, and the coefficients of the gradient that the backward candidates need."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    inverse_temperature: float = 1 / TEMPERATURE
    gradients: RowGradients | None = None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[0]

    @property
    def features(self) -> int:
        return self.hidden.shape[1]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def interpreted(self) -> bool:
        return self.device.type == "cpu"

    @property
    def options(self) -> Options:
        return Options(TEMPERATURE, None, -100, self.columns, 0.0, True, False, "triton")

    def gradient_arguments(self) -> dict[str, Any]:
        """Arguments of the production kernels; the candidates take no ``uniform`` and no temperatures of rows."""
        assert self.gradients is not None
        return {
            **tiles.gradient_arguments(self.gradients),
            **tiles.temperature_arguments(self.options, None, False, self.hidden),
        }

    def partials(self, num_splits: int) -> dict[str, Tensor]:
        """Memory for the partial sums of the candidates' forward kernels."""
        partials = tiles.empty_partials(num_splits, self.rows, self.device, False)
        return {name: partials[name] for name in ("maximum_ptr", "total_ptr", "weighted_ptr", "target_ptr")}

    def merged(self, partials: dict[str, Tensor], num_splits: int) -> ForwardResult:
        argmax = torch.empty((1, 1), dtype=torch.int32, device=self.device)
        unused = {"shifted_ptr": partials["total_ptr"], "argmax_ptr": argmax}
        return merge_splits({**partials, **unused}, self.rows, num_splits, self.options, False, 0)


@dataclass
class Prepared:
    """A candidate with its inputs; ``slab(start, stop)`` returns the gradient of a slab's logits."""

    run: Callable[[], Any]
    kernel: Any = None
    slab: Callable[[int, int], Tensor] | None = None
    slabs: list[tuple[int, int]] = field(default_factory=list)
    graph: bool = False
    pieces: dict[str, Callable[[], Any]] = field(default_factory=dict)


def make_problem(rows: int, features: int, columns: int, device: str) -> Problem:
    if features % 8 or columns % 8:
        raise ValueError(
            f"candidates read whole vectors: features and columns must be multiples of 8, got {features}, {columns}"
        )
    torch.manual_seed(SEED)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(rows, features, dtype=dtype, device=device)
    weight = torch.randn(columns, features, dtype=dtype, device=device).mul_(3 / math.sqrt(features))
    return Problem(hidden, weight, torch.randint(columns, (rows,), device=device))


def add_upstream(problem: Problem) -> None:
    """Set random upstream gradients of the four statistics; the production kernel computes the statistics."""
    g_logprob, g_logsumexp, g_target_logit, g_entropy = torch.randn(4, problem.rows, device=problem.device)
    forward_result = production_forward(problem)
    logsumexp, entropy = forward_result.logsumexp.float(), forward_result.entropy
    upstream, stats = (
        (g_logprob, g_logsumexp, g_target_logit, g_entropy),
        (logsumexp, entropy, torch.zeros_like(logsumexp)),
    )
    problem.gradients = fold_upstream(upstream, stats, 0.0, problem.columns)


def production_forward(problem: Problem) -> ForwardResult:
    return linear_forward(problem.hidden, problem.weight, problem.targets, None, problem.options)


def forward_pointer(problem: Problem) -> Prepared:
    return Prepared(lambda: production_forward(problem), linear_forward_kernel)


def forward_descriptors(problem: Problem, flat: bool, tile: Sequence[int]) -> Prepared:
    block_rows, block_vocab, block_hidden, stages, warps = (16, 32, 16, 2, 1) if problem.interpreted else tile
    hidden_desc = TensorDescriptor.from_tensor(problem.hidden, [block_rows, block_hidden])
    weight_desc = TensorDescriptor.from_tensor(problem.weight, [block_vocab, block_hidden])
    arch = tiles.architecture(problem.device, problem.interpreted)
    tiles_per_split, num_splits = tiles.split_tiles(problem.columns, block_vocab, arch)
    grid = (triton.cdiv(problem.rows, block_rows) * num_splits,)

    def run() -> ForwardResult:
        partials = problem.partials(num_splits)
        descriptor_forward_kernel[grid](
            hidden_desc,
            weight_desc,
            problem.targets,
            **partials,
            num_rows=problem.rows,
            hidden_size=problem.features,
            vocab_size=problem.columns,
            num_splits=num_splits,
            tiles_per_split=tiles_per_split,
            inverse_temperature=problem.inverse_temperature,
            BLOCK_ROWS=block_rows,
            BLOCK_VOCAB=block_vocab,
            BLOCK_HIDDEN=block_hidden,
            GROUP_ROWS=tiles.GROUP_ROWS,
            STAGES=stages,
            FLAT=flat,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )
        return problem.merged(partials, num_splits)

    return Prepared(run, descriptor_forward_kernel)


def forward_gluon(problem: Problem, tile: Sequence[int]) -> Prepared:
    if gluon is None:
        raise RuntimeError("this Triton has no Gluon for Hopper")
    block_rows, block_vocab, block_hidden, stages = tile
    layouts = [
        gl.NVMMASharedLayout.get_default_for([height, block_hidden], gl.bfloat16)
        for height in (block_rows // 2, block_vocab)
    ]
    hidden_desc = GluonDescriptor.from_tensor(problem.hidden, [block_rows // 2, block_hidden], layouts[0])
    weight_desc = GluonDescriptor.from_tensor(problem.weight, [block_vocab, block_hidden], layouts[1])
    arch = tiles.architecture(problem.device, False)
    tiles_per_split, num_splits = tiles.split_tiles(problem.columns, block_vocab, arch)
    work = triton.cdiv(problem.rows, block_rows) * num_splits
    grid = (min(work, torch.cuda.get_device_properties(problem.device).multi_processor_count),)

    def run() -> ForwardResult:
        partials = problem.partials(num_splits)
        specialised_forward_kernel[grid](
            hidden_desc,
            weight_desc,
            problem.targets,
            **partials,
            num_rows=problem.rows,
            hidden_size=problem.features,
            vocab_size=problem.columns,
            num_splits=num_splits,
            tiles_per_split=tiles_per_split,
            inverse_temperature=problem.inverse_temperature,
            BLOCK_ROWS=block_rows,
            BLOCK_VOCAB=block_vocab,
            BLOCK_HIDDEN=block_hidden,
            STAGES=stages,
            GROUP_ROWS=tiles.GROUP_ROWS,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return problem.merged(partials, num_splits)

    return Prepared(run, specialised_forward_kernel)


def cublas_block(problem: Problem, mib: int) -> tuple[int, int]:
    """(rows, columns) of a float32 block of logits of ``mib`` MiB."""
    if problem.interpreted:
        return 16, 32
    rows = min(2048, problem.rows)
    return rows, min(mib * MIB // (4 * rows) // 256 * 256, triton.cdiv(problem.columns, 8) * 8)


def product_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)


def forward_cublas(problem: Problem, mib: int) -> Prepared:
    height, width = cublas_block(problem, mib)
    block = torch.empty(height * width, dtype=torch.float32, device=problem.device)
    num_blocks = triton.cdiv(problem.columns, width)

    def run() -> ForwardResult:
        partials = problem.partials(num_blocks)
        for top in range(0, problem.rows, height):
            bottom = min(top + height, problem.rows)
            for index in range(num_blocks):
                start, stop = index * width, min((index + 1) * width, problem.columns)
                logits = block[: (bottom - top) * (stop - start)].view(bottom - top, stop - start)
                product_into(logits, problem.hidden[top:bottom], problem.weight[start:stop])
                block_statistics_kernel[(bottom - top,)](
                    logits,
                    problem.targets[top:],
                    partials["maximum_ptr"][index, top:],
                    partials["total_ptr"][index, top:],
                    partials["weighted_ptr"][index, top:],
                    partials["target_ptr"][top:],
                    slab_start=start,
                    num_columns=stop - start,
                    stride_logits=stop - start,
                    inverse_temperature=problem.inverse_temperature,
                    BLOCK_VOCAB=16 if problem.interpreted else 2048,
                    num_warps=4,
                    enable_fp_fusion=False,
                )
        return problem.merged(partials, num_blocks)

    return Prepared(run, block_statistics_kernel, graph=True)


def slabs(problem: Problem, width: int) -> list[tuple[int, int]]:
    return [(start, min(start + width, problem.columns)) for start in range(0, problem.columns, width)]


def gradient_tile(problem: Problem, mib: int) -> tuple[tiles.LinearTile, int]:
    """The production kernel's tile, and the width of a slab of ``mib`` MiB."""
    if problem.interpreted:
        tile = tiles.LinearTile(16, 32, 16, 1, 1)
        return tile, 2 * tile.block_vocab
    arch = tiles.architecture(problem.device, False)
    tile = tiles.backward_tile(arch, problem.hidden.dtype, 8, False, False)
    itemsize = problem.hidden.element_size()
    return tile, tiles.slab_width(problem.rows, problem.columns, itemsize, tile.block_vocab, mib * MIB)


def all_slabs(problem: Problem, width: int, slab: Callable[[int, int], Tensor], kernel: Any) -> Prepared:
    ranges = slabs(problem, width)

    def run() -> None:
        for start, stop in ranges:
            slab(start, stop)

    return Prepared(run, kernel, slab, ranges)


def dlogits_pointer(problem: Problem, mib: int) -> Prepared:
    tile, width = gradient_tile(problem, mib)
    align = 4 if problem.hidden.dtype == torch.float32 else 8
    constants = linear_constants(tile, align, Flags(False, False, True, False), problem.interpreted)
    buffer = torch.empty(problem.rows, width, dtype=problem.hidden.dtype, device=problem.device)
    no_bias = torch.empty(1, device=problem.device)

    def slab(start: int, stop: int) -> Tensor:
        grid = triton.cdiv(problem.rows, tile.block_rows) * triton.cdiv(stop - start, tile.block_vocab)
        linear_dlogits_kernel[(grid,)](
            **problem.gradient_arguments(),
            hidden_ptr=problem.hidden,
            weight_ptr=problem.weight,
            bias_ptr=no_bias,
            targets_ptr=problem.targets,
            dlogits_ptr=buffer,
            num_rows=problem.rows,
            hidden_size=problem.features,
            slab_start=start,
            slab_stop=stop,
            stride_hidden=problem.hidden.stride(0),
            stride_weight=problem.weight.stride(0),
            stride_dlogits=width,
            **tiles.softcap_arguments(None),
            **constants,
        )
        return buffer[:, : stop - start]

    return all_slabs(problem, width, slab, linear_dlogits_kernel)


def dlogits_descriptors(problem: Problem, mib: int, tma_stores: bool) -> Prepared:
    tile, width = gradient_tile(problem, mib)
    buffer = torch.empty(problem.rows, width, dtype=problem.hidden.dtype, device=problem.device)
    hidden_desc = TensorDescriptor.from_tensor(problem.hidden, [tile.block_rows, tile.block_hidden])
    weight_desc = TensorDescriptor.from_tensor(problem.weight, [tile.block_vocab, tile.block_hidden])
    output = buffer
    if tma_stores:
        output = TensorDescriptor.from_tensor(buffer, [tile.block_rows, tile.block_vocab // 4])

    def slab(start: int, stop: int) -> Tensor:
        grid = triton.cdiv(problem.rows, tile.block_rows) * triton.cdiv(stop - start, tile.block_vocab)
        quarters_dlogits_kernel[(grid,)](
            hidden_desc,
            weight_desc,
            output,
            **{name: x for name, x in problem.gradient_arguments().items() if name not in NOT_IN_CANDIDATES},
            targets_ptr=problem.targets,
            num_rows=problem.rows,
            hidden_size=problem.features,
            slab_start=start,
            slab_stop=stop,
            stride_output=width,
            BLOCK_ROWS=tile.block_rows,
            BLOCK_VOCAB=tile.block_vocab,
            BLOCK_HIDDEN=tile.block_hidden,
            GROUP_ROWS=tiles.GROUP_ROWS,
            TMA_STORES=tma_stores,
            num_warps=tile.num_warps,
            # TMA stores use shared memory, so a fourth stage of loads does not fit.
            num_stages=3 if tma_stores else tile.num_stages,
            enable_fp_fusion=False,
        )
        return buffer[:, : stop - start]

    return all_slabs(problem, width, slab, quarters_dlogits_kernel)


def dlogits_cublas(problem: Problem, mib: int) -> Prepared:
    height, block_width = cublas_block(problem, mib)
    _, width = gradient_tile(problem, 128)
    buffer = torch.empty(problem.rows, width, dtype=problem.hidden.dtype, device=problem.device)
    block = torch.empty(height * block_width, dtype=torch.float32, device=problem.device)
    block_vocab = 16 if problem.interpreted else 4096
    align = 4

    def slab(start: int, stop: int) -> Tensor:
        for top in range(0, problem.rows, height):
            bottom = min(top + height, problem.rows)
            rows = slice(top, bottom)
            per_row = {
                name: value[rows] if isinstance(value, Tensor) else value
                for name, value in problem.gradient_arguments().items()
            }
            for first in range(start, stop, block_width):
                last = min(first + block_width, stop)
                logits = block[: (bottom - top) * (last - first)].view(bottom - top, last - first)
                product_into(logits, problem.hidden[rows], problem.weight[first:last])
                logits_backward_kernel[((bottom - top) * triton.cdiv(last - first, block_vocab),)](
                    **per_row,
                    logits_ptr=logits,
                    targets_ptr=problem.targets[rows] - first,
                    dlogits_ptr=buffer[rows, first - start :],
                    num_columns=last - first,
                    vocab_size=last - first,
                    stride_logits=last - first,
                    stride_dlogits=width,
                    **tiles.softcap_arguments(None),
                    HAS_SOFTCAP=False,
                    EXTRAS=False,
                    ALIGN=align,
                    BLOCK_VOCAB=block_vocab,
                    num_warps=1 if problem.interpreted else 8,
                    num_stages=1,
                    enable_fp_fusion=False,
                )
        return buffer[:, : stop - start]

    prepared = all_slabs(problem, width, slab, logits_backward_kernel)
    prepared.graph = True
    return prepared


def whole_backward(problem: Problem, mib: int) -> Prepared:
    def run() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return linear_backward(
            problem.gradients,
            problem.hidden,
            problem.weight,
            problem.targets,
            None,
            problem.options,
            True,
            True,
            False,
            slab_bytes=mib * MIB,
        )

    return Prepared(run, linear_dlogits_kernel)


def backward_products(problem: Problem, mib: int) -> Prepared:
    """cuBLAS on the two products of the backward pass, for their time; the slab's values do not matter."""
    _, width = gradient_tile(problem, mib)
    dlogits = torch.randn(problem.rows, width, device=problem.device).to(problem.hidden.dtype)
    dweight = torch.empty_like(problem.weight)
    accumulated = torch.zeros(problem.hidden.shape, dtype=torch.float32, device=problem.device)
    dhidden = torch.empty_like(problem.hidden)
    typed = {} if problem.interpreted else {"out_dtype": torch.float32}

    def of_weight() -> None:
        for start, stop in slabs(problem, width):
            torch.mm(dlogits[:, : stop - start].T, problem.hidden, out=dweight[start:stop])

    def of_hidden() -> None:
        for start, stop in slabs(problem, width):
            part = dlogits[:, : stop - start]
            torch.addmm(accumulated, part, problem.weight[start:stop], **typed, out=accumulated)

    def of_hidden_rounded() -> None:
        for start, stop in slabs(problem, width):
            torch.mm(dlogits[:, : stop - start], problem.weight[start:stop], out=dhidden)

    def run() -> None:
        of_weight()
        of_hidden()

    pieces = {"dweight": of_weight, "dhidden_float32_sum": of_hidden, "dhidden_bf16_no_sum": of_hidden_rounded}
    return Prepared(run, pieces=pieces)


def candidates() -> dict[str, tuple[str, Callable[[Problem], Prepared]]]:
    """(kind, function that prepares it) by name: the production kernels and their alternatives."""
    named: dict[str, tuple[str, Callable[[Problem], Prepared]]] = {
        "forward-pointer": ("forward", forward_pointer),
        "forward-gluon-128x256x64x4": ("forward", partial(forward_gluon, tile=(128, 256, 64, 4))),
        "forward-nested-128x256x64x4": ("forward", partial(forward_descriptors, flat=False, tile=FLAT_TILES[0])),
        "dlogits-pointer-128": ("dlogits", partial(dlogits_pointer, mib=128)),
        "dlogits-cublas-32": ("dlogits", partial(dlogits_cublas, mib=32)),
    }
    for tile in FLAT_TILES:
        label = "x".join(map(str, tile[:4]))
        named[f"forward-flat-{label}"] = ("forward", partial(forward_descriptors, flat=True, tile=tile))
    for mib in (16, 32, 64):
        named[f"forward-cublas-{mib}"] = ("forward", partial(forward_cublas, mib=mib))
    for name, mib, stores in (("tma", 128, False), ("tma", 256, False), ("tmastore", 128, True)):
        named[f"dlogits-{name}-{mib}"] = ("dlogits", partial(dlogits_descriptors, mib=mib, tma_stores=stores))
    for mib in (128, 256):
        named[f"products-{mib}"] = ("products", partial(backward_products, mib=mib))
    for mib in (128, 256, 512):
        named[f"backward-{mib}"] = ("backward", partial(whole_backward, mib=mib))
    return named


# --- check and time -------------------------------------------------------------------------------------------------


def exact_logits(problem: Problem, rows: slice, columns: slice) -> Tensor:
    """``z = s / T`` in float64."""
    hidden = problem.hidden[rows].double()
    width = 16384
    first, last, _ = columns.indices(problem.columns)
    parts = [
        hidden @ problem.weight[start : min(start + width, last)].double().T for start in range(first, last, width)
    ]
    return torch.cat(parts, dim=1) * problem.inverse_temperature


def exact_gradient(problem: Problem, rows: slice, columns: slice) -> Tensor:
    """The gradient of the logits in float64, from the statistics that the kernels are given."""
    z = exact_logits(problem, rows, columns)
    assert problem.gradients is not None
    mass, onehot, slope, _, logsumexp, mean_logit = (
        None if x is None else x[rows].double()[:, None] for x in problem.gradients
    )
    dz = torch.exp(z - logsumexp) * ((mean_logit - z) * slope + mass)
    first, last, _ = columns.indices(problem.columns)
    is_target = problem.targets[rows][:, None] == torch.arange(first, last, device=problem.device)
    return (dz + is_target * onehot) * problem.inverse_temperature


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((actual.double() - expected).norm() / expected.norm())


def check(kind: str, prepared: Prepared, problem: Problem) -> dict[str, float]:
    rows = slice(0, min(CHECKED_ROWS, problem.rows))
    everything = slice(0, problem.columns)
    if kind == "forward":
        result = prepared.run()
        logsumexp, target_logit, entropy = result.logsumexp, result.target_logit, result.entropy
        z = exact_logits(problem, rows, everything)
        expected = torch.logsumexp(z, dim=1)
        exact = {
            "logsumexp": (logsumexp, expected),
            "target_logit": (target_logit, z.gather(1, problem.targets[rows][:, None])[:, 0]),
            "entropy": (entropy, expected - (torch.exp(z - expected[:, None]) * z).sum(dim=1)),
        }
        return {
            name: float((actual[rows].double() - truth).abs().max() / truth.abs().max())
            for name, (actual, truth) in exact.items()
        }
    if kind == "dlogits":
        assert prepared.slab is not None
        errors = {}
        for name, (start, stop) in (("first", prepared.slabs[0]), ("last", prepared.slabs[-1])):
            actual = prepared.slab(start, stop)[rows]
            errors[f"dlogits_{name}_slab"] = relative(actual, exact_gradient(problem, rows, slice(start, stop)))
        return errors
    if kind == "backward":
        dhidden, dweight, _ = prepared.run()
        expected = exact_gradient(problem, rows, everything)
        errors = {"dhidden": relative(dhidden[rows], expected @ problem.weight.double())}
        some = slice(0, min(CHECKED_ROWS, problem.columns))
        of_columns = exact_gradient(problem, slice(0, problem.rows), some)
        return errors | {"dweight": relative(dweight[some], of_columns.T @ problem.hidden.double())}
    prepared.run()
    return {}


def as_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a CUDA graph: otherwise hundreds of short launches would wait for Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bare_product(problem: Problem) -> Callable[[], None]:
    """One bfloat16 product of the size of the logits, in pieces if they would not fit."""
    height = min(problem.rows, max(MAX_PRODUCT_BYTES // (problem.columns * problem.hidden.element_size()), 1))
    out = torch.empty(height, problem.columns, dtype=problem.hidden.dtype, device=problem.device)

    def run() -> None:
        for top in range(0, problem.rows, height):
            part = problem.hidden[top : top + height]
            torch.mm(part, problem.weight.T, out=out[: part.shape[0]])

    return run


def milliseconds(functions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Times of the functions, one after the other in every round."""

    def enqueue() -> list[torch.cuda.Event]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
        events[0].record()
        for function, event in zip(functions.values(), events[1:], strict=True):
            function()
            event.record()
        return events

    for _ in range(2):
        events = enqueue()
        torch.cuda.synchronize()
    one_round = events[0].elapsed_time(events[-1]) / 1000
    rounds = [enqueue() for _ in range(min(max(int(SECONDS / max(one_round, 1e-6)), MIN_ROUNDS), MAX_ROUNDS))]
    torch.cuda.synchronize()
    return {name: [events[i].elapsed_time(events[i + 1]) for events in rounds] for i, name in enumerate(functions)}


def spread(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times), 4),
        "low_ms": round(min(times), 4),
        "high_ms": round(max(times), 4),
        "rounds": len(times),
    }


def timings(prepared: Prepared, problem: Problem) -> dict[str, Any]:
    result: dict[str, Any] = {"graph": False}
    run = prepared.run
    if prepared.graph:
        try:
            run = as_graph(prepared.run)
            result["graph"] = True
        except Exception as error:
            torch.cuda.synchronize()
            result["graph_error"] = f"{type(error).__name__}: {error}"[:500]
    times = milliseconds({"product": bare_product(problem), "candidate": run, **prepared.pieces})
    result |= spread(times["candidate"])
    result["product"] = spread(times["product"])
    result["products"] = round(result["median_ms"] / result["product"]["median_ms"], 4)
    result["product_tflops"] = round(
        2e-9 * problem.rows * problem.columns * problem.features / result["product"]["median_ms"], 1
    )
    if prepared.pieces:
        result["pieces"] = {name: spread(times[name]) for name in prepared.pieces}
    return result


def compiled_resources(kernel: Any) -> dict[str, Any]:
    """Registers and spills of the variants of ``kernel`` that this process has launched."""
    variants: list[dict[str, Any]] = []
    for caches in getattr(kernel, "device_caches", {}).values():
        for compiled in caches[0].values():
            compiled = compiled.result() if hasattr(compiled, "result") else compiled
            variants.append(
                {
                    "registers": getattr(compiled, "n_regs", None),
                    "spills": getattr(compiled, "n_spills", None),
                    "shared_bytes": getattr(compiled.metadata, "shared", None),
                    "num_warps": getattr(compiled.metadata, "num_warps", None),
                }
            )
    return variants[-1] if variants else {}


def write(path: Path | None, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=1, allow_nan=True)
    if path is None:
        return
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def measure(options: argparse.Namespace, result: dict[str, Any]) -> None:
    kind, prepare = candidates()[options.name]
    result |= {"name": options.name, "kind": kind, "status": "started"}
    result |= {name: getattr(options, name) for name in ("rows", "features", "columns")}
    result |= {"torch": torch.__version__, "triton": triton.__version__}
    if options.device == "cuda":
        result["device"] = torch.cuda.get_device_name()
    write(options.json, result)
    problem = make_problem(options.rows, options.features, options.columns, options.device)
    if kind in ("dlogits", "backward"):
        add_upstream(problem)
    prepared = prepare(problem)
    result["errors"] = check(kind, prepared, problem)
    wrong = [name for name, error in result["errors"].items() if not error <= LARGEST_ERROR[kind]]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} off by more than {LARGEST_ERROR[kind]} from float64")
    result["status"] = "checked"
    if prepared.kernel is not None and not problem.interpreted:
        try:
            result |= compiled_resources(prepared.kernel)
        except Exception as error:
            result["resources_error"] = f"{type(error).__name__}: {error}"[:300]
    write(options.json, result)
    if problem.interpreted:
        return
    torch.cuda.empty_cache()
    result |= timings(prepared, problem)
    result["status"] = "timed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time one candidate for linear_token_stats.")
    parser.add_argument("name", nargs="?", choices=list(candidates()), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the candidates' names")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=131072)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(candidates()))
        return 0
    if options.name is None:
        parser.error("give a NAME, or --list")
    result: dict[str, Any] = {}
    if options.device == "cuda":
        torch.zeros(1, device="cuda")
    wait_for_turn()
    try:
        measure(options, result)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        result["error"] = f"{type(cause).__name__}: {str(cause)[-1500:]}"
        traceback.print_exc()
    write(options.json, result)
    print(json.dumps(result), flush=True)
    return int("error" in result)


if __name__ == "__main__":
    raise SystemExit(main())
