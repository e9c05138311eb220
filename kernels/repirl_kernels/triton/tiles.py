"""Tile shapes of the kernels, and helpers to launch them.

The shapes are a fixed table, not the result of autotuning: the same inputs run the same kernel every time, and the
tests compile every kernel that can be launched ahead of time and check its registers, shared memory and spills
(``resources.py``). ``RESOURCES.md`` lists these for sm_90, and says how the shapes were chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from repirl_kernels.operands import Options
from repirl_kernels.reference import RowGradients

# GPU architectures that have their own shapes; all others run the "generic" ones. The number is the compute capability
# that the ahead-of-time check compiles for.
ARCHITECTURES: Mapping[str, int] = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "generic": 86}

# The most shared memory that one block may use, in bytes. "generic" assumes 99 KiB.
SHARED_MEMORY_LIMIT: Mapping[str, int] = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "generic": 101376,
}


class LinearTile(NamedTuple):
    """A program's tile of logits (rows x vocabulary), its step along D, and its launch options."""

    block_rows: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    num_stages: int


class RowTile(NamedTuple):
    """Columns that a program reads at a time, columns of a vocabulary split (a multiple of these), and warps."""

    block_vocab: int
    split_vocab: int
    num_warps: int


# Consecutive programs take this many row blocks for one vocabulary split, then the same row blocks for the next split.
# So the rows and columns that are read at the same time stay in the L2 cache.
GROUP_ROWS = 16

# The most vocabulary splits of the linear op: enough to occupy a GPU when there are few rows. The number of splits
# depends on V alone, so that the order of a row's sums does not depend on the batch.
MAX_SPLITS = 64

# Rows that one program of merge_splits_kernel merges.
MERGE_ROWS = 128

# Size in bytes of the buffer for the gradient of one vocabulary slab's logits.
SLAB_BYTES = 128 * 2**20

# For half-precision operands whose rows are whole 16-byte vectors: (tile without bias and softcap, tile with either).
# Each is the largest tile that keeps its accumulator in registers. A bias or a softcap needs more registers, and with
# the larger tile would spill (with a bias 16 bytes a thread in Triton 3.9, none in 3.6).
_HALF: Mapping[str, tuple[LinearTile, LinearTile]] = {
    "sm_80": (LinearTile(128, 128, 64, 8, 4), LinearTile(128, 128, 64, 8, 4)),
    "sm_90": (LinearTile(128, 256, 64, 8, 4), LinearTile(128, 128, 64, 8, 4)),
    "sm_100": (LinearTile(128, 256, 64, 8, 4), LinearTile(128, 128, 64, 8, 4)),
    "generic": (LinearTile(128, 64, 32, 4, 3), LinearTile(128, 64, 32, 4, 3)),
}
# Shapes for sm_90 that ``RESOURCES.md`` compares with those chosen.
CANDIDATES = (
    LinearTile(128, 256, 64, 8, 4),
    LinearTile(128, 256, 64, 8, 3),
    LinearTile(256, 128, 64, 8, 4),
    LinearTile(128, 128, 64, 8, 4),
    LinearTile(128, 128, 64, 8, 3),
    LinearTile(128, 128, 64, 4, 3),
    LinearTile(64, 256, 64, 4, 3),
    LinearTile(128, 64, 64, 4, 4),
)
# For IEEE float32 products, which do not use tensor cores, and for rows that are not whole vectors, which are read
# element by element.
_FLOAT = LinearTile(64, 64, 32, 4, 3)
_UNALIGNED = LinearTile(32, 32, 32, 4, 2)
# With extras (see needs_extras), where the shape without extras would spill.
_UNALIGNED_EXTRAS = LinearTile(32, 32, 32, 8, 2)
_HALF_EXTRAS: Mapping[str, LinearTile] = {"sm_100": LinearTile(64, 128, 64, 8, 4)}
_INTERPRETED = LinearTile(16, 32, 32, 1, 1)

# Temporaries need registers: with a softcap the block is half as large, with a softcap and extras a quarter.
_ROW = (RowTile(4096, 32768, 8), RowTile(2048, 32768, 8))
_ROW_SOFTCAP_EXTRAS = RowTile(1024, 32768, 8)
_ROW_INTERPRETED = RowTile(64, 256, 1)


