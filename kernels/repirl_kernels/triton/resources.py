"""Registers, spills and shared memory of the kernels, which are compiled for this without a GPU.

    python -m repirl_kernels.triton.resources [sm_90 ...]
    python -m repirl_kernels.triton.resources --write

The first prints the table for the named architectures, or for all. The second writes ``RESOURCES.md`` beside this file:
every kernel that is launched on sm_90, and the tile shapes that were compared with those chosen.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import tiles
from .linear_backward import linear_dlogits_kernel
from .linear_backward import variants as backward_variants
from .linear_forward import Flags, linear_forward_kernel, linear_variant
from .linear_forward import variants as forward_variants
from .logits import variants as logits_variants

REPORT = Path(__file__).with_name("RESOURCES.md")
REPORT_ARCH = "sm_90"

# Limits of one multiprocessor: registers, bytes of shared memory, threads and blocks.
_MULTIPROCESSOR = {
    "sm_80": (65536, 167936, 2048, 32),
    "sm_90": (65536, 233472, 2048, 32),
    "sm_100": (65536, 233472, 2048, 32),
    "generic": (65536, 102400, 1536, 16),
}
# Shared memory that the driver reserves for every block.
_RESERVED_SHARED_BYTES = 1024

# Matrix instructions in PTX, by their name in the table.
_PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync", "fma": "fma.rn.f32"}


class Resources(NamedTuple):
    """The resources of one compiled variant: registers, stack and local bytes per thread; shared bytes per block."""

    arch: str
    kernel: str
    label: str
    num_warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    product: str
    """The instruction of its matrix product, empty if it has none."""
    bytes_per_multiply_add: float
    """Operand bytes that its tile loads for each multiply-add, 0 without a product."""

    @property
    def spills(self) -> bool:
        """Whether some registers were spilled to memory."""
        return self.stack_bytes > 0 or self.local_bytes > 0

    @property
    def resident_blocks(self) -> int:
        """Blocks that one multiprocessor can hold at a time."""
        registers, shared_bytes, threads, blocks = _MULTIPROCESSOR[self.arch]
        # A warp's registers are allocated in units of 256.
        of_a_block = -(-self.registers // 8) * 8 * 32 * self.num_warps
        return min(
            registers // of_a_block,
            shared_bytes // (self.shared_bytes + _RESERVED_SHARED_BYTES),
            threads // (32 * self.num_warps),
            blocks,
        )


def compile_variant(variant: tiles.Variant, arch: str) -> Resources:
    """Compile for ``arch`` (a key of ``tiles.ARCHITECTURES``) and read the binary's resource usage."""
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        variant.signature,
        variant.constants,
        {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    target = GPUTarget("cuda", tiles.ARCHITECTURES[arch], 32)
    compiled = triton.compile(source, target=target, options=variant.options)
    usage = _resource_usage(compiled.asm["cubin"])
    loaded = _loaded_bytes(variant)
    products = [name for name, instruction in _PRODUCTS.items() if instruction in compiled.asm["ptx"]]
    return Resources(
        arch,
        variant.name,
        variant.label,
        variant.options["num_warps"],
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        compiled.metadata.shared,
        products[0] if loaded else "",
        loaded,
    )


def all_variants(arch: str) -> list[tiles.Variant]:
    """Every variant of every kernel that can be launched on ``arch``."""
    return [*logits_variants(arch), *forward_variants(arch), *backward_variants(arch)]


def candidate_variants() -> list[tiles.Variant]:
    """Both linear kernels with each of ``tiles.CANDIDATES``, bfloat16, without and with a softcap."""
    return [
        linear_variant(kernel, tile, torch.bfloat16, 8, Flags(False, softcap, True, False))
        for kernel in (linear_forward_kernel, linear_dlogits_kernel)
        for softcap in (False, True)
        for tile in tiles.CANDIDATES
    ]


def table(rows: Iterable[Resources]) -> str:
    """Markdown table of ``rows``."""
    lines = [
        "| arch | kernel | variant | warps | registers | spilled bytes | shared KiB | blocks per SM | product "
        "| bytes per multiply-add |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for r in rows:
        loaded = f"{r.bytes_per_multiply_add:.4f}" if r.product else ""
        lines.append(
            f"| {r.arch} | {r.kernel} | {r.label} | {r.num_warps} | {r.registers} | {r.stack_bytes + r.local_bytes} "
            f"| {r.shared_bytes / 1024:.1f} | {r.resident_blocks} | {r.product} | {loaded} |"
        )
    return "\n".join(lines)


def report(variants: Sequence[Resources], candidates: Sequence[Resources]) -> str:
    """The text of ``RESOURCES.md`` from the compiled :func:`all_variants` and :func:`candidate_variants`."""
    return f"""# Resources of the Triton kernels on {REPORT_ARCH}

Triton {triton.__version__}, compiled without a GPU: nothing here was timed. Written by
`python -m repirl_kernels.triton.resources --write`; a test compiles everything again and compares. With another
version of Triton the numbers of registers differ, but no kernel may spill there either.

- **variant**: the operands' type, the tile as rows x vocabulary x step along D / pipeline stages, and flags.
  `unaligned`: rows that are not whole 16-byte vectors.
- **spilled bytes**: stack and local memory of a thread.
- **blocks per SM**: how many fit by registers, shared memory and threads.
- **product**: the matrix instruction; IEEE float32 products run outside the tensor cores.
- **bytes per multiply-add**: what a tile loads from the L2 cache, `itemsize * (rows + columns) / (rows * columns)`.

## Every kernel that is launched

{table(variants)}

## Tile shapes compared for half-precision operands

{table(candidates)}

How the shapes in `tiles.py` were chosen:

- A shape whose kernel spills is not used: with a softcap 128x256, 256x128 and 64x256.
- Of the others, the one that loads the fewest bytes per multiply-add. At the 989 TFLOP/s of an H100's datasheet,
  128x256 and 256x128 load 11.6 TB/s from the L2 cache, 128x128 loads 15.5, 64x256 19.3, and 128x64 23.2. A larger
  tile's accumulator does not fit in registers.
- 128x256 has half as many rows as 256x128, so a thread keeps half as many running sums.
- Shared memory holds at most four stages of 48 KiB. They leave room for one block on a multiprocessor, and so do the
  registers.
- With four warps, two blocks of 128x128 or 128x64 run on a multiprocessor: one can multiply while the other computes
  exponentials. In return they load a third more bytes, or twice as many. Which is faster cannot be told without a GPU.
"""


def _loaded_bytes(variant: tiles.Variant) -> float:
    if "BLOCK_ROWS" not in variant.constants or "BLOCK_VOCAB" not in variant.constants:
        return 0.0
    rows, columns = variant.constants["BLOCK_ROWS"], variant.constants["BLOCK_VOCAB"]
    itemsize = 4 if variant.signature["hidden_ptr"] == "*fp32" else 2
    return itemsize * (rows + columns) / (rows * columns)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", os.fspath(path)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}
    if "REG" not in usage:
        raise RuntimeError(f"no resource usage in the output of {command[0]}: {output!r}")
    return usage


def main(arguments: list[str]) -> None:
    """Print the table for the named architectures, or for all; with ``--write``, write the report."""
    if arguments == ["--write"]:
        variants, candidates = (
            [compile_variant(variant, REPORT_ARCH) for variant in listed]
            for listed in (all_variants(REPORT_ARCH), candidate_variants())
        )
        REPORT.write_text(report(variants, candidates))
        print(f"written to {REPORT}")
        return
    for arch in arguments or tiles.ARCHITECTURES:
        print(table(compile_variant(variant, arch) for variant in all_variants(arch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
