"""The study's page, in Markdown and in HTML, from the results of its cells alone."""

from __future__ import annotations

from statistics import mean
from typing import Any

from bench.figures import described, spread
from bench.study.cells import PLAN, TASKS, Cell
from bench.study.claims import CLAIMS, verdict
from repirl.report.html import Curve, Report, Series
from repirl.verify.code import KINDS

PROGRAMS = (
    "Programs are run on six tests each, in a sandbox, two programs at a time. What is wrong with those that do not "
    "pass is counted for the held-out problems at the end. How many are judged a second depends on what else the "
    "machine does: `python -m bench.sandbox` measures that."
)

# By task, arm and seed.
Results = dict[Cell, dict[str, Any]]

NOTES = [
    "Accuracy is the share of 200 held-out problems that the policy answers right by greedy decoding, judged by the "
    "exact verifier whatever the training saw. Means over seeds with their standard errors; a seed changes data, start "
    "model, sampling and order.",
    "`best` is the highest accuracy of the evaluations, every 5 turns, the start included; what it is above "
    "`end` was lost again. `minus SFT` and `minus RLOO` are paired by seed.",
    "`planted errors` is the AUROC by which the trained PRM tells steps with a planted error from right ones "
    "(0.5 is chance). Tokens are those that were trained on or scored, and in brackets those that were sampled.",
    "Runs on tasks that do not change their configuration are one and the same run: SFT does not ask the verifier, "
    "RLOO does not read experts.",
    "Seconds are of one process with one thread while others ran beside it: compare them roughly.",
]


def end(result: dict[str, Any]) -> float:
    return float(result["curve"][-1][1])


def best(result: dict[str, Any]) -> float:
    return float(max(accuracy for _, accuracy in result["curve"]))


def differences(results: Results, task: str, better: str, worse: str) -> list[float]:
    """Paired by seed: end accuracies of one arm minus those of another."""
    seeds = sorted({cell.seed for cell in results if cell.task == task})
    pairs = [(results.get(Cell(task, better, seed)), results.get(Cell(task, worse, seed))) for seed in seeds]
    return [end(first) - end(second) for first, second in pairs if first is not None and second is not None]


def table(results: Results, task: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a task's table."""
    columns = [
        "arm", "end, %", "best, %", "minus SFT", "minus RLOO", "planted errors", "1000 tokens (sampled)", "seconds",
        "seeds",
    ]  # fmt: skip
    rows = []
    for arm in PLAN[task]:
        runs = [result for cell, result in results.items() if cell.task == task and cell.arm == arm]
        if not runs:
            continue
        tokens, sampled = mean(r["tokens"] for r in runs), mean(r["sampled_tokens"] for r in runs)
        planted = [r["planted"]["auroc"] for r in runs if "planted" in r]
        rows.append(
            [
                arm,
                spread([end(r) for r in runs]),
                spread([best(r) for r in runs]),
                *(spread(differences(results, task, arm, other)) if arm != other else "-" for other in ("SFT", "RLOO")),
                spread(planted, 1, 2),
                f"{tokens / 1000:.0f} ({sampled / 1000:.0f})",
                f"{mean(r['seconds'] for r in runs):.0f}",
                str(len(runs)),
            ]
        )
    return columns, rows


def programs(results: Results, task: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what is wrong with the programs at the end, where a task has any."""
    judged = {
        arm: [
            result["programs"]
            for cell, result in results.items()
            if (cell.task, cell.arm) == (task, arm) and "programs" in result
        ]
        for arm in PLAN[task]
    }
    kinds = [kind for kind in KINDS if any(kind in run["wrong"] for runs in judged.values() for run in runs)]
    rows = [
        [
            arm,
            *(spread([run["wrong"].get(kind, 0) / run["responses"] for run in runs]) for kind in kinds),
            spread([run["judged_per_second"] for run in runs], 1, 0),
        ]
        for arm, runs in judged.items()
        if runs
    ]
    return ["arm", *(f"{KINDS[kind]}, %" for kind in kinds), "programs judged a second"], rows


def start_accuracy(results: Results, task: str) -> str:
    by_seed = {cell.seed: float(result["curve"][0][1]) for cell, result in results.items() if cell.task == task}
    return spread([by_seed[seed] for seed in sorted(by_seed)])


def claims(results: Results) -> list[list[str]]:
    """Rows: what is claimed, by whom, the measured difference, and the verdict."""
    rows = []
    for claim in CLAIMS:
        measured = differences(results, claim.task, claim.better, claim.worse)
        if measured:
            says = f"{claim.text} ({claim.task})"
            rows.append([says, claim.source, f"{spread(measured)} points", verdict(measured)])
    return rows


def curves(results: Results) -> list[Curve]:
    """Mean accuracy of each arm by turn, a chart for each task."""
    charts: list[Curve] = []
    for task, arms in PLAN.items():
        series: list[Series] = []
        for arm in arms:
            runs = [result["curve"] for cell, result in results.items() if cell.task == task and cell.arm == arm]
            if runs:
                xs = [float(step) for step, _ in runs[0]]
                ys: list[float | None] = [mean(run[i][1] for run in runs) for i in range(len(xs))]
                series.append({"name": arm, "x": xs, "y": ys})
        if series:
            charts.append(
                {
                    "title": TASKS[task].title,
                    "xlabel": "turn",
                    "ylabel": "held-out accuracy, mean over seeds",
                    "series": series,
                    "percent": True,
                }
            )
    return charts


def markdown(results: Results, failed: list[str], about: dict[str, Any], command: str) -> str:
    """The page as Markdown."""
    tasks = [task for task in PLAN if any(cell.task == task for cell in results)]
    parts = [
        f"# The study: {TASKS[tasks[0]].title.lower() if len(tasks) == 1 else 'where the training systems differ'}",
        f"`{command}`: {described(about)}.",
        "\n".join(f"* {note}" for note in NOTES),
        "## What agrees with the paper, and what does not",
        "A claim agrees or disagrees where the paired difference is more than twice its standard error.",
        markdown_table(["claim", "by", "measured difference", "verdict"], claims(results)),
    ]
    for task in tasks:
        parts += [f"## {TASKS[task].title}", f"Task `{task}`. Start: {start_accuracy(results, task)}%."]
        parts += [markdown_table(*table(results, task))]
        columns, rows = programs(results, task)
        if rows:
            parts += [PROGRAMS, markdown_table(columns, rows)]
    if failed:
        parts += ["## Failed", "\n".join(f"* {line}" for line in failed)]
    return "\n\n".join(parts) + "\n"


def report(results: Results, about: dict[str, Any], command: str) -> Report:
    """The page for `repirl.report.html.write_report`: one table of all tasks, and the learning curves."""
    columns: list[str] = []
    rows: list[list[str]] = []
    for task in PLAN:
        columns, some = table(results, task)
        rows += [[f"{task}: {row[0]}", *row[1:]] for row in some]
    verdicts = [f"{text}. Said by {source}. Measured: {gap}: {says}." for text, source, gap, says in claims(results)]
    return {
        "title": "The study",
        "subtitle": "Where the training systems differ, on generated tasks with a bad habit to unlearn",
        "configuration": "",
        "environment": {"command": command} | {key: str(value) for key, value in about.items()},
        "table": {"columns": columns, "rows": rows},
        "notes": [*verdicts, *NOTES],
        "curves": curves(results),
        "samples": [],
    }


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
