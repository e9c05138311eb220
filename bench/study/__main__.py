"""The study: where the training systems differ, with error bars.

    python -m bench.study                                  what fits into an hour, 3 seeds
    python -m bench.study --only exact,hard --seeds 5      some tasks
    python -m bench.study --only last-digit-16,hard-120    more of arithmetic
    python -m bench.study --only code                      programs: the runs of `repirl demo --task code`
    python -m bench.study --page                           the page alone, from the runs that are there

A study that was stopped goes on where it was. A run is made anew where its configuration has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bench.figures import machine
from bench.study import page
from bench.study.cells import ARMS, ONLY_NAMED, PLAN, Cell, planned
from bench.study.runner import result_path, run_cells
from repirl.report.html import write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"tasks, of {', '.join(PLAN)}, separated by commas")
    parser.add_argument("--arms", default="", help='arms, separated by semicolons, such as "SFT;RLOO"')
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each in one thread")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"), help="starts, runs and results")
    parser.add_argument("--output", type=Path, default=Path("runs/study/study.md"), help="the page; HTML beside it")
    parser.add_argument("--page", action="store_true", help="make the page without training")
    options = parser.parse_args(arguments)
    tasks = _chosen(parser, "--only", options.only, ",", list(PLAN)) or [
        task for task in PLAN if task not in ONLY_NAMED
    ]
    arms = _chosen(parser, "--arms", options.arms, ";", list(ARMS)) or list(ARMS)
    if options.seeds < 1 or options.jobs < 1:
        parser.error("--seeds and --jobs are at least 1")

    about = machine()
    cells = planned(tasks, arms, range(options.seeds))
    failed: list[tuple[Cell, str]] = []
    if not options.page:
        failed = run_cells(options.folder, cells, options.jobs, about["revision"], lambda text: print(text, flush=True))
    results = {}
    for cell in cells:
        path = result_path(options.folder, cell)
        if path.is_file():
            results[cell] = json.loads(path.read_text())
    if not results:
        print(f"no run of {options.folder} has a result: there is no page", file=sys.stderr)
        return 1
    about |= {"revision": ", ".join(sorted({result["revision"][:12] for result in results.values()}))}
    command = f"python -m bench.study --seeds {options.seeds}" + (f" --only {options.only}" if options.only else "")
    command += f' --arms "{options.arms}"' if options.arms else ""
    problems = [f"{cell.name}: {problem.strip().splitlines()[-1]}" for cell, problem in failed]
    missing = [f"{cell.name} has no result" for cell in cells if cell not in results]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page.markdown(results, problems + missing, about, command))
    write_report(options.output.with_suffix(".html"), page.report(results, about, command))
    print(f"the page is at {options.output}, and beside it as HTML")
    for cell, problem in failed:
        print(f"\n{cell.name} failed:\n{problem}", file=sys.stderr)
    return 1 if failed else 0


def _chosen(parser: argparse.ArgumentParser, name: str, text: str, separator: str, known: list[str]) -> list[str]:
    names = [part.strip() for part in text.split(separator) if part.strip()]
    for part in names:
        if part not in known:
            parser.error(f"{name} names {part!r}, expected some of {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
