"""Trains the cells of the study, several at a time, each in a process of its own.

Results are kept in FOLDER/cells/KEY.json, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.study.cells import LESSONS, STARTS, TASKS, Cell
from bench.study.programs import judge_programs
from repirl.apps.demo import DEMOS, score_solutions
from repirl.apps.localize import judge
from repirl.apps.start import TASKS as GENERATED
from repirl.apps.start import make_start
from repirl.config import Config
from repirl.data.tasks.arithmetic import Solution
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.prm import PRMDescription, load_prm
from repirl.report.log import read_metrics

# A cell takes about a minute.
TIMEOUT_SECONDS = 1800


def result_path(folder: Path, cell: Cell) -> Path:
    """Where the result of a cell is kept."""
    return folder / "cells" / f"{cell.key(folder)}.json"


def prepare(folder: Path, start: str, seed: int) -> None:
    """Make a start: its data, its model, and tests.json with the solutions that PRMs are judged on."""
    target = folder / "starts" / f"{start}_{seed}"
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tests = make_start(partial, seed, STARTS[start], LESSONS[start])
    (partial / "tests.json").write_text(json.dumps([asdict(test) for test in tests]))
    partial.rename(target)


def load_tests(path: Path, lesson: str = "arithmetic") -> list[Solution]:
    """The solutions that `prepare` wrote; lesson: what they are solutions of."""
    return [GENERATED[lesson].solution_from(row) for row in json.loads(path.read_text())]


def train_and_judge(
    config: Config, tests: Path, lesson: str = "arithmetic"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train a run anew, and judge its PRM if it trains one; of its folder the metrics stay.

    Args:
        config: the run's.
        tests: the file of solutions that `prepare` wrote.
        lesson: what they are solutions of.

    Returns:
        The lines of its metrics, and what the study keeps of a run: accuracies by turn (shares of held-out prompts),
        tokens, seconds, turns in which the policy waited or was skipped, and `planted`, how well the PRM finds planted
        errors; of programs also what `judge_programs` says of those that the policy writes at the end.
    """
    output_dir = Path(config.output_dir)
    shutil.rmtree(output_dir, ignore_errors=True)
    begin = time.perf_counter()
    train(config)
    seconds = time.perf_counter() - begin
    lines = read_metrics(output_dir / "metrics.jsonl")
    result: dict[str, Any] = {
        "curve": [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line],
        "tokens": sum(line.get("tokens", 0) for line in lines),
        "sampled_tokens": sum(line.get("tokens/response", 0) for line in lines),
        "seconds": seconds,
        "held": sum(line.get("policy/held", 0) for line in lines),
        "skipped": sum(line.get("policy/skipped", 0) for line in lines),
    }
    # A policy that imitates experts is a PRM, too, by its log-probabilities: what a trained one has to beat.
    imitates = config.system.trains == ("policy",) and not config.system.online
    if "prm" in config.system.trains or imitates:
        export_checkpoint(output_dir, output_dir / "export", step_separator=DEMOS[lesson].step_separator)
        path = output_dir / "export" / ("policy" if imitates else "prm")
        prm = load_prm(path, device="cpu", description=PRMDescription(reward="logprob") if imitates else None)
        solutions = load_tests(tests, lesson)
        scores = score_solutions(prm, solutions, lesson)
        result["planted"] = judge([steps for steps, _ in scores], [s.error_step for s in solutions])
    if config.verifier.kind == "code":
        result["programs"] = judge_programs(config)
    for part in ("checkpoints", "export"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    return lines, result


def run_cell(folder: Path, cell: Cell) -> dict[str, Any]:
    """Train a cell; the result is that of `train_and_judge`, with the cell."""
    config = cell.config(folder, folder / "runs" / cell.key(folder))
    tests = cell.start_folder(folder) / "tests.json"
    _, result = train_and_judge(config, tests, LESSONS[TASKS[cell.task].start])
    return {"cell": asdict(cell)} | result


def run_cells(
    folder: Path, cells: list[Cell], jobs: int, revision: str, say: Callable[[str], None]
) -> list[tuple[Cell, str]]:
    """Train the cells that have no result yet.

    Args:
        folder: of the study.
        cells: in the order in which they are trained.
        jobs: how many are trained at a time.
        revision: is written into the results.
        say: told about each finished cell.

    Returns:
        Cells that failed, each with the end of what it wrote to stderr.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        starts = dict.fromkeys((TASKS[cell.task].start, cell.seed) for cell in cells)
        missing = [key for key in starts if not (folder / "starts" / f"{key[0]}_{key[1]}").exists()]
        for done, (start, problem) in enumerate(pool.map(lambda key: (key, _start(folder, *key)), missing), 1):
            say(f"start {done} of {len(missing)}: {start[0]}, seed {start[1]}")
            if problem:
                raise RuntimeError(f"the start {start} could not be made: {problem}")
        todo = {cell.key(folder): cell for cell in cells if not result_path(folder, cell).exists()}
        begin = time.perf_counter()
        waiting: dict[Future[str], Cell] = {pool.submit(_train, folder, c, revision): c for c in todo.values()}
        total = len(waiting)
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                cell, problem = waiting.pop(future), future.result()
                count = total - len(waiting)
                left = (time.perf_counter() - begin) / count * len(waiting) / 60
                say(f"{count} of {total}, about {left:.0f} minutes left: {cell.name}{': FAILED' if problem else ''}")
                if problem:
                    failed.append((cell, problem))
    return failed


def _start(folder: Path, start: str, seed: int) -> str:
    return _process(folder, ["start", start, str(seed)])


def _train(folder: Path, cell: Cell, revision: str) -> str:
    return _process(folder, ["cell", cell.task, cell.arm, str(cell.seed), revision])


def _process(folder: Path, arguments: list[str]) -> str:
    """Do one thing in a process with one thread; returns the end of its stderr where it failed, else ''."""
    command = [sys.executable, "-m", "bench.study.runner", str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr or done.stdout)[-2000:] or f"exit code {done.returncode}"


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0])
    if arguments[1] == "start":
        prepare(folder, arguments[2], int(arguments[3]))
        return
    cell = Cell(arguments[2], arguments[3], int(arguments[4]))
    result = run_cell(folder, cell) | {"revision": arguments[5]}
    path = result_path(folder, cell)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.rename(path)


if __name__ == "__main__":
    main(sys.argv[1:])
