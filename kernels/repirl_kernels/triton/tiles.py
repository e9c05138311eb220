"""Tile shapes of the kernels, and helpers to launch them.

The shapes are a table, not the outcome of a search at run time: the same inputs take the same path on every
run, and every configuration that can be launched is compiled ahead of time in the tests, where registers,
shared memory and spills are checked (``resources.py``). ``RESOURCES.md`` has them for sm_90, and why these shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from repirl_kernels.operands import Options
from repirl_kernels.reference import RowGradients

# GPU generations with a table entry of their own, by compute capability; others run the "generic" shapes.
# The number is what the ahead-of-time check compiles for.
ARCHITECTURES: Mapping[str, int] = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "generic": 86}

# Shared memory that one block may have, in bytes. Shapes under "generic" are meant for GPUs with 99 KiB.
SHARED_MEMORY_LIMIT: Mapping[str, int] = {
    "sm_80": 166912,
    "sm_90": 232448,
    "sm_100": 232448,
    "generic": 101376,
}


class LinearTile(NamedTuple):
    """Shape of the logits tile which a program holds, its step along D, and how it is scheduled."""

    block_rows: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    num_stages: int


class RowTile(NamedTuple):
    """Columns which one program reads at a time, and columns of a split (a multiple of the former)."""

    block_vocab: int
    split_vocab: int
    num_warps: int


# Programs next to each other work through this many row blocks before the next vocabulary split: together
# they read few enough rows and columns to keep them in the L2 cache.
GROUP_ROWS = 16

# Vocabulary splits of the linear op. Enough to fill a GPU when there are few rows; it depends on V alone, so
# that a row's sums are formed in the same order whatever batch it is in.
MAX_SPLITS = 64

# Rows merged by one program.
MERGE_ROWS = 128

# Bytes of the buffer which holds one vocabulary slab's gradient of the logits.
SLAB_BYTES = 128 * 2**20

# Half-precision operands whose rows are whole 16-byte vectors: (plain, with a bias or a softcap). The largest
# tile that keeps its accumulator in registers; a softcap or a bias needs registers that the largest one does
# not leave (with a bias, 16 bytes a thread spill in Triton 3.9, none in 3.6).
_HALF: Mapping[str, tuple[LinearTile, LinearTile]] = {
    "sm_80": (LinearTile(128, 128, 64, 8, 4), LinearTile(128, 128, 64, 8, 4)),
    "sm_90": (LinearTile(128, 256, 64, 8, 4), LinearTile(128, 128, 64, 8, 4)),
    "sm_100": (LinearTile(128, 256, 64, 8, 4), LinearTile(128, 128, 64, 8, 4)),
    "generic": (LinearTile(128, 64, 32, 4, 3), LinearTile(128, 64, 32, 4, 3)),
}
# Shapes that sm_90 could run instead: what ``bench/gpu.py`` times on a GPU.
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
# IEEE float32 products run outside the tensor cores; rows that are not whole vectors are read element by
# element.
_FLOAT = LinearTile(64, 64, 32, 4, 3)
_UNALIGNED = LinearTile(32, 32, 32, 4, 2)
# Where what needs_extras() asks for would spill in the shape without it.
_UNALIGNED_EXTRAS = LinearTile(32, 32, 32, 8, 2)
_HALF_EXTRAS: Mapping[str, LinearTile] = {"sm_100": LinearTile(64, 128, 64, 8, 4)}
_INTERPRETED = LinearTile(16, 32, 32, 1, 1)

# A softcap's temporaries need the registers of half a block, and with extras of a quarter.
_ROW = (RowTile(4096, 32768, 8), RowTile(2048, 32768, 8))
_ROW_SOFTCAP_EXTRAS = RowTile(1024, 32768, 8)
_ROW_INTERPRETED = RowTile(64, 256, 1)


# Arguments on whose values (alignment, equality with 1) the compiler must not specialise: what is aligned is
# a compile-time argument of its own, so that the variants of a kernel can be listed.
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
    """Tile of the linear op's backward kernel: as forward, but a bias does not cost it the largest tile."""
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
    """Whether a forward kernel has to do more than the four statistics at one temperature.

    One flag stands for all of it, so that there are few variants of a kernel.
    """
    return row_temperature is not None or options.label_smoothing > 0 or options.with_argmax


def temperature_arguments(
    options: Options, row_temperature: Tensor | None, extras: bool, rows: Tensor
) -> dict[str, Any]:
    """The kernels' inverse temperatures: a number, or with ``extras`` one for each of ``rows``."""
    inverse = torch.empty(1, dtype=torch.float32, device=rows.device)
    if extras and row_temperature is None:
        inverse = torch.full((rows.shape[0],), 1.0 / options.temperature, dtype=torch.float32, device=rows.device)
    elif row_temperature is not None:
        inverse = (1.0 / row_temperature.float()).contiguous()
    return {"inverse_temperature": 1.0 / options.temperature, "inverse_temperatures_ptr": inverse}


def gradient_arguments(gradients: RowGradients) -> dict[str, Tensor]:
    """The kernels' coefficients of each row; 0 for those that are not there."""
    nothing = torch.zeros_like(gradients.mass)
    columns = {"mass": gradients.mass, "onehot": gradients.onehot, "slope": gradients.slope}
    columns |= {"uniform": gradients.uniform, "logsumexp": gradients.logsumexp, "mean_logit": gradients.mean_logit}
    return {f"{name}_ptr": (nothing if x is None else x).contiguous() for name, x in columns.items()}


def softcap_arguments(softcap: float | None) -> dict[str, float]:
    """The kernels' ``softcap`` and ``inverse_softcap``; 1 where the flag HAS_SOFTCAP keeps them unread."""
    return (
        {"softcap": 1.0, "inverse_softcap": 1.0}
        if softcap is None
        else {
            "softcap": float(softcap),
            "inverse_softcap": 1.0 / softcap,
        }
    )


def alignment(tensor: Tensor, num_columns: int) -> int:
    """Elements of a 16-byte vector if ``num_columns`` of each row are whole, aligned ones; else 1."""
    elements = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) % elements == 0 and num_columns % elements == 0
    return elements if aligned else 1


def gradient_dtype(dtype: torch.dtype, interpreted: bool) -> torch.dtype:
    """In which dtype a kernel writes the gradient of logits of ``dtype``."""
    # Triton's interpreter truncates when it stores bfloat16 where a GPU rounds: round on the host instead.
    return torch.float32 if interpreted else dtype


class Variant(NamedTuple):
    """A specialisation of a kernel: argument types, constants, launch options, divisible arguments."""

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
        """Argument types by name: ``pointers`` as given, others float32; sizes and strides int32."""
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
