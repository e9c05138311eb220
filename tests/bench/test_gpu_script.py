"""``bench/gpu.py`` without a GPU: its plans, the steps that can run, and what happens if a step dies or hangs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest
from kernel_checks import triton_interprets

from bench import gpu, gpu_steps
from bench.cases import PROFILES
from bench.contenders import CONTENDERS

SCRIPT = Path(gpu.__file__)
FILES = {"gpu.json", "ops.json", "logs.tar.gz"}


def options(out: Path, *words: str):
    given = gpu._parser().parse_args(["--out", os.fspath(out), "--device", "cpu", *words])
    given.seconds = given.seconds or 60.0
    return given


def plan(*words: str) -> list[list[gpu.Step]]:
    return gpu.plan(gpu._parser().parse_args(["--out", "out", *words]))


def step(name: str, code: str, limit: float = 30.0, **others) -> gpu.Step:
    return gpu.Step(name, ("-c", textwrap.dedent(code), gpu.RESULT), limit, **others)


def run(tmp_path: Path, *stages: list[gpu.Step], words: tuple[str, ...] = ()) -> dict[str, dict]:
    """Run the stages, and return the steps' outcomes as they are written to gpu.json."""
    work = tmp_path / "work"
    work.mkdir()
    runner = gpu.Runner(options(tmp_path / "out", *words), work, [])
    for stage in stages:
        runner.run(stage)
    runner.close()
    return written(tmp_path / "out")["steps"]


def written(out: Path) -> dict:
    assert {file.name for file in out.iterdir()} <= FILES
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert all(name.endswith(".log") for name in logs.getnames())
    return json.loads((out / "gpu.json").read_text())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in pids)


# --- the plans ------------------------------------------------------------------------------------------------------


def longest(stage: list[gpu.Step]) -> float:
    """Seconds of a stage whose steps all take their whole time limit."""
    turns = sum(step.limit for step in stage if step.takes_turns)
    return max([turns, *(step.limit for step in stage if not step.takes_turns)])


@pytest.mark.parametrize(("call", "seconds"), [(1, 470), (2, 170)])
def test_the_headline_is_reached_however_long_the_steps_take(call, seconds):
    stages = plan("--call", str(call))
    headline = next(i for i, stage in enumerate(stages) if stage[0].name.startswith("benchmark"))
    installed = 25
    assert installed + sum(map(longest, stages[: headline + 1])) <= seconds - 2
    if call == 2:
        assert headline == len(stages) - 1


def test_the_order_of_the_first_call():
    names = [step.name.split()[0] for stage in plan() for step in stage]
    order = list(dict.fromkeys(names))
    assert order == [
        *("machine", "tests", "try", "benchmark", "candidate", "profile", "counters", "large", "training", "trainers")
    ]
    first = [step.name for stage in plan() for step in stage if step.takes_turns][:2]
    assert all(name.startswith("benchmark 4096x131072 16384x4096x131072 bf16 policy+entropy") for name in first)


def test_the_second_call_has_ceilings_and_the_headline_beside_liger():
    ceilings, headline = plan("--call", "2")
    assert [step.name for step in ceilings] == ["machine"]
    for one in headline:
        peers = one.arguments[one.arguments.index("--peers") + 1 : one.arguments.index("--json")]
        assert peers == ("ours", "eager", "liger")
        assert "policy+entropy" in one.name


@pytest.mark.parametrize("call", ["1", "2"])
def test_every_benchmark_is_a_case_of_the_profile(call):
    known = {case.name for case in PROFILES["gpu"]}
    steps = [step for stage in plan("--call", call) for step in stage if step.name.startswith("benchmark")]
    assert steps
    for one in steps:
        words = one.arguments
        assert words[words.index("--only") + 1] in known
        for word in words[words.index("--peers") + 1 : words.index("--json")]:
            assert any(word in contender.name.lower() for contender in CONTENDERS)
    keys = [gpu.key_of(step.name) for stage in plan("--call", call) for step in stage]
    assert len(set(keys)) == len(keys)


