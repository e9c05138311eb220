"""The page of ``bench.gpu_study``, from its results alone."""

from __future__ import annotations

from typing import Any

from bench.gpu_study_data import Sizes
from bench.study import page
from bench.study.cells import Cell

# Below this accuracy right responses are too rare to learn from, above the other one little is left to learn.
USEFUL_START = (0.2, 0.6)
ENDED = {
    "accuracy": "it ended because it was good enough",
    "time": "it ended because its time was over",
    "turns": "it made all its turns",
}


def markdown(results: dict[str, Any], titles: dict[str, str]) -> str:
    """The page as Markdown.

    Args:
        results: of study.json.
        titles: of the tasks.
    """
    start = results["steps"].get("start", {}).get("result")
    parts = ["# The study on a GPU: word problems with worked solutions"]
    machine = (start or {}).get("machine", {})
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
    parts.append(f"`{results['command']}`, started {results['started']}{f': {facts}' if facts else ''}.")
    parts.append(_start(results, start))
    cells = {
        Cell(task, arm, 0): run["compared"]
        for run in results["runs"].values()
        for task, arm in run["cells"]
        if run["compared"] is not None
    }
    if cells:
        parts.append("\n".join(f"* {note}" for note in _notes(results, start)))
        claims = page.claims(cells)
        if claims:
            parts += [
                "## What is claimed, and what was measured",
                page.markdown_table(["claim", "by", "measured difference", "verdict"], claims),
            ]
        for task, title in titles.items():
            columns, rows = _filled(*page.table(cells, task))
            if rows:
                parts += [f"## {title}", f"Task `{task}`. Start: {page.start_accuracy(cells, task)}%."]
                parts.append(page.markdown_table(columns, rows))
        parts += ["## All evaluations", page.markdown_table(*_curves(results["runs"]))]
    missing = _missing(results)
    if missing:
        parts += ["## Not in the tables", "\n".join(f"* {line}" for line in missing)]
    return "\n\n".join(parts) + "\n"


def _start(results: dict[str, Any], start: dict[str, Any] | None) -> str:
    if start is None:
        return "There is no start model yet, or it could not be made: see below."
    accuracy = "was never measured" if start["accuracy"] is None else f"was {100 * start['accuracy']:.1f}%"
    low, high = USEFUL_START
    warning = "" if start["accuracy"] is not None and low <= start["accuracy"] <= high else (
        f" **It is not known to lie between {low:.0%} and {high:.0%}, where arms can differ: do not rely on what is "
        "below.**"
    )  # fmt: skip
    return (
        f"The start: a model of Qwen3's architecture with {start['parameters'] / 1e6:.1f} million parameters and a "
        f"tokenizer of {start['vocabulary']} tokens, trained from scratch on worked solutions ({start['turns']} turns, "
        f"{start['solutions']} solutions, {start['seconds']:.0f} s; {ENDED[start['ended_by']]}). Its loss fell from "
        f"{start['loss'][0]:.2f} to {start['loss'][1]:.2f} nats a token. Its accuracy by sampling {accuracy}, on "
        f"{start['eval_prompts']} held-out problems.{warning} Scale `{results['scale']}`, {results['jobs']} arms at a "
        "time."
    )


def _notes(results: dict[str, Any], start: dict[str, Any] | None) -> list[str]:
    data = results["data"] or {}
    count = (start or {}).get("eval_prompts")
    error = "" if not count else (
        f" With one seed and {count} problems, an accuracy near 50% has a standard error of {50 / count**0.5:.1f} "
        "points: smaller differences tell nothing."
    )  # fmt: skip
    held = [
        f"{name} in {run['compared']['held']:.0f}"
        for name, run in results["runs"].items()
        if run["compared"] and run["compared"]["held"]
    ]
    waits = [f"Turns in which the policy waited, as its PRM told it nothing (irl.gate): {', '.join(held)}."]
    return [
        f"All arms begin with the same model and are compared after {results['compared_at_turn']} turns, the last "
        "evaluation that all reached in equal time; below are all evaluations.",
        "Accuracy is that of greedy decoding on held-out problems, judged by the exact verifier whatever the training "
        f"saw.{error}",
        f"Experts are {data.get('few', Sizes().few)} worked solutions. SFT, `PRM only` and `rePIRL, PRM apart` read "
        "them; of the verifier only RLOO and `rePIRL, PRM apart` learn, so the others are one and the same run on both "
        "tasks.",
        "Seconds are of training up to that turn, while the other arms ran beside it: compare them roughly.",
        *(waits if held else []),
    ]


def _filled(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without columns that say nothing here."""
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _curves(runs: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the accuracies of each run by turn, in percent."""
    curves = {name: dict(map(tuple, run["all"]["curve"])) for name, run in runs.items() if run["all"]}
    turns = sorted({turn for curve in curves.values() for turn in curve})
    rows = [
        [str(turn), *(f"{100 * curve[turn]:.1f}" if turn in curve else "-" for curve in curves.values())]
        for turn in turns
    ]
    return ["turn", *curves], rows


def _missing(results: dict[str, Any]) -> list[str]:
    """What failed or was not reached, with the reason."""
    lines = []
    names = ["start", *results["runs"]]
    for name in [*(name for name in results["steps"] if name not in names), *names]:
        step = results["steps"].get(name, {"status": "not run"})
        compared = results["runs"].get(name, {}).get("compared") is not None
        if compared or (name not in results["runs"] and step["status"] == "ok"):
            continue
        end = step.get("end_of_log", "").strip().splitlines()[-1:]
        reason = step.get("reason") or (end[0] if end and step["status"] == "failed" else "")
        done = (results["runs"].get(name, {}).get("all") or {}).get("turns")
        progress = f" after {done} turns" if done else ""
        lines.append(f"{name}: {step['status']}{progress}{f': {reason}' if reason else ''}")
    return lines
