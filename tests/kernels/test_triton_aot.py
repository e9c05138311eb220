"""Every Triton kernel, in every variant that can be launched, compiled for each GPU generation without a GPU.

Registers that spill to memory, and more shared memory than the GPU has, show nowhere but in the speed or at
the launch: here they fail.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton")

import torch
import triton
from repirl_kernels.triton import linear_backward, linear_forward, resources, tiles
from repirl_kernels.triton.linear_backward import linear_dlogits_kernel
from repirl_kernels.triton.linear_forward import Flags, linear_forward_kernel, linear_variant
from repirl_kernels.triton.resources import Resources, all_variants, candidate_variants, compile_variant, table
from triton.runtime import JITFunction

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)


PLAIN = Flags(has_bias=False, has_softcap=False, entropy=True, extras=False)


def problems(resources: Resources) -> list[str]:
    """What is wrong with one compiled variant."""
    problems = []
    if resources.spills:
        problems.append(f"spills {resources.stack_bytes} bytes of stack, {resources.local_bytes} local")
    limit = tiles.SHARED_MEMORY_LIMIT[resources.arch]
    if resources.shared_bytes > limit:
        problems.append(f"needs {resources.shared_bytes} bytes of shared memory of {limit}")
    return [f"{resources.arch} {resources.kernel} {resources.label}: {problem}" for problem in problems]


def compile_by_index(arch: str, index: int) -> Resources:
    return compile_variant([*all_variants(arch), *candidate_variants()][index], arch)


def compile_all(arch: str, indices: range) -> list[Resources]:
    # A variant holds functions, which do not pickle: the workers look theirs up by index.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        return list(pool.map(compile_by_index, [arch] * len(indices), indices, chunksize=4))


@pytest.fixture(scope="module")
def compiled():
    """By architecture, compiled when first asked for."""
    done: dict[str, list[Resources]] = {}

    def get(arch: str) -> list[Resources]:
        if arch not in done:
            done[arch] = compile_all(arch, range(len(all_variants(arch))))
        return done[arch]

    return get


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_no_spills_and_enough_shared_memory(compiled, arch):
    rows = compiled(arch)
    print(table(rows))
    assert [problem for row in rows for problem in problems(row)] == []


@pytest.mark.timeout(900)
def test_the_committed_table_is_true(compiled):
    committed = resources.REPORT.read_text()
    rows = compiled("sm_90")
    missing = [row for row in rows if f"| {row.kernel} | {row.label} |" not in committed]
    assert missing == []
    if f"\nTriton {triton.__version__}," not in committed:
        pytest.skip(f"the table is of another version than triton {triton.__version__}")
    first = len(rows)
    candidates = compile_all("sm_90", range(first, first + len(candidate_variants())))
    assert committed == resources.report(rows, candidates), "run python -m repirl_kernels.triton.resources --write"


@pytest.mark.timeout(900)
def test_half_precision_products_use_the_tensor_cores(compiled):
    expected = {"sm_90": "wgmma", "sm_80": "mma", "generic": "mma"}
    for arch, product in expected.items():
        for row in compiled(arch):
            half = row.label.startswith(("bf16", "fp16"))
            if row.bytes_per_multiply_add and half and "unaligned" not in row.label:
                assert row.product == product, f"{arch} {row.kernel} {row.label}"
            elif row.bytes_per_multiply_add and not half:
                assert row.product == "fma", f"{arch} {row.kernel} {row.label}"


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared_bytes", "expected"),
    [(255, 8, 0, 1), (128, 8, 98304, 2), (128, 8, 131072, 1), (32, 4, 0, 16), (48, 8, 32, 5), (16, 1, 0, 32)],
)
def test_blocks_on_a_multiprocessor(registers, num_warps, shared_bytes, expected):
    row = Resources("sm_90", "", "", num_warps, registers, 0, 0, shared_bytes, "", 0.0)
    assert row.resident_blocks == expected


def test_the_shapes_in_use_are_among_the_candidates():
    """What a GPU is to choose from holds what runs now."""
    for tile_of in (tiles.forward_tile, tiles.backward_tile):
        for bias in (False, True):
            for softcap in (False, True):
                assert tile_of("sm_90", torch.bfloat16, 8, bias, softcap) in tiles.CANDIDATES


def test_a_tile_that_is_too_large_is_found_out():
    """Its accumulator alone is 256 registers a thread, one more than a thread can have."""
    tile = tiles.LinearTile(128, 256, 32, 4, 2)
    row = compile_variant(linear_variant(linear_dlogits_kernel, tile, torch.bfloat16, 8, PLAIN), "sm_80")
    assert row.spills
    assert "spills" in problems(row)[0]


def test_too_much_shared_memory_is_found_out():
    tile = tiles.LinearTile(128, 128, 64, 8, 4)
    row = compile_variant(linear_variant(linear_forward_kernel, tile, torch.bfloat16, 8, PLAIN), "sm_90")
    assert problems(row) == []
    assert row.bytes_per_multiply_add == 2 / 64
    assert "shared memory" in problems(row._replace(arch="generic"))[0]


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
