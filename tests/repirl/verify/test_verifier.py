"""The verifier's workers: order, limits, faults, and that none is left."""

import contextlib
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_config

from repirl.config import ConfigError, RunError
from repirl.configfile import build_config
from repirl.loop import train
from repirl.options import VerifierConfig
from repirl.report.log import read_metrics
from repirl.verify.math import MAX_PARSED
from repirl.verify.process import Verifier

HALF = r"\boxed{\frac{2}{4}}"
# Of a busy machine, to end a process.
SECONDS_TO_END = 30


def judge(response, answer):
    """A reward function that does what the response says; it returns a number where that names one."""
    kind, _, rest = response.partition(" ")
    if kind == "sleep":
        time.sleep(float(rest.split()[0]))
    if kind == "child":
        Path(rest).write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)
    if kind == "exit":
        os._exit(3)
    if kind == "memory":
        # The system would give that, as long as nobody writes to it.
        bytearray(6 << 30)
    if kind == "noise":
        print('{"reward": 1.0}\n1.0\nline 1:0 no viable alternative', flush=True)
        os.system("echo 1.0")
    if kind == "read":
        return float(sys.stdin.read() == "")
    if kind == "spin":
        # One operation that no signal handler of Python's interrupts.
        9 ** (9 ** (9**9))
    if kind == "raise":
        raise KeyError(rest)
    if kind == "quit":
        sys.exit(rest)
    if kind == "return":
        return {"None": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0]}[rest]
    if kind == "pid":
        return os.getpid()
    return 1 if response.endswith("right") else 0.25