def test_every_candidate_exists():
    pytest.importorskip("triton")
    code = "from bench.candidates import candidates; print(*candidates())"
    path = os.pathsep.join([os.fspath(SCRIPT.parents[1]), os.fspath(SCRIPT.parents[1] / "kernels")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE)
    assert set(gpu.CANDIDATES) == set(done.stdout.decode().split())
    assert set(gpu.CANDIDATES_ON_CPU) < set(gpu.CANDIDATES)
    assert len(set(gpu.CANDIDATES)) == len(gpu.CANDIDATES)


def test_every_step_of_our_own_exists():
    for one in (step for stage in plan() for step in stage if "bench.gpu_steps" in step.arguments):
        assert callable(getattr(gpu_steps, one.name))


def test_an_unknown_step_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--steps", "nothing"])
    assert "no step's name has 'nothing'; there are machine, " in capsys.readouterr().err


# --- the whole script on a CPU --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the whole script, run as on a GPU machine except for ``--device cpu``."""
    if not triton_interprets():
        pytest.skip("needs Triton from 3.7 on, or NumPy before 2.4")
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = subprocess.run([sys.executable, SCRIPT, "--out", out, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert {file.name for file in out.iterdir()} == FILES
    return written(out)["steps"], out, done.stdout


@pytest.mark.timeout(600)
def test_every_step_runs_or_needs_a_gpu(results):
    steps, out, printed = results
    # Sorted, because steps that take turns run in the order in which they finish loading.
    assert sorted(steps) == sorted(step.name for stage in gpu.plan(options(out)) for step in stage)
    for name, outcome in steps.items():
        if name in ("large", "training", "counters", "trainers"):
            assert outcome == {"status": "skipped", "reason": "needs a GPU"}
        else:
            assert outcome["status"] == "ok", outcome
            assert 0 < outcome["seconds"] < outcome["limit"]
        assert f"\n{name} " in "\n" + printed


def test_the_ceilings_are_measured(results):
    machine = results[0]["machine"]["result"]
    assert machine["copy"]["gb_per_s"] > 0
    assert set(machine["products"]) == {"bf16", "fp32"}
    assert machine["torch"].startswith("2.")
    assert machine["backend"] in ("native", "reference")


def test_the_tests_are_counted(results):
    tests = results[0]["tests"]["result"]
    assert tests["passed"] >= 20
    assert tests["unsuccessful"] == []
    assert tests["failed"] == tests["error"] == tests["skipped"] == 0


def test_candidates_are_checked(results):
    for name in gpu.CANDIDATES_ON_CPU:
        result = results[0][f"candidate {name}"]["result"]
        assert result["status"] == "checked"
        assert all(error < 1e-5 for error in result["errors"].values())


def test_the_benchmark_has_a_file_of_its_own(results):
    steps, out, _ = results
    benchmark = json.loads((out / "ops.json").read_text())
    assert [case["case"]["task"] for case in benchmark["cases"]] == ["policy+entropy"]
    assert benchmark["versions"]["torch"]
    assert benchmark["command"].startswith("python bench/gpu.py --out")
    (name,) = [name for name in steps if name.startswith("benchmark")]
    assert steps[name]["result"]["cases"] == benchmark["cases"]


def test_the_profile_names_our_operators(results):
    ops = results[0]["profile"]["result"]["ops"]
    assert set(ops) == {"linear_token_stats", "linear_token_loss"}
    assert any("linear_token_stats" in row["name"] for row in ops["linear_token_stats"]["kernels"])
    for op in ops.values():
        assert sum(row["share"] for row in op["kernels"]) <= 1.0 + 1e-9


# --- steps that go wrong --------------------------------------------------------------------------------------------

RECORD = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}')\n"


def test_a_step_that_dies_leaves_the_others(tmp_path, capsys):
    steps = run(
        tmp_path,
        [step("dies", "import sys; sys.exit('no such card')")],
        [step("killed", RECORD + "import os; os.kill(os.getpid(), 9)"), step("lives", RECORD)],
        [step("follows", "", after="dies"), step("goes on", "", after="lives")],
    )
    assert (steps["dies"]["status"], steps["dies"]["exit_code"]) == ("failed", 1)
    assert "no such card" in steps["dies"]["end_of_log"]
    assert (steps["killed"]["status"], steps["killed"]["result"]) == ("failed", {"half": 1})
    assert steps["killed"]["exit_code"] == 128 + 9
    assert (steps["lives"]["status"], steps["lives"]["result"]) == ("ok", {"half": 1})
    assert steps["follows"] == {"status": "skipped", "reason": "dies: failed"}
    assert steps["goes on"]["status"] == "ok"
    assert "no such card" in capsys.readouterr().out


SLOW = """
import json, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
pathlib.Path(sys.argv[1]).write_text(json.dumps({"child": child.pid}))
print("log of it", flush=True)
time.sleep(100)
"""


def test_a_step_that_hangs_keeps_what_it_recorded(tmp_path):
    outcome = run(tmp_path, [step("hangs", SLOW, limit=2.0)])["hangs"]
    assert outcome["status"] == "out of time"
    assert 2.0 <= outcome["seconds"] < 10
    assert outcome["end_of_log"] == "log of it\n"
    assert gone([outcome["result"]["child"]])


def test_children_that_a_step_leaves_behind_are_ended(tmp_path):
    code = SLOW.replace("time.sleep(100)\n", "\n")
    outcome = run(tmp_path, [step("leaves", code)])["leaves"]
    assert outcome["status"] == "ok"
    assert gone([outcome["result"]["child"]])


def test_what_there_is_no_time_for_is_said(tmp_path):
    stages = [[step("first", "import time; time.sleep(100)", limit=100)], [step("second", ""), step("third", "")]]
    steps = run(tmp_path, *stages, words=("--seconds", "11"))
    assert steps["first"]["status"] == "out of time"
    assert steps["first"]["limit"] < 10
    for name in ("second", "third"):
        assert steps[name] == {"status": "not reached", "reason": "no time was left"}


TURN = """
import json, pathlib, sys, time
from bench.turns import wait_for_turn
time.sleep({load})
wait_for_turn()
start = time.monotonic()
time.sleep({work})
pathlib.Path(sys.argv[1]).write_text(json.dumps({{"start": start, "end": time.monotonic()}}))
"""


def test_turns_are_taken_one_at_a_time(tmp_path):
    names = [f"turn {i}" for i in range(gpu.MAX_LOADED + 2)]
    stage = [step(name, TURN.format(load=0, work=0.3), takes_turns=True) for name in names]
    stage.append(step("beside", "import time; time.sleep(0.2)"))
    steps = run(tmp_path, stage)
    assert {outcome["status"] for outcome in steps.values()} == {"ok"}
    spans = sorted((steps[name]["result"]["start"], steps[name]["result"]["end"]) for name in names)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_turns_limit_starts_with_the_turn(tmp_path):
    """The time for loading and for waiting does not count, and a step that hangs loses its turn."""
    stage = [
        step("first", TURN.format(load=0, work=2.5), limit=8.0, takes_turns=True),
        step("hangs", TURN.format(load=0, work=100), limit=2.0, takes_turns=True),
        step("loads", TURN.format(load=3, work=0.1), limit=2.0, takes_turns=True),
    ]
    steps = run(tmp_path, stage)
    assert [steps[one.name]["status"] for one in stage] == ["ok", "out of time", "ok"]
    assert steps["hangs"]["limit"] == 2.0
    assert steps["loads"]["seconds"] < 2.0


def test_one_that_never_got_its_turn_was_not_reached(tmp_path):
    stage = [
        step("first", TURN.format(load=0, work=100), limit=100.0, takes_turns=True),
        step("second", TURN.format(load=0, work=100), limit=100.0, takes_turns=True),
    ]
    steps = run(tmp_path, stage, words=("--seconds", "12"))
    assert sorted(outcome["status"] for outcome in steps.values()) == ["not reached", "out of time"]


def test_loading_has_a_limit_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST_LOADING", 1.0)
    steps = run(tmp_path, [step("loads", "import time; time.sleep(100)", limit=50.0, takes_turns=True)])
    assert steps["loads"]["status"] == "out of time"
    assert steps["loads"]["limit"] == 1.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_script_and_nothing_is_lost(tmp_path, number):
    """Ended in the middle of a step: by the machine's time limit, by hand, or because memory ran out."""
    script = f"""
        import sys
        sys.path[:0] = [{os.fspath(SCRIPT.parents[1])!r}]
        from bench import gpu
        slow = {SLOW!r}
        words = ("-c", slow, gpu.RESULT)
        gpu.plan = lambda options: [
            [gpu.Step("done", ("-c", "pass"), 30)],
            [gpu.Step("slow", words, 60), gpu.Step("turn", words, 60, takes_turns=True)],
        ]
        sys.exit(gpu.main(["--out", {os.fspath(tmp_path / "out")!r}, "--device", "cpu", "--seconds", "60"]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.DEVNULL,
        # In the background of a script, SIGINT is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 30
    pids: list[int] = []
    while len(pids) < 2 and time.monotonic() < end:
        time.sleep(0.1)
        if (tmp_path / "out" / "logs.tar.gz").exists():  # written last
            steps = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
            pids = [steps[name]["result"]["child"] for name in ("slow", "turn") if "result" in steps.get(name, {})]
    assert len(pids) == 2
    parents = [int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) for pid in pids]
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    assert gone([*pids, *parents])
    for partial in (tmp_path / "out").glob("*.partial"):  # left by an interrupted write
        partial.unlink()
    steps = written(tmp_path / "out")["steps"]
    assert steps["done"]["status"] == "ok"
    expected = "running" if number == signal.SIGKILL else "interrupted"
    for name in ("slow", "turn"):
        assert steps[name]["status"] == expected
        assert steps[name]["result"]["child"] in pids
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert logs.extractfile("slow.log").read() == b"log of it\n"


# --- what is installed ----------------------------------------------------------------------------------------------


def test_wheels_and_archives_are_installed_without_their_dependencies(tmp_path, make_wheel):
    folder = tmp_path / "wheels"
    make_wheel(folder, "some_peer", {"some_peer.py": "ANSWER = 42\n"}, "Requires-Dist: torch==0\n")
    inside = tmp_path / "nvidia_cutlass_dsl" / "dsl_packages"
    inside.mkdir(parents=True)
    (inside / "some_dsl.py").write_text("ANSWER = 43\n")
    with tarfile.open(folder / "dsl.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "nvidia_cutlass_dsl", "nvidia_cutlass_dsl")
    code = "import some_peer, some_dsl; print(some_peer.ANSWER, some_dsl.ANSWER)"
    steps = run(tmp_path, gpu.installs(folder), [step("uses them", code), step("has torch", "import torch")])
    assert set(steps) == {"install dsl.tar.xz", "install wheels", "uses them", "has torch"}
    assert {outcome["status"] for outcome in steps.values()} == {"ok"}
    assert (tmp_path / "work" / "uses_them.log").read_text() == "42 43\n"
    assert gpu.installs(None) == []


def test_a_wheel_that_does_not_fit_is_told(tmp_path, make_wheel):
    make_wheel(tmp_path / "wheels", "some_peer", {"some_peer.py": ""}, tag="cp27-cp27m-win32")
    steps = run(tmp_path, gpu.installs(tmp_path / "wheels"))
    assert steps["install wheels"]["status"] == "failed"
    assert "not a supported wheel" in steps["install wheels"]["end_of_log"]


# --- what is read from others ---------------------------------------------------------------------------------------


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
    test, outcome = gpu_steps.outcome_of(line)
    assert (test.removeprefix("tests/gpu/test_a.py"), outcome) == expected


def test_counters_are_read_among_other_lines():
    output = (
        "==PROF== Connected to process 7\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"\n'
        '"0","linear_forward_kernel","GPU Speed Of Light Throughput","Duration","ms","13.2",""\n'
        '"0","linear_forward_kernel","Occupancy","Block Limit Registers","block","1",""\n'
        '"0","linear_forward_kernel","Occupancy","","","","AchievedOccupancy"\n'
        '"1","linear_dlogits_kernel","Occupancy","Block Limit Registers","block","2",""\n'
        "==PROF== Disconnected\n"
    )
    assert gpu_steps.counters_of(output) == {
        "linear_forward_kernel": {
            "GPU Speed Of Light Throughput: Duration": "13.2 ms",
            "Occupancy: Block Limit Registers": "1 block",
        },
        "linear_dlogits_kernel": {"Occupancy: Block Limit Registers": "2 block"},
    }
