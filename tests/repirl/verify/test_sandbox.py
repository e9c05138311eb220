"""The sandbox for programs that mean no harm, its limits, and what is left when it or its trainer ends."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sandboxes import LIMITS, kinds, leftovers, processes

from bench.sandbox import compare_mixed
from repirl.config import ConfigError, RunError
from repirl.verify import sandbox as module
from repirl.verify.jail import limits as limiting
from repirl.verify.jail.plain import PlainError
from repirl.verify.sandbox import Limits, Sandbox


@pytest.fixture(scope="module", params=kinds())
def sandbox(request):
    with Sandbox(LIMITS, workers=2, kind=request.param) as sandbox:
        yield sandbox


def test_there_is_a_sandbox_here():
    """Else these tests would pass without any."""
    assert kinds()


def test_programs(sandbox):
    execution = sandbox.run_program("print(sum(map(int, input().split())), 'ü')", "1 2 3\n")
    assert (execution.status, execution.exit_code, execution.stdout, execution.stderr) == ("ok", 0, "6 ü\n", "")
    assert execution.value is None
    assert 0 < execution.seconds < 60


def test_ways_to_end(sandbox):
    def ends(source):
        execution = sandbox.run_program(source)
        return execution.status, execution.exit_code

    assert ends("raise SystemExit(3)") == ("error", 3)
    assert ends("raise SystemExit") == ("ok", 0)
    assert ends("exit()") == ("ok", 0)
    assert ends("quit(3)") == ("error", 3)
    assert ends("import os\nos.abort()") == ("killed", -6)
    assert ends("x = 'open") == ("compile_error", 0)
    execution = sandbox.run_program("def f():\n    return 1 / 0\nf()")
    assert execution.status == "error"
    # As the interpreter writes it, with lines of the source, and nothing of ours.
    assert execution.stderr.startswith(
        'Traceback (most recent call last):\n  File "solution.py", line 3, in <module>\n'
    )
    assert execution.stderr.endswith("    return 1 / 0\n           ~~^~~\nZeroDivisionError: division by zero\n")


def test_what_programs_use(sandbox):
    """Threads, processes, pools, files, modules, classes that are found by their module's name."""
    source = """
import asyncio, collections, concurrent.futures, dataclasses, functools, multiprocessing, pickle, sqlite3
import subprocess, sys
import tempfile, threading

@dataclasses.dataclass
class A:
    x: int

def square(x):
    return x * x

if __name__ == "__main__":
    print(pickle.loads(pickle.dumps(A(1))))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        print(list(pool.map(square, range(3))))
    with tempfile.TemporaryFile() as file:
        print(file.write(b"abc"))
    async def main():
        await asyncio.sleep(0)
        return 5
    print(asyncio.run(main()))
    print(subprocess.run([sys.executable, "-c", "print(6)"], capture_output=True, text=True).stdout.strip())
    print(sqlite3.connect(":memory:").execute("select 7").fetchone())
    sys.setrecursionlimit(10**6)
    threading.stack_size(1 << 26)
    def depth(n):
        return 0 if n == 0 else 1 + depth(n - 1)
    result = []
    thread = threading.Thread(target=lambda: result.append(depth(20_000)))
    thread.start()
    thread.join()
    print(result)
    cached = functools.cache(lambda n: 0 if n == 0 else 1 + cached(n - 1))
    # From Python 3.12 on calls from C code have a limit of their own.
    print(cached(30_000 if sys.version_info < (3, 12) else 1_000) >= 1_000)
    if sys.argv[0] == "solution.py":
        process = multiprocessing.get_context("fork").Process(target=print, args=(8,))
        process.start()
        process.join()
"""
    limits = dataclasses.replace(LIMITS, memory_mb=256)
    with Sandbox(limits, kind=sandbox.kind) as larger:
        execution = larger.run_program(source)
    assert execution.stdout.splitlines() == ["A(x=1)", "[0, 1, 4]", "3", "5", "6", "(7,)", "[20000]", "True", "8"], (
        execution
    )


def test_devices_and_locks(sandbox):
    source = "import multiprocessing, os\nprint(8, file=open(os.devnull, 'w'))\n"
    if sandbox.kind != "landlock":
        source += "with multiprocessing.Lock():\n    pass\n"
    execution = sandbox.run_program(source + "print(9)")
    assert execution.stdout == "9\n", execution


@pytest.mark.parametrize(
    "source",
    [
        "out = open(1, 'w')\nout.write(__file__)",
        "import io\nout = io.BufferedWriter(io.FileIO(1, 'wb'))\nout.write(b'solution.py')",
        "import io, sys\nold, sys.stdout = sys.stdout, io.StringIO()\nold.write('solution.py')",
    ],
)
def test_files_that_are_left_open(sandbox, source):
    """What they hold is written at the program's end."""
    assert sandbox.run_program(source).stdout == "solution.py"