@pytest.fixture
def function(tmp_path, monkeypatch):
    """The name of `judge` in a module of its own, which only the trainer's path leads to."""
    source = "import os, subprocess, sys, time\nfrom pathlib import Path\n\n" + inspect.getsource(judge)
    (tmp_path / "bad_reward.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return "bad_reward:judge"


@pytest.fixture
def make(function):
    """Verifiers of `judge`, which are closed in the end."""
    made = []

    def make(processes=1, timeout_seconds=20.0, function=function):
        config = VerifierConfig(kind="custom", function=function, processes=processes, timeout_seconds=timeout_seconds)
        made.append(Verifier(config))
        return made[-1]

    yield make
    for verifier in made:
        verifier.close()


@pytest.fixture
def maths():
    verifier = Verifier(VerifierConfig(processes=2))
    yield verifier
    verifier.close()


@pytest.fixture(autouse=True)
def _none_is_left():
    yield
    assert children() == set()


def children():
    """Workers of this process, also those that died and were not waited for."""
    return {pid for pid in pids() if status(pid)[1] == os.getpid() and "repirl.verify.worker" in command(pid)}


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def status(pid):
    """State and parent of a process; ("X", 0) where there is none."""
    with contextlib.suppress(OSError):
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return state, int(parent)
    return "X", 0


def command(pid):
    """Its command line; of a zombie, which has none any more, what is looked for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text() or "repirl.verify.worker"
    return ""


def wait_until_gone(pid):
    """Nobody may ask how an orphan ended: a zombie is as good as gone."""
    deadline = time.monotonic() + SECONDS_TO_END
    while status(pid)[0] not in "XZ":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rewards_are_in_order_whoever_is_first(make):
    verifier = make(processes=2)
    pairs = [("sleep 1 right", "x"), *[(f"{i} {'right' * (i % 3 == 0)}", "x") for i in range(40)], ("sleep .3", "x")]
    expected = [1.0, *[1.0 if i % 3 == 0 else 0.25 for i in range(40)], 0.25]
    assert verifier.judge(pairs) == expected
    assert verifier.judge(pairs) == expected
    assert len(children()) == 2
    assert verifier.num_timeouts == verifier.num_overlong == 0


def test_a_slow_answer_holds_up_its_own_worker_only(make):
    verifier = make(processes=2)
    verifier.judge([("sleep .2", "x")] * 2)
    slow, *others = verifier.judge([("sleep 1.5", "x"), *[("pid", "x")] * 20])
    assert slow == 0.25
    assert len(set(others)) == 1


def test_workers_start_only_for_what_there_is(maths, make):
    assert maths.judge([]) == []
    assert maths.judge([("#### 1,234", "1234"), ("#### 3", "4")] * 4) == [1.0, 0.0] * 4
    tower = "9^{9^{9^9}}"
    assert maths.judge([(rf"\boxed{{{tower}}}", tower)]) == [1.0]
    assert not children()
    assert maths.judge([(HALF, r"\frac{1}{2}"), ("#### 5", "5")]) == [1.0, 1.0]
    assert len(children()) == 1
    verifier = make(processes=4)
    before = children()
    assert verifier.judge([("right", "x")] * 2) == [1.0, 1.0]
    assert len(children() - before) == 1
    assert verifier.judge([]) == []


def test_a_hanging_answer_is_killed_in_time_and_costs_no_other(make, tmp_path):
    verifier = make(processes=2, timeout_seconds=1.0)
    child = tmp_path / "child"
    pairs = [("right", "x"), ("sleep 1000", "x"), ("spin", "x"), (f"child {child}", "x"), *[("right", "x")] * 5]
    begin = time.monotonic()
    assert verifier.judge(pairs) == [1.0, 0.0, 0.0, 0.0, *[1.0] * 5]
    assert time.monotonic() - begin < 10
    assert verifier.num_timeouts == 3
    # With what it had started.
    wait_until_gone(int(child.read_text()))


@pytest.mark.parametrize("response", ["exit", "memory"])
def test_a_worker_that_dies_costs_one_answer(make, response):
    verifier = make()
    for number in (1, 2):
        assert verifier.judge([("right", "x"), (response, "x"), ("right", "x")]) == [1.0, 0.0, 1.0]
        assert verifier.num_timeouts == number


def test_what_cannot_even_be_handed_over_is_given_up(make):
    verifier = make(timeout_seconds=1.0)
    (pid,) = children()
    # It does not read, and the socket is full before all is written.
    os.kill(pid, signal.SIGSTOP)
    long = "x" * (1 << 21) + " right"
    assert verifier.judge([(long, "x"), ("right", "x")]) == [0.0, 1.0]
    assert verifier.num_timeouts == 1
    assert verifier.judge([(long, "x")]) == [1.0]


def test_one_that_dies_idle_costs_none(make):
    verifier = make()
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    while status(pid)[0] != "Z":
        time.sleep(0.01)
    assert verifier.judge([("right", "x")]) == [1.0]
    assert verifier.num_timeouts == 0


def test_what_a_function_prints_or_reads_is_no_message(make, capfd):
    verifier = make()
    assert verifier.judge([("noise", "x"), ("right", "x"), ("noise right", "x"), ("read", "x")]) == [0.25, 1, 1, 1]
    assert verifier.num_timeouts == 0
    out, err = capfd.readouterr()
    assert "1.0" not in out
    assert "no viable alternative" in err


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise it \ud800", "KeyError: 'it \\ud800' ("),
        ("quit now", "SystemExit: now ("),
        ("return None", "returned None, which is not a number"),
        ("return nan", "returned nan, which is not finite"),
        ("return inf", "returned inf, which is not finite"),
        ("return text", "returned '1.0', which is not a number"),
        ("return list", "returned [1.0], which is not a number"),
    ],
)
def test_a_fault_of_the_function_ends_the_run(make, response, reason):
    verifier = make(processes=2)
    with pytest.raises(RunError, match=r"'bad_reward:judge' failed on a response: ") as caught:
        verifier.judge([("right", "x"), (response, "x"), ("sleep 1000", "x")])
    assert reason in str(caught.value).replace("\\\\", "\\")
    assert "(" not in reason or "bad_reward.py, line " in str(caught.value)
    assert not children()
    # It is the caller's to go on or not.
    assert verifier.judge([("right", "x")]) == [1.0]


def test_numbers_of_other_libraries_are_numbers(make, tmp_path):
    source = "import numpy\n\n\ndef judge(response, answer):\n    return getattr(numpy, response)(1)\n"
    (tmp_path / "numpy_reward.py").write_text(source)
    verifier = make(function="numpy_reward:judge")
    assert verifier.judge([("float32", "x"), ("int64", "x"), ("bool_", "x")]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("bad_reward:jugde", "has no attribute 'jugde'"),
        ("bad_reward:time", "cannot be called"),
        ("broken_reward:judge", "ZeroDivisionError: division by zero ("),
        ("leaving_reward:judge", "SystemExit: 7 ("),
    ],
)
def test_a_function_that_is_not_there_is_told_at_once(make, tmp_path, name, reason):
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    (tmp_path / "leaving_reward.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(ConfigError, match=f"^verifier.function is '{name}', but it cannot be loaded: ") as caught:
        make(function=name)
    assert reason in str(caught.value)
    assert not children()


def test_a_worker_that_dies_at_its_start_is_told(make, tmp_path):
    (tmp_path / "dying_reward.py").write_text("import os\nos._exit(9)\n")
    with pytest.raises(RunError, match=r"dying_reward:judge, does not start: it ended with exit code 9"):
        make(function="dying_reward:judge")


def test_close_ends_all_and_may_be_repeated(make):
    verifier = make(processes=2)
    verifier.judge([("sleep .2", "x")] * 2)
    assert len(children()) == 2
    verifier.close()
    verifier.close()
    assert not children()
    assert verifier.judge([("right", "x")]) == [1.0]


TRAINER = """
import sys
from repirl.options import VerifierConfig
from repirl.verify.process import Verifier

if __name__ == "__main__":
    sys.path.insert(0, {folder!r})
    config = VerifierConfig(kind="custom", function="bad_reward:judge", processes=2, timeout_seconds={seconds})
    verifier = Verifier(config)
    print(*map(int, verifier.judge([("pid", "x")])), flush=True)
    print("judging", flush=True)
    {then}
"""


@pytest.fixture
def trainer(function, tmp_path):
    """Starts a process that judges a response; gives it, and its worker's number."""
    started = []

    def start(then, seconds=1.0):
        script = TRAINER.format(folder=str(tmp_path), seconds=seconds, then=then)
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=-1, text=True)
        started.append(process)
        pid = int(process.stdout.readline())
        process.stdout.readline()
        return process, pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("response", ["spin", "sleep 1000"])