# Arguments on whose values (divisibility by 16, equality with 1) the compiler must not specialise, so that all variants
# of a kernel are known. Alignment is a compile-time argument instead.
RUNTIME_ARGUMENTS = (
    *("num_rows", "num_splits", "tiles_per_split", "num_columns", "vocab_size", "hidden_size"),
    *("slab_start", "slab_stop", "split_columns", "stride_logits", "stride_hidden", "stride_weight"),
    *("targets_ptr", "maximum_ptr", "total_ptr", "weighted_ptr", "target_ptr", "shifted_ptr", "argmax_ptr"),
    *("logprob_ptr", "logsumexp_ptr", "target_logit_ptr", "entropy_ptr", "mean_logit_ptr", "mean_logprob_ptr"),
    *("best_column_ptr", "max_logit_ptr", "bias_ptr", "inverse_temperatures_ptr"),
    *("mass_ptr", "onehot_ptr", "slope_ptr", "uniform_ptr"),
)

_LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_POINTERS = {"targets_ptr": "i64", "argmax_ptr": "i32", "best_column_ptr": "i64"}
_FLOATS = ("softcap", "inverse_softcap", "inverse_temperature")


def is_interpreted(kernel: Any) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter (``TRITON_INTERPRET=1`` when triton was imported)."""
    return not isinstance(kernel, JITFunction)


def architecture(device: torch.device, interpreted: bool) -> str:
    """The key of the tile tables for ``device``."""
    if interpreted:
        return "interpreter"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        name = f"sm_{10 * major + minor}"
        if name in ARCHITECTURES:
            return name
        if major == 10:
            return "sm_100"
    return "generic"


def forward_tile(
    arch: str, dtype: torch.dtype, align: int, has_bias: bool, has_softcap: bool, extras: bool = False
) -> LinearTile:
    """Tile of the linear op's forward kernel for operands of ``dtype`` aligned to ``align`` elements."""
    if arch == "interpreter":
        return _INTERPRETED
    if align == 1:
        return _UNALIGNED_EXTRAS if extras else _UNALIGNED
    if dtype == torch.float32:
        return _FLOAT
    if extras and arch in _HALF_EXTRAS:
        return _HALF_EXTRAS[arch]
    return _HALF[arch][has_bias or has_softcap or extras]


def backward_tile(
    arch: str, dtype: torch.dtype, align: int, has_bias: bool, has_softcap: bool, extras: bool = False
) -> LinearTile:
    """Tile of the linear op's backward kernel: as in the forward pass, but a bias does not need the smaller tile."""
    return forward_tile(arch, dtype, align, has_softcap, has_softcap, extras)


def row_tile(arch: str, has_softcap: bool, extras: bool = False) -> RowTile:
    """Tile of the kernels that read given logits."""
    if arch == "interpreter":
        return _ROW_INTERPRETED
    return _ROW_SOFTCAP_EXTRAS if has_softcap and extras else _ROW[has_softcap]


def split_tiles(vocab_size: int, block_vocab: int, arch: str) -> tuple[int, int]:
    """``(tiles per split, number of splits)`` of a vocabulary: no split is empty."""
    num_tiles = triton.cdiv(vocab_size, block_vocab)
    tiles_per_split = triton.cdiv(num_tiles, 3 if arch == "interpreter" else MAX_SPLITS)
    return tiles_per_split, triton.cdiv(num_tiles, tiles_per_split)


def slab_width(num_rows: int, vocab_size: int, itemsize: int, block_vocab: int, slab_bytes: int) -> int:
    """Columns of a backward slab: whole tiles, as many as fit in ``slab_bytes``, at least one."""
    fitting = slab_bytes // (num_rows * itemsize) // block_vocab
    return min(max(fitting, 1), triton.cdiv(vocab_size, block_vocab)) * block_vocab


def launch(kernel: Callable[..., Any], grid: int, arguments: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    """Launch ``grid`` programs of ``kernel`` on the device of its first tensor argument."""
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if is_interpreted(kernel):
        kernel[(grid,)](**arguments, **constants)  # type: ignore[index]
        return
    with torch.cuda.device(first.device):
        kernel[(grid,)](**arguments, **constants)  # type: ignore[index]


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the kernels take ``tensor``'s dtype."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name} is {tensor.dtype}: the triton backend takes float32, float16 or bfloat16; "
            "use backend='reference' for float64"
        )


