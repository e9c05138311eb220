"""What the kernels cost a GPU, by compiling them without one: registers, spills and shared memory.

    python -m repirl_kernels.triton.resources [sm_90 ...]

prints the table.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import tiles
from .linear_backward import variants as backward_variants
from .linear_forward import variants as forward_variants
from .logits import variants as logits_variants


class Resources(NamedTuple):
    """Of one compiled variant: registers, stack and local bytes of a thread; shared bytes of a block."""

    arch: str
    kernel: str
    label: str
    num_warps: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int

    @property
    def spills(self) -> bool:
        """Whether registers went to memory."""
        return self.stack_bytes > 0 or self.local_bytes > 0


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
    return Resources(
        arch,
        variant.name,
        variant.label,
        variant.options["num_warps"],
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        compiled.metadata.shared,
    )


def all_variants(arch: str) -> list[tiles.Variant]:
    """Every variant of every kernel that can be launched on ``arch``."""
    return [*logits_variants(arch), *forward_variants(arch), *backward_variants(arch)]


def table(rows: Iterable[Resources]) -> str:
    """Markdown table of ``rows``."""
    lines = [
        "| arch | kernel | variant | warps | registers | spilled bytes | shared KiB |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for r in rows:
        spilled = r.stack_bytes + r.local_bytes
        lines.append(
            f"| {r.arch} | {r.kernel} | {r.label} | {r.num_warps} | {r.registers} | {spilled} "
            f"| {r.shared_bytes / 1024:.1f} |"
        )
    return "\n".join(lines)


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
    """Print the table for the named architectures, or for all."""
    for arch in arguments or tiles.ARCHITECTURES:
        print(table(compile_variant(variant, arch) for variant in all_variants(arch)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
