"""The study on a GPU: four arms on word problems, with an exact verifier and with one that can be fooled.

    python -m bench.gpu_study data --to FOLDER                                 beforehand: see bench/gpu_study_data.py
    python -m bench.gpu_study run --data FOLDER --out OUT [--wheels WHEELS]    at most 460 s
    python -m bench.gpu_study run --data FOLDER --out OUT --device cpu         the same in small, to try the script

It needs no network to run. A tokenizer and a model are trained from scratch on worked solutions, until the model solves
some of the held-out problems; then the arms are trained from that model, side by side on a GPU. All get equal time, and
are compared at the last evaluation that all reached. Each is a process with a time limit: one that fails or hangs does
not affect the others. ``OUT`` gets ``study.json``, ``study.md`` and ``logs.tar.gz``, each complete at any moment.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import gpu, gpu_study_data
from bench.gpu import RESULT, Step

# Of bench/study: arms, and the tasks with their titles here.
ARMS = ("RLOO", "rePIRL, PRM apart", "PRM only", "SFT")
TASKS = {
    "exact": "An exact verifier",
    "last-digit": "A verifier that reads only the last digit",
}
# The other arms learn from experts alone, so that both tasks are the same run.
READ_VERDICTS = ("RLOO", "rePIRL, PRM apart")
START = "start"
# Shares of the time: that the start gets, and what it may take beyond that to end its turn and to write the model.
START_SHARE, START_GRACE = 0.36, 0.24
# The share of its time in which an arm begins no turn.
ARM_GRACE = 0.12
# Seconds that are left for the page at the end.
PAGE_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["data"]:
        return gpu_study_data.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    options.scale = options.scale or {"cuda": "full", "cpu": "small"}[options.device]
    options.jobs = options.jobs or {"cuda": 6, "cpu": 1}[options.device]
    names = {"--arms": (options.arms, ";", ARMS), "--tasks": (options.tasks, ",", TASKS)}
    chosen = {name: _chosen(parser, name, *rest) for name, rest in names.items()}
    missing = [file for file in gpu_study_data.FILES if not gpu_study_data.path_of(options.data, file).is_file()]
    if missing:
        path = gpu_study_data.path_of(options.data, missing[0])
        parser.error(f"--data: there is no {path}; make it with python -m bench.gpu_study data --to FOLDER")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("gpu_study.py: ended by a signal"))
    with tempfile.TemporaryDirectory() as work:
        study = Study(options, Path(work), arguments, chosen["--arms"], chosen["--tasks"])
        try:
            study.run_all()
        finally:
            study.close()
    return study.exit_code()


def runs_of(arms: Sequence[str], tasks: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """The training runs by name, each with the cells (task, arm) that it is the result of."""
    runs: dict[str, list[tuple[str, str]]] = {}
    for arm in arms:
        for task in tasks:
            name = f"{arm} ({task})" if arm in READ_VERDICTS else arm
            runs.setdefault(name, []).append((task, arm))
    return runs


class Study(gpu.Runner):
    """Runs the start, then the arms in waves of `options.jobs`, and keeps the files in `options.out` up to date."""

    script, file = "-m bench.gpu_study", "study.json"

    def __init__(
        self,
        options: argparse.Namespace,
        work: Path,
        arguments: Sequence[str],
        arms: Sequence[str] = ARMS,
        tasks: Sequence[str] = tuple(TASKS),
    ) -> None:
        super().__init__(options, work, arguments)
        self.tasks = tasks
        self.runs = runs_of(arms, tasks)
        about = options.data / "data.json"
        self.results |= {
            "scale": options.scale,
            "jobs": options.jobs,
            "data": json.loads(about.read_text()) if about.is_file() else None,
        }

    def run_all(self) -> None:
        self.run([step for step in gpu.installs(self.options.wheels) if step.name == "install wheels"])
        # For the page, which this process makes.
        sys.path.insert(0, os.fspath(self.work / "installed"))
        self.run([self.start_step()])
        if self.results["steps"][START]["status"] != "ok":
            for name in self.runs:
                self._finish(name, {"status": "skipped", "reason": "there is no start model"})
            return
        names = list(self.runs)
        waves = math.ceil(len(names) / self.options.jobs)
        for wave in range(waves):
            seconds = max(0.0, (self._time_left() - PAGE_SECONDS) / (waves - wave))
            some = names[wave * self.options.jobs : (wave + 1) * self.options.jobs]
            self.run([self.arm_step(name, seconds) for name in some])

    def start_step(self) -> Step:
        soft, hard = (share * self.options.seconds for share in (START_SHARE, START_SHARE + START_GRACE))
        return Step(START, self._words("start", START, soft), hard)

    def arm_step(self, name: str, seconds: float) -> Step:
        task, arm = self.runs[name][0]
        words = self._words("arm", name, (1 - ARM_GRACE) * seconds)
        return Step(name, (*words, "--arm", arm, "--task", task), seconds)

    def _words(self, step: str, name: str, seconds: float) -> tuple[str, ...]:
        places = {
            "--data": self.options.data.resolve(),
            "--start": self.work / "model",
            "--run": self.folder(name),
            "--until": round(time.time() + seconds, 1),
            "--device": self.options.device,
            "--scale": self.options.scale,
        }
        words = [str(word) for pair in places.items() for word in pair]
        return ("-m", "bench.gpu_study_steps", step, *words, "--result", RESULT)

    def folder(self, name: str) -> Path:
        """Of a training."""
        return self.work / gpu.key_of(name)

    def _environment(self) -> dict[str, str]:
        environment = super()._environment()
        # Arms run beside each other: their threads would get into each other's way.
        environment |= {"OMP_NUM_THREADS": "1" if self.options.device == "cpu" else "2"}
        return {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of a training's metrics.jsonl up to now."""
        return read_lines(self.folder(name) / "metrics.jsonl")

    def write(self) -> None:
        """Write the three files with the results so far."""
        self._written = time.monotonic()
        lines = {name: self.metrics(name) for name in self.runs}
        results = self.so_far()
        failed = [name for name in lines if results["steps"].get(name, {}).get("status") == "failed"]
        turn = common_turn({name: those for name, those in lines.items() if name not in failed})
        results["compared_at_turn"] = turn
        results["runs"] = self.results["runs"] = {
            name: {
                "cells": cells,
                "all": figures(lines[name]),
                # What the page compares.
                "compared": None if name in failed or turn is None else figures(lines[name], turn),
            }
            for name, cells in self.runs.items()
        }
        content = (json.dumps(results, indent=1) + "\n").encode()
        gpu.replace_file(self.options.out / self.file, content)
        self.write_logs()
        try:
            from bench import gpu_study_page

            text = gpu_study_page.markdown(results, {task: TASKS[task] for task in self.tasks})
        except Exception as error:  # a package that is missing, say: the results are worth more than the page
            text = f"# The study on a GPU\n\nThe page could not be made: {error!r}. See study.json.\n"
        gpu.replace_file(self.options.out / "study.md", text.encode())

    def write_logs(self) -> None:
        """Write `logs.tar.gz`: what each process printed, and each training's metrics."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=3) as tar:
            for log in sorted(self.work.glob("*.log")):
                tar.add(log, arcname=log.name)
            for path in sorted(self.work.glob("*/metrics.jsonl")):
                tar.add(path, arcname=f"{path.parent.name}.jsonl")
        gpu.replace_file(self.options.out / "logs.tar.gz", archive.getvalue())

    def exit_code(self) -> int:
        """0 if there is a start, and each arm is compared."""
        return int(any(run["compared"] is None for run in self.results["runs"].values()))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that is still being written; nothing if there is no file."""
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line]


