"""Every Triton kernel, in every variant that can be launched, compiled for each GPU generation without a GPU.

Registers that spill to memory, and more shared memory than the GPU has, show nowhere but in the speed or at
the launch: here they fail.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

from repirl_kernels.triton import linear_backward, linear_forward, tiles
from repirl_kernels.triton.resources import Resources, all_variants, compile_variant, table
from triton.runtime import JITFunction

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)


def problems(resources: Resources) -> list[str]:
    """What is wrong with one compiled variant."""
    found = []
    if resources.spills:
        found.append(f"spills {resources.stack_bytes} bytes of stack, {resources.local_bytes} local")
    limit = tiles.SHARED_MEMORY_LIMIT[resources.arch]
    if resources.shared_bytes > limit:
        found.append(f"needs {resources.shared_bytes} bytes of shared memory of {limit}")
    return [f"{resources.arch} {resources.kernel} {resources.label}: {problem}" for problem in found]


def compile_by_index(arch: str, index: int) -> Resources:
    return compile_variant(all_variants(arch)[index], arch)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_no_spills_and_enough_shared_memory(arch):
    indices = range(len(all_variants(arch)))
    # A variant holds functions, which do not pickle: the workers look theirs up by index.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        compiled = list(pool.map(compile_by_index, [arch] * len(indices), indices, chunksize=4))
    print(table(compiled))
    assert [problem for resources in compiled for problem in problems(resources)] == []


def variant(kernel_name: str, label: str, tile: tiles.LinearTile) -> tiles.Variant:
    """The variant with ``tile`` in place of its own."""
    found = next(v for v in all_variants("sm_90") if v.name == kernel_name and label in v.label)
    constants = {
        **found.constants,
        "BLOCK_ROWS": tile.block_rows,
        "BLOCK_VOCAB": tile.block_vocab,
        "BLOCK_HIDDEN": tile.block_hidden,
    }
    options = {**found.options, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return found._replace(constants=constants, options=options)


def test_a_tile_that_is_too_large_is_found_out():
    """Its accumulator alone is 256 registers a thread, one more than a thread can have."""
    resources = compile_variant(
        variant("linear_dlogits_kernel", "bf16", tiles.LinearTile(128, 256, 32, 4, 2)), "sm_80"
    )
    assert resources.spills
    assert "spills" in problems(resources)[0]


def test_too_much_shared_memory_is_found_out():
    resources = compile_variant(
        variant("linear_forward_kernel", "bf16", tiles.LinearTile(128, 128, 64, 8, 4)), "sm_90"
    )
    assert problems(resources) == []
    assert "shared memory" in problems(resources._replace(arch="generic"))[0]


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_every_kernel_is_listed(arch):
    """A kernel that is launched but not compiled here would go unchecked."""
    launched = {"logits_forward_kernel", "logits_backward_kernel", "merge_splits_kernel"}
    for module in (linear_forward, linear_backward):
        source_globals = module.__globals__
        launched |= {
            name
            for name, value in source_globals.items()
            if isinstance(value, JITFunction) and name.endswith("_kernel")
        }
    assert {v.name for v in all_variants(arch)} == launched


def test_variants_name_all_flags():
    labels = {(v.name, v.label) for v in all_variants("sm_90")}
    assert len(labels) == len(all_variants("sm_90"))
    for v in all_variants("sm_90"):
        assert set(v.signature) == set(v.kernel.arg_names)
        assert v.options["enable_fp_fusion"] is False