def empty_partials(num_splits: int, num_rows: int, device: torch.device, extras: bool) -> dict[str, Tensor]:
    """Buffers, by kernel argument: partial sums ``[num_splits, N]`` and the target's logit ``[N]``."""
    sums = torch.empty((3 + extras, num_splits, num_rows), dtype=torch.float32, device=device)
    target = torch.empty(num_rows, dtype=torch.float32, device=device)
    argmax = torch.empty((num_splits, num_rows) if extras else (1, 1), dtype=torch.int32, device=device)
    return {
        **{"maximum_ptr": sums[0], "total_ptr": sums[1], "weighted_ptr": sums[2], "target_ptr": target},
        **{"shifted_ptr": sums[-1], "argmax_ptr": argmax},
    }


def needs_extras(options: Options, row_temperature: Tensor | None) -> bool:
    """Whether the forward kernel needs its EXTRAS: a temperature for each row, label smoothing, or the argmax.

    They share one flag to keep the number of kernel variants small.
    """
    return row_temperature is not None or options.label_smoothing > 0 or options.with_argmax


def temperature_arguments(
    options: Options, row_temperature: Tensor | None, extras: bool, rows: Tensor
) -> dict[str, Any]:
    """Kernel arguments for the inverse temperature: a number, and a tensor with one for each row if ``extras``."""
    inverse = torch.empty(1, dtype=torch.float32, device=rows.device)
    if extras and row_temperature is None:
        inverse = torch.full((rows.shape[0],), 1.0 / options.temperature, dtype=torch.float32, device=rows.device)
    elif row_temperature is not None:
        inverse = (1.0 / row_temperature.float()).contiguous()
    return {"inverse_temperature": 1.0 / options.temperature, "inverse_temperatures_ptr": inverse}


def gradient_arguments(gradients: RowGradients) -> dict[str, Tensor]:
    """Kernel arguments for the coefficients of each row, ``[N]``; those that are ``None`` become 0."""
    zeros = torch.zeros_like(gradients.mass)
    columns = {"mass": gradients.mass, "onehot": gradients.onehot, "slope": gradients.slope}
    columns |= {"uniform": gradients.uniform, "logsumexp": gradients.logsumexp, "mean_logit": gradients.mean_logit}
    return {f"{name}_ptr": (zeros if x is None else x).contiguous() for name, x in columns.items()}


def softcap_arguments(softcap: float | None) -> dict[str, float]:
    """Kernel arguments ``softcap`` and ``inverse_softcap``; 1 without a softcap, where the kernels do not read them."""
    return (
        {"softcap": 1.0, "inverse_softcap": 1.0}
        if softcap is None
        else {
            "softcap": float(softcap),
            "inverse_softcap": 1.0 / softcap,
        }
    )


def alignment(tensor: Tensor, num_columns: int) -> int:
    """Elements of a 16-byte vector if the first ``num_columns`` of each row are whole, aligned vectors; else 1."""
    elements = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) % elements == 0 and num_columns % elements == 0
    return elements if aligned else 1


def gradient_dtype(dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """The dtype in which a kernel writes gradients that are wanted in ``dtype``."""
    # Triton's interpreter truncates when it stores bfloat16 where a GPU rounds: round on the host instead.
    return torch.float32 if interpreted else dtype


class Variant(NamedTuple):
    """One specialisation of a kernel: argument types, constants, launch options, and arguments divisible by 16."""

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    divisible: tuple[str, ...]

    @classmethod
    def of(
        cls,
        kernel: Any,
        label: str,
        pointers: Mapping[str, str],
        constants: Mapping[str, Any],
        divisible: Sequence[str],
    ) -> "Variant":
        """Build a variant; ``pointers`` has the element types that are not the usual ones."""
        compiled = {name: value for name, value in constants.items() if name not in _LAUNCH_OPTIONS}
        signature = {}
        for name in kernel.arg_names:
            if name in compiled:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*" + pointers.get(name, _POINTERS.get(name, "fp32"))
            else:
                signature[name] = "fp32" if name in _FLOATS else "i32"
        options = {name: constants[name] for name in _LAUNCH_OPTIONS}
        present = tuple(name for name in divisible if name in signature)
        return cls(kernel, label, signature, compiled, options, present)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__
