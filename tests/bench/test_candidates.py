"""``bench/candidates.py`` without a GPU: candidates' sums in Triton's interpreter, their kernels compiled for sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import needs_interpreter

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets its kernels in this process", allow_module_level=True)

import triton
from repirl_kernels.triton import tiles
from repirl_kernels.triton.resources import _resource_usage
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import candidates

ROOT = Path(candidates.__file__).parents[1]
INTERPRETED = [name for name in candidates.candidates() if "gluon" not in name]

# Runs all given candidates in one process, because imports take the longest, and prints what each recorded.
RUN_ALL = """
import json, pathlib, sys
from bench.candidates import main
folder, sizes, *names = sys.argv[1:]
for name in names:
    file = pathlib.Path(folder) / f"{name}.json"
    main([name, "--device", "cpu", "--json", str(file), *sizes.split()])
"""


def interpret(folder: Path, sizes: str, names: list[str]) -> dict[str, dict]:
    path = os.pathsep.join([os.fspath(ROOT), os.fspath(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", RUN_ALL, folder, sizes, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


@needs_interpreter
def test_every_candidate_agrees_with_float64(tmp_path):
    """Rows and columns end within a tile, and the last slab is a part of one."""
    results = interpret(tmp_path, "--rows=20 --features=64 --columns=104", INTERPRETED)
    for name, result in results.items():
        assert result["status"] == "checked", result
        assert all(error < 2e-6 for error in result["errors"].values()), result
        assert bool(result["errors"]) == (result["kind"] != "products"), name
    assert {result["kind"] for result in results.values()} == {"forward", "dlogits", "backward", "products"}


@needs_interpreter
def test_a_shape_that_is_not_whole_vectors_is_refused(tmp_path):
    result = interpret(tmp_path, "--rows=20 --features=64 --columns=99", INTERPRETED[:1])[INTERPRETED[0]]
    assert result["status"] == "started"
    assert "must be multiples of 8, got 64, 99" in result["error"]


def test_what_is_wrong_is_an_error_and_not_timed(monkeypatch, tmp_path):
    wrong = candidates.Prepared(lambda: None)
    monkeypatch.setattr(candidates, "candidates", lambda: {"wrong": ("forward", lambda problem: wrong)})
    file = tmp_path / "wrong.json"
    words = ["wrong", "--device", "cpu", "--rows=8", "--features=8", "--columns=8", "--json", str(file)]
    for errors in ({"entropy": 1e-3}, {"entropy": float("nan")}):
        monkeypatch.setattr(candidates, "check", lambda *_, errors=errors: errors)
        assert candidates.main(words) == 1
        result = json.loads(file.read_text())
        assert result["error"] == "ValueError: entropy off by more than 0.0001 from float64"
        assert result["status"] == "started"


# --- compiled for a GPU ---------------------------------------------------------------------------------------------

DLOGITS_TILE = tiles.backward_tile("sm_90", candidates.torch.bfloat16, 8, False, False)


def signature(kernel, constants: dict, given: dict[str, str]) -> dict[str, str]:
    """Argument types as in ``tiles.Variant``; ``given`` has those of TMA descriptors and other special arguments."""
    result = {}
    for name in kernel.arg_names:
        if name in constants:
            result[name] = "constexpr"
        elif name in given:
            result[name] = given[name]
        elif name == "targets_ptr":
            result[name] = "*i64"
        elif name.endswith("_ptr"):
            result[name] = "*fp32"
        else:
            result[name] = "fp32" if name == "inverse_temperature" else "i32"
    return result


def compiled(source, **options):
    """(compiled kernel, its resources)"""
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return kernel, _resource_usage(kernel.asm["cubin"])


def check_resources(kernel, usage: dict[str, int]) -> None:
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert kernel.metadata.shared <= tiles.SHARED_MEMORY_LIMIT["sm_90"]


@pytest.mark.parametrize(
    ("tile", "flat"),
    [*((tile, True) for tile in candidates.FLAT_TILES), (candidates.FLAT_TILES[0], False)],
    ids=str,
)
def test_the_descriptor_forward_compiles_without_a_spill(tile, flat):
    rows, columns, depth, stages, warps = tile
    names = ("BLOCK_ROWS", "BLOCK_VOCAB", "BLOCK_HIDDEN", "STAGES", "GROUP_ROWS", "FLAT")
    constants = dict(zip(names, (rows, columns, depth, stages, tiles.GROUP_ROWS, flat), strict=True))
    given = {
        "hidden_desc": f"tensordesc<bf16[{rows}, {depth}]>",
        "weight_desc": f"tensordesc<bf16[{columns}, {depth}]>",
    }
    kernel = candidates.descriptor_forward_kernel
    source = ASTSource(kernel, signature(kernel, constants, given), constants, {})
    binary, usage = compiled(source, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    check_resources(binary, usage)
    assert "wgmma" in binary.asm["ptx"]
    assert "cp.async.bulk.tensor" in binary.asm["ptx"]


@pytest.mark.parametrize("stores", [False, True])
def test_the_gradient_in_quarters_compiles_without_a_spill(stores):
    tile = DLOGITS_TILE
    names = ("BLOCK_ROWS", "BLOCK_VOCAB", "BLOCK_HIDDEN", "GROUP_ROWS", "TMA_STORES")
    values = (tile.block_rows, tile.block_vocab, tile.block_hidden, tiles.GROUP_ROWS, stores)
    constants = dict(zip(names, values, strict=True))
    given = {
        "hidden_desc": f"tensordesc<bf16[{tile.block_rows}, {tile.block_hidden}]>",
        "weight_desc": f"tensordesc<bf16[{tile.block_vocab}, {tile.block_hidden}]>",
        "output": f"tensordesc<bf16[{tile.block_rows}, {tile.block_vocab // 4}]>" if stores else "*bf16",
    }
    kernel = candidates.quarters_dlogits_kernel
    # At a launch, Triton finds that these arguments are divisible by 16.
    divisible = ["stride_output"] if stores else ["output", "stride_output"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature(kernel, constants, given), constants, attributes)
    num_stages = 3 if stores else tile.num_stages
    binary, usage = compiled(source, num_warps=tile.num_warps, num_stages=num_stages, enable_fp_fusion=False)
    check_resources(binary, usage)
    assert "wgmma" in binary.asm["ptx"]
    # The kernel must store eight values at a time, or by TMA.
    assert "st.global.b16" not in binary.asm["ptx"]
    assert ("st.global.v4.b32" in binary.asm["ptx"]) == (not stores)


def test_the_statistics_of_a_block_compile_without_a_spill():
    kernel, constants = candidates.block_statistics_kernel, {"BLOCK_VOCAB": 2048}
    attributes = {(kernel.arg_names.index("logits_ptr"),): [["tt.divisibility", 16]]}
    source = ASTSource(kernel, signature(kernel, constants, {}), constants, attributes)
    binary, usage = compiled(source, num_warps=4, num_stages=3, enable_fp_fusion=False)
    check_resources(binary, usage)
    assert "ld.global.v4.b32" in binary.asm["ptx"]


@pytest.mark.skipif(candidates.gluon is None, reason="this Triton has no Gluon for Hopper")
def test_the_specialised_forward_compiles():
    """Spills are allowed here: Triton 3.9 spills 200 bytes, 3.6 none."""
    from triton.experimental.gluon._runtime import GluonASTSource

    rows, columns, depth, stages = 128, 256, 64, 4
    names = ("BLOCK_ROWS", "BLOCK_VOCAB", "BLOCK_HIDDEN", "STAGES", "GROUP_ROWS")
    constants = dict(zip(names, (rows, columns, depth, stages, tiles.GROUP_ROWS), strict=True))
    gl = candidates.gl
    given = {}
    for name, height in (("hidden_desc", rows // 2), ("weight_desc", columns)):
        layout = gl.NVMMASharedLayout.get_default_for([height, depth], gl.bfloat16)
        given[name] = f"tensordesc<bf16[{height}, {depth}],{layout!r}>"
    kernel = candidates.specialised_forward_kernel
    source = GluonASTSource(kernel, signature(kernel, constants, given), constants, {})
    binary, usage = compiled(source, num_warps=4, enable_fp_fusion=True)
    assert usage["STACK"] <= 256
    assert binary.metadata.shared <= tiles.SHARED_MEMORY_LIMIT["sm_90"]
    assert "setmaxnreg" in binary.asm["ptx"]


def test_every_kernel_is_compiled_here():
    kernels = {
        name
        for name, value in vars(candidates).items()
        if name.endswith("_kernel") and getattr(value, "__module__", "") == candidates.__name__
    }
    source = Path(__file__).read_text()
    assert kernels
    assert all(f"candidates.{name}" in source for name in kernels)
