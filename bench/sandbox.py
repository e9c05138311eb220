"""How many programs a second the sandbox runs, by kind: trivial ones, so that what is measured is the sandbox.

    python -m bench.sandbox                              every kind of this machine, 7 rounds of 200 programs
    python -m bench.sandbox --workers 4 --programs 1000
    python -m bench.sandbox --mixed 1000                 whether attackers among programs change any verdict of others
    python -m bench.sandbox --kinds namespaces           one kind

With --mixed the same programs run twice on each kind: those that mean no harm alone, then with an attacker in place of
one in twenty. The exit code is 1 where a verdict of the others differs, or an attacker passes.

Programs a second depend on what else the machine does, which is printed as its load; the time on its processors, of
which two give twice as many programs, depends less on it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from repirl.config import ConfigError
from repirl.verify.sandbox import KINDS, Limits, Sandbox

PROGRAM = "print(sum(map(int, input().split())))"
FUNCTION = "def f(x):\n    return x + 1"
TEST = "def check(candidate):\n    assert candidate(1) == 2"


def run_one(sandbox: Sandbox, task: str) -> None:
    """Run it once.

    Raises:
        RuntimeError: what came of it is not right.
    """
    if task == "program":
        is_right = sandbox.run_program(PROGRAM, "1 2\n").stdout == "3\n"
    elif task == "function":
        is_right = sandbox.call_functions(FUNCTION, "f", [[1]])[0].value == 2
    else:
        is_right = sandbox.run_assertions(FUNCTION, TEST, "f").status == "ok"
    if not is_right:
        raise RuntimeError(f"a {task} came out wrong")


# Programs that mean no harm, with a number to read, and programs that do: to processes, files, memory, the trainer, and
# what comes after them.
HARMLESS = (
    "print(int(input()) * 2)",
    "n = int(input())\nprint(sum(range(n)))",
    "import os\nprint(os.listdir(), input())",
    "print(1 / int(input()))",
)
ATTACKERS = (
    "import os\nopen('left', 'w').write('x')\nfor _ in range(30):\n    if os.fork() == 0:\n        os.setsid()",
    "data = bytearray(1 << 40)",
    "import os, signal\nos.kill(-1, signal.SIGTERM)\nos.kill(os.getppid(), 9)",
    "while True:\n    print('x' * 999)",
    "import ctypes\nctypes.string_at(0)",
    "for number in range(40):\n    open(str(number), 'wb').write(bytes(1 << 20))\n1 / 0",
    "import math, builtins, os\nmath.sqrt = builtins.print = builtins.input = len\nos.environ['LEFT'] = '1'\n1 / 0",
    "import os\nfor number in range(64):\n    try:\n        os.write(number, b'P' * 99)\n"
    "    except OSError:\n        pass\nos.closerange(0, 64)\nos.abort()",
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nos._exit(3)",
    "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    "import resource, os\nfor pid in range(99):\n    try:\n        resource.prlimit(pid, resource.RLIMIT_AS, (1, 1))\n"
    "    except OSError:\n        pass\nraise SystemExit(1)",
)


def mixed(count: int, with_attackers: bool) -> Iterator[tuple[int, str]]:
    """Numbered programs in a fixed order, one in twenty an attacker, or those alone that mean no harm."""
    for number in range(count):
        if number % 20 != 7:
            yield number, HARMLESS[number % len(HARMLESS)]
        elif with_attackers:
            yield number, ATTACKERS[number // 20 % len(ATTACKERS)]


def mixed_verdicts(sandbox: Sandbox, workers: int, count: int, with_attackers: bool) -> dict[int, tuple[Any, ...]]:
    """What came of each of the `mixed` programs, by its number."""

    def judge(item: tuple[int, str]) -> tuple[int, tuple[Any, ...]]:
        number, source = item
        execution = sandbox.run_program(source, f"{number % 5}\n")
        return number, (execution.status, execution.exit_code, execution.stdout)

    with ThreadPoolExecutor(workers) as pool:
        return dict(pool.map(judge, mixed(count, with_attackers)))


def compare_mixed(sandbox: Sandbox, workers: int, count: int) -> tuple[int, int, list[int], list[int]]:
    """How many programs mean no harm, how many attack, and the numbers of those of the first whose verdict differs
    where the others run beside them, and of those of the others that end well with an output."""
    alone = mixed_verdicts(sandbox, workers, count, with_attackers=False)
    together = mixed_verdicts(sandbox, workers, count, with_attackers=True)
    differing = [number for number in alone if together[number] != alone[number]]
    attacks = together.keys() - alone.keys()
    passing = [number for number in attacks if together[number][0] == "ok" and together[number][2]]
    return len(alone), len(together) - len(alone), differing, sorted(passing)


def processor_seconds() -> float:
    """Of this process and all that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(kind: str, task: str, workers: int, rounds: int, programs: int) -> tuple[list[float], int]:
    """Programs a second in each round, and how many programs that were."""
    with Sandbox(Limits(wall_seconds=60), workers=workers, kind=kind) as sandbox, ThreadPoolExecutor(workers) as pool:
        for _ in range(4 * workers):
            run_one(sandbox, task)
        rates = []
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(lambda _: run_one(sandbox, task), range(programs)))
            rates.append(programs / (time.perf_counter() - began))
    return rates, rounds * programs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--tasks", default="program,function,test")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--mixed", type=int, default=0, metavar="N", help="run N programs, one in twenty an attacker")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds names {min(unknown)!r}, expected some of {', '.join(KINDS)}")
    if options.rounds < 2 or options.programs < 1:
        parser.error("--rounds is at least 2, as a spread is printed, and --programs at least 1")
    if options.mixed:
        return print_mixed(kinds, options.workers, options.mixed)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.workers} workers")
    print("kind         task      programs/s: median (quartiles)   ms of processors, with the start of the workers")
    for kind in kinds:
        for task in options.tasks.split(","):
            before = processor_seconds()
            try:
                rates, count = measure(kind, task, options.workers, options.rounds, options.programs)
            except ConfigError as error:
                print(f"{kind:12s} not on this machine: {error}")
                break
            low, middle, high = statistics.quantiles(rates, n=4)
            used = 1000 * (processor_seconds() - before) / count
            print(f"{kind:12s} {task:9s} {middle:8.1f} ({low:.1f} to {high:.1f}) {used:20.2f}", flush=True)
    return 0


def print_mixed(kinds: list[str], workers: int, count: int) -> int:
    """The comparison on each kind; the exit code."""
    is_worse = False
    for kind in kinds:
        try:
            with Sandbox(Limits(wall_seconds=60, memory_mb=256), workers=workers, kind=kind) as sandbox:
                harmless, attackers, differing, passing = compare_mixed(sandbox, workers, count)
        except ConfigError as error:
            print(f"{kind:12s} not on this machine: {error}")
            continue
        is_worse = is_worse or bool(differing or passing)
        print(
            f"{kind:12s} {harmless} programs, {attackers} attackers among them: {len(differing)} verdicts differ"
            f"{f' {differing[:9]}' if differing else ''}, {len(passing)} attackers pass"
            f"{f' {passing[:9]}' if passing else ''}",
            flush=True,
        )
    return 1 if is_worse else 0


if __name__ == "__main__":
    sys.exit(main())