def test_what_is_not_run_where_functions_are_called(sandbox):
    source = "def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(int(input())))"
    assert [execution.value for execution in sandbox.call_functions(source, "f", [[1], [2]])] == [1, 2]
    assert sandbox.run_assertions(source, "assert f(1) == 1", "f").status == "ok"
    assert sandbox.run_program(source, "3").stdout == "3\n"
    source = "class Solution:\n    seen = ()\n    def f(self, x):\n        self.seen += (x,)\n        return self.seen"
    assert [execution.value for execution in sandbox.call_functions(source, "f", [[1], [2]])] == [(1,), (2,)]


def test_functions(sandbox):
    source = "state = []\ndef f(x, y=0):\n    state.append(x)\n    return x + y, len(state)"
    first, second, third = sandbox.call_functions(source, "f", [[1], [2, 3], ["a"]])
    assert (first.value, second.value) == ((1, 1), (5, 2))
    assert third.status == "error"
    assert "TypeError" in third.stderr
    assert sandbox.call_functions(source, "f", []) == []


def test_methods(sandbox):
    source = "class Solution:\n    def f(self, x):\n        return self.g(x)\n    def g(self, x):\n        return [x]"
    for name in ("Solution.f", "f"):
        assert [execution.value for execution in sandbox.call_functions(source, name, [[1]])] == [[1]]
    (execution,) = sandbox.call_functions(source, "h", [[1]])
    assert execution.status == "error"
    assert "h" in execution.stderr


def test_plain_data(sandbox):
    """It comes back as it was sent, in its exact types."""
    values = [
        *(
            None,
            True,
            0,
            -(2**200),
            1.5,
            float("inf"),
            2j,
            "ü\ud800",
            b"\0",
            [],
            (1,),
            {1: [2]},
            {1, 2},
            frozenset({3}),
        ),
        [[1, (2, {"a": {3}})]],
    ]
    results = sandbox.call_functions("def f(x):\n    return x", "f", [[value] for value in values])
    assert [(type(result.value), result.value) for result in results] == [(type(value), value) for value in values]
    (result,) = sandbox.call_functions(
        "import collections\ndef f():\n    return collections.Counter('aa'), collections.namedtuple('P', 'x')(1)",
        "f",
        [[]],
    )
    assert result.value == ({"a": 2}, (1,))
    assert type(result.value[0]) is dict
    with pytest.raises(PlainError, match="object"):
        sandbox.call_functions("def f(x):\n    pass", "f", [[object()]])


def test_calls_after_one_that_ends_the_process(sandbox):
    source = "import os\ndef f(x):\n    return x if x < 2 else os._exit(0) if x == 2 else 1 / 0"
    statuses = [execution.status for execution in sandbox.call_functions(source, "f", [[0], [1], [2], [3]])]
    assert statuses == ["ok", "ok", "error", "error"]
    limits = dataclasses.replace(LIMITS, wall_seconds=1)
    source = "def f(x):\n    while x:\n        pass\n    return x"
    statuses = [execution.status for execution in sandbox.call_functions(source, "f", [[0], [1], [0]], limits)]
    assert statuses == ["ok", "timeout", "timeout"]


def test_assertions(sandbox):
    test = "import math\ndef check(candidate):\n    assert candidate(4) == math.sqrt(4), 'of four'\n"
    assert sandbox.run_assertions("def f(x):\n    return x ** 0.5", test, "f").status == "ok"
    wrong = sandbox.run_assertions("def f(x):\n    return x", test, "f")
    assert (wrong.status, wrong.stderr) == ("wrong", "AssertionError: of four")
    assert sandbox.run_assertions("def f(x):", test, "f").status == "compile_error"
    assert sandbox.run_assertions("def g(x):\n    return x", test, "f").status == "error"
    limits = dataclasses.replace(LIMITS, wall_seconds=1)
    assert sandbox.run_assertions("def f(x):\n    while True:\n        pass", test, "f", limits).status == "timeout"


def test_assertions_on_several_functions(sandbox):
    source = "class Solution:\n    def f(self, x):\n        return x\ndef g(x):\n    return -x"
    assert sandbox.run_assertions(source, "assert g(f(1)) == -1", ["Solution.f", "g"]).status == "ok"
    # What the tests need and do not define is not taken from the program.
    assert sandbox.run_assertions(source, "assert g(1) == -1", "f").status == "error"


def test_the_same_verdict_each_time(sandbox):
    """Sets have one order, and random numbers one sequence."""
    source = "import random\nprint({'a', 'b', 'c', 'd', 'e'}, random.random(), hash('x'))"
    assert len({sandbox.run_program(source).stdout for _ in range(3)}) == 1


def test_several_threads(sandbox):
    began = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda n: sandbox.run_program(f"print({n})").stdout, range(24)))
    assert results == [f"{n}\n" for n in range(24)]
    assert time.monotonic() - began < 120