def test_a_worker_ends_by_itself_when_its_trainer_is_killed(trainer, response):
    process, pid = trainer(f"verifier.judge([({response!r}, 'x')])")
    time.sleep(0.2)
    process.kill()
    process.wait()
    wait_until_gone(pid)


def test_an_idle_worker_ends_when_its_trainer_does(trainer):
    process, pid = trainer("__import__('time').sleep(1000)")
    process.kill()
    process.wait()
    wait_until_gone(pid)


def test_an_interrupt_ends_trainer_and_workers(trainer):
    process, pid = trainer("verifier.judge([('sleep 1000', 'x')] * 3)", seconds=1000)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS_TO_END)
    assert "KeyboardInterrupt" in errors
    wait_until_gone(pid)


def test_the_mathematical_verifier_counts_what_takes_too_long(maths):
    assert maths.judge([(HALF, r"\frac{1}{2}"), (r"\boxed{9^{9^{9^{9^{9}}}}}", "x + 1")]) == [1.0, 0.0]
    assert maths.num_timeouts == 0
    maths.config = maths.config.model_copy(update={"timeout_seconds": 2.0})
    # Sums to the 60th power take minutes to be compared.
    assert maths.judge([(r"\boxed{(x + y + z + 1)^{60}}", "x + 1")]) == [0.0]
    assert maths.num_timeouts == 1
    maths.config = maths.config.model_copy(update={"timeout_seconds": 60.0})
    pairs = [(HALF, r"\frac{1}{2}"), (r"\boxed{x + 1}", "1 + x"), (r"\boxed{x + 2}", "1 + x"), ("so it is $x$", "x")]
    assert maths.judge(pairs) == maths.judge(pairs) == [1.0, 1.0, 0.0, 1.0]
    assert maths.num_timeouts == 1


