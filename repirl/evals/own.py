"""Data sets in the formats of benchmarks, made of arithmetic problems: to try everything without a download.

    python -m repirl.evals.own processbench FILE [--num 200] [--seed 0]

The problems are those of `repirl demo`, so its models can be asked, and its PRMs be judged. Solutions are the expert's;
half of them have an error that was planted into one step, after which they go on consistently.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from repirl.config import ConfigError, RunError
from repirl.data.tasks.arithmetic import Problem, Solution, expert_solution, planted_error, problems
from repirl.output_path import LINES, check_file

# Fewest and most steps of a problem, as in the demo.
_NUM_STEPS = (4, 5)


def write_gsm8k(path: str | os.PathLike, seed: int = 0, num: int = 200) -> None:
    """Write problems in the format of GSM8K: `question`, and `answer` with the worked solution.

    Args:
        path: the file, which must not exist.
        seed: of the problems. They may be those of a demo with the same seed.
        num: how many.

    Raises:
        ConfigError: the file exists or cannot be made, or `num` is less than 1.
        RunError: it cannot be written.
    """
    drawn = _drawn(seed, num)
    _write(path, ({"question": p.prompt, "answer": expert_solution(p).text} for p in drawn))


def write_processbench(path: str | os.PathLike, seed: int = 0, num: int = 200) -> None:
    """Write solutions in the format of ProcessBench, every second one with a planted error; see `write_gsm8k`."""
    rng = random.Random(seed)

    def rows() -> Iterator[dict[str, Any]]:
        for number, problem in enumerate(_drawn(seed, num)):
            solution = planted_error(problem, rng) if number % 2 else expert_solution(problem)
            label = -1 if solution.error_step is None else solution.error_step
            row = {"id": f"arithmetic-{number}", "generator": "planted", "problem": problem.prompt}
            yield row | {"steps": _steps(solution), "final_answer_correct": label == -1, "label": label}

    _write(path, rows())


def write_prmbench(path: str | os.PathLike, seed: int = 0, num: int = 200) -> None:
    """Write samples in the format of PRMBench; see `write_gsm8k`. Every second one has a planted error (classification
    `counterfactual`), the others say one step twice (`redundency`); both come with the expert's solution."""
    rng = random.Random(seed)

    def rows() -> Iterator[dict[str, Any]]:
        for number, problem in enumerate(_drawn(seed, num)):
            original = _steps(expert_solution(problem))
            if number % 2:
                solution = planted_error(problem, rng)
                assert solution.error_step is not None
                kind, changed, wrong = "counterfactual", _steps(solution), solution.error_step
            else:
                said = rng.randrange(len(original) - 1)
                kind, changed, wrong = "redundency", [*original[: said + 1], *original[said:]], said + 1
            yield {
                "idx": f"arithmetic-{number}",
                "classification": kind,
                "question": problem.prompt,
                "original_question": problem.prompt,
                "modified_question": problem.prompt,
                "original_process": original,
                "modified_process": changed,
                "modified_steps": [wrong + 1],
                "error_steps": [wrong + 1],
                "reason": "planted" if number % 2 else "said twice",
            }

    _write(path, rows())


def _drawn(seed: int, num: int) -> list[Problem]:
    if num < 1:
        raise ConfigError(f"--num is {num}, expected at least 1")
    return list(islice(problems(seed, _NUM_STEPS), num))


def _steps(solution: Solution) -> list[str]:
    return [line.removesuffix("; ") for line in solution.lines]


def _write(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    check_file(path, LINES, option="FILE")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"{os.fspath(path)!r} cannot be written: {error.strerror}") from error


WRITERS: dict[str, Callable[[str, int, int], None]] = {
    "gsm8k": write_gsm8k,
    "processbench": write_processbench,
    "prmbench": write_prmbench,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m repirl.evals.own", description="Data of arithmetic problems.")
    parser.add_argument("format", choices=sorted(WRITERS), help="of which benchmark")
    parser.add_argument("output", metavar="FILE", help="JSON lines")
    parser.add_argument("--num", type=int, default=200, metavar="N", help="rows; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of problems and errors; default: 0")
    options = parser.parse_args(arguments)
    try:
        WRITERS[options.format](options.output, options.seed, options.num)
    except (ConfigError, RunError) as error:
        print(f"repirl.evals.own: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{options.output}: {options.num} rows in the format of {options.format}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