def test_attackers_change_no_verdict_of_others(sandbox):
    count = int(os.environ.get("REPIRL_SANDBOX_PROGRAMS", "80"))
    harmless, attackers, differing, passing = compare_mixed(sandbox, 2, count)
    assert (harmless, attackers) == (count * 19 // 20, count // 20)
    assert (differing, passing) == ([], [])


def test_nothing_leaks(sandbox):
    """Processes, descriptors, memory, threads."""
    count = int(os.environ.get("REPIRL_SANDBOX_PROGRAMS", "60"))

    def state():
        pids = processes(sandbox)
        descriptors = [len(os.listdir(f"/proc/{pid}/fd")) for pid in sorted(pids)]
        return pids, descriptors, len(os.listdir("/proc/self/fd")), threading.active_count()

    def resident():
        return sum(int(open(f"/proc/{pid}/statm").read().split()[1]) for pid in processes(sandbox))

    def run(times):
        for number in range(times):
            sandbox.run_program("print(input())", str(number))
            if number % 10 == 0:
                sandbox.call_functions("def f(x):\n    return x", "f", [[number]])
                sandbox.run_assertions("def f(x):\n    return x", "assert f(1) == 1", "f")

    run(20)
    before, memory = state(), resident()
    run(count)
    assert state() == before
    assert resident() - memory < 256 + count // 100, "pages"


def test_its_end_leaves_nothing(sandbox):
    with Sandbox(LIMITS, workers=2, kind=sandbox.kind) as other:
        other.run_assertions("def f():\n    pass", "f()", "f")
        pids = processes(other)
        # Landlock's folder at least, else a control group where one may be made.
        assert leftovers(pids) or sandbox.kind != "landlock"
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert not leftovers(pids)
    with pytest.raises(RunError, match="closed"):
        other.run_program("")


TRAINER = """
import sys, threading, time
from repirl.verify.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(wall_seconds=100), workers=2, kind=sys.argv[1])
source = "import os, time\\nopen('left', 'w')\\nif os.fork() == 0:\\n    os.setsid()\\ntime.sleep(300)"
for _ in range(2):
    threading.Thread(target=sandbox.run_program, args=(source,), daemon=True).start()
# Threads that end are not to take the workers with them, and the last thing is the trainer itself.
while not all(slot.workers for slot in sandbox._slots):
    time.sleep(0.01)
time.sleep(0.5)
print(*[worker.process.pid for slot in sandbox._slots for worker in slot.workers.values()], flush=True)
time.sleep(300)
"""


def test_a_killed_trainer_leaves_nothing(sandbox):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, sandbox.kind], stdout=subprocess.PIPE, text=True)
    launchers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(launchers) == 2
    proc = os.open("/proc", os.O_RDONLY)
    pids = set(launchers)
    for pid in launchers:
        pids |= set(limiting.descendants(proc, pid))
    os.close(proc)
    # Launcher and zygote of each, and what the programs are.
    assert len(pids) >= 6
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and [pid for pid in pids if alive(pid)]:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]
    while time.monotonic() < deadline and leftovers(pids):
        time.sleep(0.05)
    assert not leftovers(pids)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_worker_is_replaced(sandbox):
    with Sandbox(LIMITS, kind=sandbox.kind) as other:
        os.kill(other._slots[0].workers["candidate"].process.pid, signal.SIGKILL)
        # The zygote ends with its launcher, at once or in the midst of the program.
        other.run_program("print(1)")
        for _ in range(20):
            if other.run_program("print(1)").status == "ok":
                break
        assert other.run_program("print(1)").stdout == "1\n"


@pytest.mark.parametrize(
    ("name", "value"), [("wall_seconds", 0), ("memory_mb", 1.5), ("processes", True), ("file_mb", -1)]
)
def test_limits_that_are_none(name, value):
    with pytest.raises(ConfigError, match=f"limit {name} is {value!r}; expected a positive"):
        Limits(**{name: value})


def test_no_workers():
    with pytest.raises(ConfigError, match="0 workers; expected at least 1"):
        Sandbox(LIMITS, workers=0)


def test_limits_of_one_program(sandbox):
    small = dataclasses.replace(LIMITS, memory_mb=32)
    source = "x = bytearray(60 << 20)\nprint(len(x))"
    assert sandbox.run_program(source, limits=small).status == "memory"
    assert sandbox.run_program(source).status == "ok"
    # Not more than the sandbox has.
    large = dataclasses.replace(LIMITS, memory_mb=4096)
    assert sandbox.run_program("x = bytearray(1 << 30)", limits=large).status == "memory"


def test_system_without_a_sandbox(monkeypatch):
    """It is refused, unless that is asked for, with a warning."""
    monkeypatch.setattr(module, "KINDS", ("bubblewrap",))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"no sandbox on this system.*bubblewrap.*not installed.*--allow-unsandboxed"):
        Sandbox(LIMITS)
    with pytest.warns(UserWarning, match="without a sandbox") as caught:
        other = Sandbox(LIMITS, allow_unsandboxed=True)
    with other:
        assert (other.kind, other.missing) == ("none", str(caught[0].message))
        assert "\n" not in other.missing
        assert other.run_program("print(1)").stdout == "1\n"
        limits = dataclasses.replace(LIMITS, wall_seconds=0.5)
        source = "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(300)"
        before = processes(other)
        assert other.run_program(source, limits=limits).status == "timeout"
        assert processes(other) == before
