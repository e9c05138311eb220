"""Which wrong steps a `value` PRM sees that learned alone: those that its policy makes, or any.

    python -m bench.errors_seen                          12 and 40 turns, 3 seeds
    python -m bench.errors_seen --turns 12 --seeds 5

The start model of `repirl demo` loses a ten at steps that carry or borrow. The PRM learns from expert solutions and
this policy's responses (the arm `value` of bench.prm_alone), and is then judged on solutions that neither has seen,
with three kinds of first wrong steps: lost tens, and results that are off by 1 or 2, or by 10 (`planted_error`).
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.figures import machine, spread
from bench.prm_alone import arm_config
from bench.study.runner import prepare
from repirl.apps.demo import STEP_SEPARATOR, score_solutions
from repirl.apps.localize import auroc
from repirl.data.tasks.arithmetic import Solution, expert_solution, planted_error, problems, run, sloppy_solution
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.prm import PRM, load_prm

NUM_PROBLEMS = 400
# Fewest and most steps of a problem, as in the start.
NUM_STEPS = (4, 5)
KINDS = ("lost tens", "off by 1 or 2", "off by 10")


def wrong_solutions(seed: int, count: int = NUM_PROBLEMS) -> dict[str, list[Solution]]:
    """Solutions with a wrong step, by its kind, and right ones of the same problems as "right"."""
    rng = random.Random(seed)
    # Problems of another seed than the start's: nearly all are new.
    chosen = list(islice(problems(seed + 1000, NUM_STEPS), count))
    planted = [planted_error(problem, rng) for problem in chosen]
    slips = (sloppy_solution(problem, rng, slip=1.0) for problem in chosen)
    return {
        "right": [expert_solution(problem) for problem in chosen],
        "lost tens": [solution for solution in slips if solution.error_step is not None],
        "off by 1 or 2": [solution for solution in planted if _shift(solution) < 10],
        "off by 10": [solution for solution in planted if _shift(solution) == 10],
    }


def _shift(solution: Solution) -> int:
    """By how much the result of the first wrong step is off."""
    step = solution.error_step
    assert step is not None
    written = int(solution.lines[step].partition("=")[2].rstrip("; "))
    return abs(written - run(solution.problem.start, solution.problem.steps)[step])


def judge(prm: PRM, solutions: dict[str, list[Solution]]) -> dict[str, float]:
    """For each kind the AUROC of first wrong steps against all steps of right solutions."""
    right = [score for scores, _ in score_solutions(prm, solutions["right"]) for score in scores]
    result = {}
    for kind in KINDS:
        scored = zip(score_solutions(prm, solutions[kind]), solutions[kind], strict=True)
        result[kind] = auroc([scores[s.error_step] for (scores, _), s in scored if s.error_step is not None], right)
    return result


def run_cell(folder: Path, seed: int, turns: int) -> dict[str, Any]:
    """Train for some turns, and judge the PRM."""
    prepare(folder, "plain", seed)
    output_dir = folder / "runs" / f"errors-{turns}-{seed}"
    changes = {"steps": turns, "output_dir": str(output_dir)}
    config = arm_config(folder, "value", seed)
    config = config.model_copy(update=changes | {"checkpoint": config.checkpoint.model_copy(update={"every": turns})})
    train(config)
    export_checkpoint(output_dir, output_dir / "export", step_separator=STEP_SEPARATOR)
    prm = load_prm(output_dir / "export" / "prm", device="cpu")
    return {"seed": seed, "turns": turns, "auroc": judge(prm, wrong_solutions(seed))}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row for each number of turns."""
    lines = [f"| turns | seeds | {' | '.join(KINDS)} |", "|---|---|---|---|---|"]
    for turns in sorted({result["turns"] for result in results}):
        mine = [result for result in results if result["turns"] == turns]
        cells = [spread([result["auroc"][kind] for result in mine], 1, 3) for kind in KINDS]
        lines.append(f"| {turns} | {', '.join(str(result['seed']) for result in mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[12, 40])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--folder", type=Path, default=Path("runs/errors_seen"), help="starts and runs")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/errors_seen.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    results = [run_cell(options.folder, seed, turns) for seed in range(options.seeds) for turns in options.turns]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": about, "runs": results}, indent=1) + "\n")
    text = ", ".join(f"{key} {value}" for key, value in about.items())
    options.output.with_suffix(".md").write_text(
        "# Which wrong steps a `value` PRM sees that learned alone\n\n"
        f"`python -m bench.errors_seen`: {text}; one thread a run.\n\n"
        "AUROC of first wrong steps against the steps of right solutions, mean ± standard error over seeds; 0.5 is "
        f"chance. Steps of unseen problems, {NUM_PROBLEMS} a seed.\n\n{table(results)}\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
