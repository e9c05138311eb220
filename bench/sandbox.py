"""How many programs a second the sandbox runs, by kind: trivial ones, so that what is measured is the sandbox.

    python -m bench.sandbox                              every kind of this machine, 7 rounds of 200 programs
    python -m bench.sandbox --workers 4 --programs 1000

Programs a second depend on what else the machine does, which is printed as its load; the time on its processors, of
which two give twice as many programs, depends less on it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--tasks", default="program,function,test")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.workers} workers")
    print("kind         task      programs/s: median (quartiles)   ms of processors, with the start of the workers")
    for kind in KINDS:
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


if __name__ == "__main__":
    main()
