"""Which wrong steps a `value` PRM sees that learned alone: those that its policy makes, or any.

    python -m bench.errors_seen                          the start, and PRMs after 12 and 40 turns, 3 seeds
    python -m bench.errors_seen --turns 12 --seeds 5
    python -m bench.errors_seen --seeds 0                the page, from the results that are there

The start model of `repirl demo` loses a ten at steps that carry or borrow. The PRM learns from expert solutions and
this policy's responses (the arm `value` of bench.prm_alone), and is then judged on solutions that neither has seen,
with three kinds of first wrong steps: lost tens, and results that are off by 1 or 2, or by 10 (`planted_error`). Linear
probes (bench.error_probe) say what a head could read off each layer. What is in the output is not computed again, and
the sentences below the tables are kept there (`notes`).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.error_probe import probe
from bench.figures import described, machine, save, spread
from bench.prm_alone import arm_config
from bench.study.runner import prepare
from repirl.apps.demo import STEP_SEPARATOR, score_solutions
from repirl.apps.localize import auroc
from repirl.data.tasks.arithmetic import Solution, expert_solution, planted_error, problems, run, sloppy_solution
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.prm import PRM, PRMDescription, load_prm

NUM_PROBLEMS = 400
# Fewest and most steps of a problem, as in the start.
NUM_STEPS = (4, 5)
KINDS = ("lost tens", "off by 1 or 2", "off by 10")
# What probes are told: only the errors that the policy makes, or all.
TAUGHT = {"lost tens": ["lost tens"], "all kinds": [*KINDS]}


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
    """Train for some turns, and judge the PRM and its states; for 0 turns the start, by its log-probabilities."""
    prepare(folder, "plain", seed)
    config = arm_config(folder, "value", seed)
    model, description = Path(config.policy.model), None
    if turns:
        output_dir = folder / "runs" / f"errors-{turns}-{seed}"
        changes = {"steps": turns, "output_dir": str(output_dir)}
        checkpoint = config.checkpoint.model_copy(update={"every": turns})
        shutil.rmtree(output_dir, ignore_errors=True)
        train(config.model_copy(update=changes | {"checkpoint": checkpoint}))
        export_checkpoint(output_dir, output_dir / "export", step_separator=STEP_SEPARATOR)
        model = output_dir / "export" / "prm"
    else:
        description = PRMDescription(reward="logprob")
    solutions = wrong_solutions(seed)
    judged = judge(load_prm(model, device="cpu", description=description), solutions)
    probes = probe(model, {kind: solutions[kind] for kind in KINDS}, TAUGHT)
    return {"seed": seed, "turns": turns, "auroc": judged, "probe": probes}


def label(turns: int) -> str:
    """What is judged."""
    return f"PRM after {turns} turns" if turns else "start"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row for each number of turns."""
    lines = [f"| reward | seeds | {' | '.join(KINDS)} |", "|---|---|---|---|---|"]
    for turns in sorted({result["turns"] for result in results}):
        mine = [result for result in results if result["turns"] == turns]
        cells = [spread([result["auroc"][kind] for result in mine], 1, 3) for kind in KINDS]
        name = f"`value`, {label(turns)}" if turns else "`logprob`, start"
        lines.append(f"| {name} | {', '.join(str(result['seed']) for result in mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def probe_table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row for each model, reading and set of errors that probes were told."""
    lines = [f"| states of | seeds | probe reads | is told of | {' | '.join(KINDS)} |", "|---|---|---|---|---|---|---|"]
    probed = [result for result in results if "probe" in result]
    for turns in sorted({result["turns"] for result in probed}):
        mine = [result for result in probed if result["turns"] == turns]
        seeds = ", ".join(str(result["seed"]) for result in mine)
        for reading in mine[0]["probe"]:
            for name in TAUGHT:
                cells = [spread([result["probe"][reading][name][kind] for result in mine], 1, 3) for kind in KINDS]
                lines.append(f"| {label(turns)} | {seeds} | {reading} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(content: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    parts = [
        "# Which wrong steps a `value` PRM sees that learned alone",
        f"`{content['command']}`: {described(content['machine'])}; one thread a run.",
        "AUROC of first wrong steps against the steps of right solutions, mean ± standard error over seeds; 0.5 is "
        f"chance. Steps of unseen problems, {NUM_PROBLEMS} a seed.",
        table(content["runs"]),
        "What linear probes see that are told which tokens are wrong: AUROC of first wrong tokens against the right "
        "ones in their places, on other problems than those that a probe was fitted on.",
        probe_table(content["runs"]),
        *content["notes"],
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[0, 12, 40])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--folder", type=Path, default=Path("runs/errors_seen"), help="starts and runs")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/errors_seen.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = {
        "command": "python -m bench.errors_seen",
        "machine": machine(),
        "notes": [],
        "runs": [],
    }
    if options.output.exists():
        content |= json.loads(options.output.read_text())
    known = {(result["turns"], result["seed"]) for result in content["runs"]}
    for seed in range(options.seeds):
        for turns in options.turns:
            if (turns, seed) not in known:
                content["machine"] = machine()
                content["runs"].append(run_cell(options.folder, seed, turns))
                save(options.output, content, page(content))
    save(options.output, content, page(content))
    print(table(content["runs"]))


if __name__ == "__main__":
    main()