def common_turn(lines: dict[str, list[dict[str, Any]]]) -> int | None:
    """The last turn that all runs evaluated, of those that evaluated any after the start; None if none did."""
    turns = [
        {line["step"] for line in those if line["step"] > 0 and "eval/accuracy" in line} for those in lines.values()
    ]
    common = set.intersection(*some) if (some := [each for each in turns if each]) else set()
    return max(common, default=None)


def figures(lines: list[dict[str, Any]], turn: int | None = None) -> dict[str, Any] | None:
    """What bench/study/page.py shows of a run, up to a turn; None if it did not get there."""
    lines = [line for line in lines if turn is None or line["step"] <= turn]
    if not lines or (turn is not None and lines[-1]["step"] < turn):
        return None
    return {
        "curve": [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line],
        "turns": lines[-1]["step"],
        "tokens": sum(line.get("tokens", 0) for line in lines),
        "sampled_tokens": sum(line.get("tokens/response", 0) for line in lines),
        "seconds": sum(line.get("seconds/step", 0.0) for line in lines),
        "held": sum(line.get("policy/held", 0) for line in lines),
    }


def _chosen(
    parser: argparse.ArgumentParser, name: str, text: str, separator: str, known: Sequence[str] | dict[str, str]
) -> list[str]:
    names = [part.strip() for part in text.split(separator) if part.strip()] or list(known)
    for part in names:
        if part not in known:
            parser.error(f"{name} names {part!r}, expected some of {f'{separator} '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run"], help="`data --to FOLDER` makes the data")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="what `data --to FOLDER` made")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="where results and logs go")
    parser.add_argument("--seconds", type=float, default=460.0, help="for everything; default 460")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--scale", choices=["full", "small", "tiny"], help="default: full on a GPU, small on a CPU")
    parser.add_argument("--jobs", type=int, help="arms at a time; default 6 on a GPU, 1 on a CPU")
    parser.add_argument("--arms", default="", help=f'some of "{"; ".join(ARMS)}", separated by semicolons')
    parser.add_argument("--tasks", default="", help=f"some of {', '.join(TASKS)}, separated by commas")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="what `bench/gpu.py wheels --to DIR` gathered")
    return parser


if __name__ == "__main__":
    sys.exit(main())