def test_hundreds_of_endless_answers_take_seconds(maths):
    endless = ["(" * 10_000, "x^{" * 2500 + "x" + "}" * 2500, "1+" * 5000 + "x", "9" * 9999 + "x"]
    pairs = [(rf"\boxed{{{text}}}", r"\frac{1}{2}") for text in endless] * 128
    # Those that mark no answer are judged, by their end.
    unmarked = [(text, r"\frac{1}{2}") for text in [*endless, "the answer is " * 700]]
    begin = time.monotonic()
    assert maths.judge(pairs) == [0.0] * 512
    assert time.monotonic() - begin < 10
    assert not children()
    assert maths.num_overlong == 512
    assert maths.judge(unmarked * 2) == [0.0] * 10
    assert time.monotonic() - begin < 40
    assert maths.num_overlong == 512
    assert maths.num_timeouts == 0


def test_what_is_too_long_counts_once_and_equal_texts_stay_right(maths):
    long = "x+" * MAX_PARSED + "1"
    assert maths.judge([(f"#### {long}", long), (f"#### {long}", "1"), ("#### 1+x", long)]) == [1.0, 0.0, 0.0]
    assert maths.num_overlong == 2


BASE = {"output_dir": "x", "steps": 1, "policy": {"model": "m"}, "data": {"train": "t", "solution_column": "s"}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"function": "a:b"}, "verifier.function is 'a:b', but verifier.kind 'math' judges by itself"),
        ({"kind": "custom"}, "verifier.kind is 'custom', but verifier.function is not set"),
        ({"kind": "custom", "function": "a.b"}, "verifier.function is 'a.b', expected \"module:name\""),
        ({"kind": "custom", "function": "a b:c"}, "verifier.function is 'a b:c', expected \"module:name\""),
        ({"processes": 0}, "option 'verifier.processes' is 0: "),
        ({"timeout_seconds": float("inf")}, "option 'verifier.timeout_seconds' is inf: "),
    ],
)
def test_options_that_do_not_fit_are_refused(section, message):
    with pytest.raises(ConfigError) as caught:
        build_config(BASE | {"verifier": section})
    assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        build_config(BASE | {"eval": {"verifier": section}})
    for name in ("verifier.kind", "verifier.function", "verifier.processes", "verifier.timeout_seconds"):
        message = message.replace(name, f"eval.{name}")
    assert message in str(caught.value)


def test_held_out_responses_can_have_a_verifier_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "verdicts.py").write_text(
        "def wrong(response, answer):\n    return 0\n\ndef right(response, answer):\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    verifiers = {name: {"kind": "custom", "function": f"verdicts:{name}"} for name in ("wrong", "right")}
    options = {"objective": "rloo", "steps": 1, "eval": {"every": 1, "verifier": verifiers["right"]}}
    config = tiny_config(tmp_path, verifier=verifiers["wrong"], **options)
    train(config)
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert [line["eval/accuracy"] for line in lines] == [1, 1]
    assert lines[1]["rollout/outcome"] == 0


def test_options():
    assert build_config(BASE).verifier == VerifierConfig(kind="math", function=None, processes=1, timeout_seconds=20.0)
    section = {"kind": "custom", "function": "rewards.code:Judge.run", "processes": 3}
    assert build_config(BASE | {"verifier": section}).verifier.function == "rewards.code:Judge.run"
