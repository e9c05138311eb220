"""``bench/gpu.py`` without a GPU: every step that can run, what it makes of those that cannot, die or take too long."""

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kernel_checks import triton_interprets

from bench import gpu

SCRIPT = Path(gpu.__file__)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The whole script, as on a GPU machine but for ``--device cpu --quick``."""
    if not triton_interprets():
        pytest.skip("needs Triton from 3.7 on, or NumPy before 2.4")
    out = tmp_path_factory.mktemp("gpu") / "out"
    command = [sys.executable, SCRIPT, "--out", out, "--device", "cpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads((out / "gpu.json").read_text()), out, done.stdout


@pytest.mark.timeout(600)
def test_every_step_runs_or_needs_a_gpu(results):
    written, _, printed = results
    assert list(written["steps"]) == [step for step in gpu.LIMITS if step not in gpu.ON_REQUEST]
    for name, step in written["steps"].items():
        if name in ("large", "counters"):
            assert step == {"status": "skipped", "reason": "needs a GPU"}
        else:
            assert step["status"] == "ok", step
            assert 0 < step["seconds"] < step["limit"]
        assert f"\n{name} " in "\n" + printed


def test_the_ceilings_are_measured(results):
    machine = results[0]["steps"]["machine"]
    assert machine["copy"]["gb_per_s"] > 0
    assert set(machine["products"]) == {"bf16", "fp32"}
    assert machine["torch"].startswith("2.")
    assert machine["backend"] in ("native", "reference")


def test_the_tests_are_counted(results):
    tests = results[0]["steps"]["tests"]
    assert tests["passed"] >= 20
    assert tests["unsuccessful"] == []
    assert tests["failed"] == tests["error"] == tests["skipped"] == 0


def test_candidates_are_ranked_and_agree(results):
    tables = results[0]["steps"]["tiles"]["tables"]
    assert len(tables) == 7
    for title, rows in tables.items():
        seconds = [row["seconds"] for row in rows]
        assert seconds == sorted(seconds), title
        assert all(row["tera_per_s"] > 0 for row in rows)
        assert [row["in_use"] for row in rows].count(True) == 1, title
        # Splits of the vocabulary and slabs are other orders of summation.
        assert all(row["difference"] < 1e-2 for row in rows), title


def test_the_benchmark_has_a_file_of_its_own(results):
    written, out, _ = results
    benchmark = json.loads((out / written["steps"]["benchmark"]["file"]).read_text())
    assert {case["case"]["task"] for case in benchmark["cases"]} == {"policy+entropy", "logits"}


def test_the_profile_names_our_operators(results):
    profile = results[0]["steps"]["profile"]
    assert any("linear_token_stats" in row["name"] for row in profile["kernels"])
    assert sum(row["share"] for row in profile["kernels"]) <= 1.0 + 1e-9


def test_all_limits_fit_nine_minutes():
    on_request = sum(gpu.LIMITS[step] for step in gpu.ON_REQUEST)
    assert sum(gpu.LIMITS.values()) - on_request < 9 * 60
    assert gpu.LIMITS["install"] + on_request < 9 * 60


def options(out: Path, work: Path, **others) -> argparse.Namespace:
    given = gpu._parser().parse_args(["--out", str(out), "--device", "cpu", "--quick"])
    given.work = work
    for name, value in others.items():
        setattr(given, name, value)
    return given


def test_a_step_out_of_time_keeps_what_it_recorded(tmp_path, monkeypatch):
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, pathlib, subprocess, sys, time\n"
        "file = pathlib.Path(sys.argv[sys.argv.index('--result') + 1])\n"
        "file.write_text(json.dumps({'half': 1}))\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    step = gpu.run_step("machine", options(tmp_path, tmp_path), dict(os.environ), tmp_path, limit=6.0)
    assert step["status"] == "out of time"
    assert step["half"] == 1
    assert step["seconds"] < 20
    # Its own children are gone too: nothing runs on into the next step.
    child = int(step["end_of_log"].split()[1])
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_step_that_dies_leaves_the_others(tmp_path, monkeypatch, capsys):
    script = tmp_path / "dies.py"
    script.write_text("import sys\nif 'machine' in sys.argv: sys.exit('no such card')\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "machine", "profile"]) == 1
    steps = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert steps["machine"]["status"] == "failed"
    assert steps["machine"]["exit_code"] == 1
    assert "no such card" in steps["machine"]["end_of_log"]
    assert steps["profile"]["status"] == "ok"
    assert "no such card" in capsys.readouterr().out


def make_wheel(folder: Path) -> None:
    """A wheel of one module, by hand."""
    folder.mkdir()
    information = "some_peer-1.0.dist-info"
    files = {
        "some_peer.py": "ANSWER = 42\n",
        f"{information}/METADATA": "Metadata-Version: 2.1\nName: some-peer\nVersion: 1.0\nRequires-Dist: torch==0\n",
        f"{information}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(folder / "some_peer-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(text)}\n"
        wheel.writestr(f"{information}/RECORD", record + f"{information}/RECORD,,\n")


def test_wheels_are_installed_without_their_dependencies(tmp_path):
    make_wheel(tmp_path / "wheels")
    work = tmp_path / "work"
    work.mkdir()
    given = options(tmp_path, work, wheels=tmp_path / "wheels")
    environment = gpu._environment(given, work)
    step = gpu.run_step("install", given, environment, work)
    assert step["status"] == "ok", step
    assert step["wheels"] == ["some_peer-1.0-py3-none-any.whl"]
    assert step["wheels_installed"] is True
    done = subprocess.run([sys.executable, "-c", "import some_peer; print(some_peer.ANSWER)"], env=environment)
    assert done.returncode == 0


def test_without_a_compiler_the_sources_are_used(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], returncode=1)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None if name == "c++" else name)
    recorded = {}
    gpu.install(options(tmp_path, tmp_path), recorded.update)
    assert recorded["package"].startswith("from the sources, without the C++ module: no c++")
    monkeypatch.undo()
    # Where nothing was built, the first repirl_kernels on the path is that of the sources.
    paths = gpu._environment(options(tmp_path, tmp_path), tmp_path)["PYTHONPATH"].split(os.pathsep)
    found = [path for path in paths if (Path(path) / "repirl_kernels").is_dir()]
    assert found[0] == str(SCRIPT.parents[1] / "kernels")


@pytest.mark.timeout(600)
def test_the_package_is_built_where_there_is_a_compiler(tmp_path):
    pytest.importorskip("nanobind")
    gpu.build_extension(tmp_path / "site", tmp_path / "build")
    module = next((tmp_path / "site" / "repirl_kernels").glob("_native*.so"))
    code = f"import importlib.util as u; s = u.spec_from_file_location('_native', {str(module)!r}); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.__name__)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert (tmp_path / "site" / "repirl_kernels" / "triton" / "tiles.py").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "tests/gpu/test_a.py::test_b[torch.float32-options0] PASSED [  5%]",
            ("::test_b[torch.float32-options0]", "passed"),
        ),
        ("[gw3] [ 15%] FAILED tests/gpu/test_a.py::test_b[x] ", ("::test_b[x]", "failed")),
        ("[gw0] [100%] SKIPPED tests/gpu/test_a.py::test_b", ("::test_b", "skipped")),
        ("tests/gpu/test_a.py::test_b ERROR   [  5%]", ("::test_b", "error")),
        ("FAILED tests/gpu/test_a.py::test_b[x] - AssertionError", ("", "")),
        ("tests/gpu/test_a.py::test_b[x] ", ("", "")),
        ("=========== 3 passed, 1 skipped in 2.00s ===========", ("", "")),
    ],
)
def test_lines_of_pytest(line, expected):
    test, outcome = gpu.outcome_of(line)
    assert (test.removeprefix("tests/gpu/test_a.py"), outcome) == expected


def test_counters_are_read_among_other_lines():
    output = (
        "==PROF== Connected to process 7\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"\n'
        '"0","linear_forward_kernel","GPU Speed Of Light Throughput","Duration","ms","13.2",""\n'
        '"0","linear_forward_kernel","Occupancy","Block Limit Registers","block","1",""\n'
        '"0","linear_forward_kernel","Occupancy","","","","AchievedOccupancy"\n'
        "==PROF== Disconnected\n"
    )
    assert gpu.counters_of(output) == {
        "GPU Speed Of Light Throughput: Duration": "13.2 ms",
        "Occupancy: Block Limit Registers": "1 block",
    }
