"""`repirl eval --benchmark processbench|prmbench`: how well a trained PRM tells wrong steps."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from repirl import __version__
from repirl.apps.benchmarks import (
    PRMBenchRow,
    calibrate,
    calibrate_kept,
    prmbench_row,
    prmbench_scores,
    processbench_scores,
)
from repirl.apps.first_errors import check_threshold, choose_threshold, refuse_twice
from repirl.apps.lines import write_json
from repirl.apps.localize import first_error
from repirl.apps.output import ResumableOutput
from repirl.apps.score import Progress
from repirl.apps.solutions import EncodedSolution, Solution, as_source, check_split, chunks, encode, score_encoded
from repirl.apps.trained import Placed, trained_prm
from repirl.config import ConfigError
from repirl.dataconfig import SourceConfig
from repirl.evals.prmbench import CATEGORIES, CORRECT, read_prmbench
from repirl.evals.processbench import read_processbench
from repirl.evals.steps import Case
from repirl.output_path import check_folder, is_same
from repirl.prm import PRM

STEPS, RESULTS = "steps.jsonl", "results.json"
# Batches between two writes.
_BATCHES = 8
# The rows of each benchmark.
READERS: Mapping[str, Callable[[SourceConfig], list[Case]]] = {
    "processbench": read_processbench,
    "prmbench": read_prmbench,
}


@dataclass(frozen=True)
class StepOptions:
    """How step scores are made and judged.

    Args:
        threshold: steps that score below it (ProcessBench), or not above it (PRMBench), are wrong; None for one that is
            calibrated, or else 0.5 where step scores are probabilities.
        split: what is put between steps, as in repirl.apps.solutions.encode.
        placed: how the PRM is loaded, and how many tokens a batch may hold.
    """

    threshold: float | None = None
    split: str | None = None
    placed: Placed = field(default_factory=Placed)

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.threshold is not None and self.threshold != self.threshold:
            raise ConfigError("--threshold is nan, expected a number")


def eval_prm(
    benchmark: str,
    data: Sequence[str | os.PathLike],
    prm: str | os.PathLike,
    output: str | os.PathLike | None = None,
    options: StepOptions | None = None,
    *,
    calibration: str | os.PathLike | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Score the steps of a benchmark by a trained PRM, and judge which ones it takes for wrong.

    `output` gets steps.jsonl, a line for each solution, written batch by batch: `split`, `id`, `wrong` (the wrong steps
    from 0; of ProcessBench the first one), `classification` (PRMBench) and `step_scores`; and results.json, the
    dictionary that is returned. Figures are in percent, and null where there is no solution of a kind.

    Args:
        benchmark: "processbench", whose splits are a file each, or "prmbench".
        data: files, or data sets of the hub ("owner/name:split").
        prm: an exported PRM, or a run's folder or step_N folder.
        output: a folder; None for none.
        options: how.
        calibration: a file of the same format: the threshold is the one with the best F1 (ProcessBench) or PRM-Score
            (PRMBench) there.
        resume: go on with the folder; what is scored is kept.

    Raises:
        ConfigError: rows, a PRM or options that cannot be used, or an output that exists.
        RunError: the output cannot be written, or a reward is not finite.
    """
    options = options or StepOptions()
    if benchmark not in READERS:
        raise ConfigError(f"--benchmark is {benchmark!r}, expected one of {', '.join(READERS)}")
    if calibration is not None and options.threshold is not None:
        raise ConfigError(f"--threshold {options.threshold} and --calibrate {os.fspath(calibration)}: give one of them")
    splits = {name: READERS[benchmark](as_source(source)) for name, source in _names(data).items()}
    inputs, tuned_on = [os.fspath(source) for source in data], None if calibration is None else os.fspath(calibration)
    if output is not None:
        check_folder(output, (STEPS, RESULTS), [*inputs, *([tuned_on] if tuned_on else [])])
    # Scored with the others, once, where it is one of them.
    same = next((n for n, s in _names(data).items() if tuned_on is not None and is_same(s, tuned_on)), None)
    parts = dict(splits)
    if tuned_on is not None and same is None:
        parts["calibration"] = READERS[benchmark](as_source(tuned_on))
    with trained_prm(prm, options.placed) as (loaded, prints):
        check_threshold(loaded, options.threshold, calibrated=tuned_on is not None)
        scores = _scored(loaded, parts, options, {"benchmark": benchmark, **prints}, output, resume)
    known = None
    if tuned_on is not None:
        cases = parts[same or "calibration"]
        known = (scores[same or "calibration"], [_label(benchmark, case) for case in cases])
    best = calibrate if benchmark == "processbench" else calibrate_kept
    threshold, origin = choose_threshold(options.threshold, known, tuned_on or "", inputs, best)
    result: dict[str, Any] = {"benchmark": benchmark, "prm": os.fspath(prm), "version": __version__}
    result |= {"threshold": threshold, "threshold_is": origin}
    judge = _processbench if benchmark == "processbench" else _prmbench
    result |= judge(splits, {name: scores[name] for name in splits}, threshold, same)
    if output is not None:
        write_json(Path(output) / RESULTS, result)
    return result


def _names(data: Sequence[str | os.PathLike]) -> dict[str, str]:
    """Sources by the names of their splits: gsm8k for gsm8k.jsonl and Qwen/ProcessBench:gsm8k."""
    sources = [os.fspath(source) for source in data]
    refuse_twice("--data", sources)
    names = [Path(source.rpartition(":")[2]).name.partition(".")[0] for source in sources]
    if len(set(names)) < len(names) or "" in names or "calibration" in names:
        names = sources
    return dict(zip(names, sources, strict=True))


def _label(benchmark: str, case: Case) -> Any:
    if benchmark == "processbench":
        return case.wrong[0] if case.wrong else -1
    return case.wrong


def _scored(
    prm: PRM,
    splits: Mapping[str, list[Case]],
    options: StepOptions,
    made_with: dict[str, Any],
    output: str | os.PathLike | None,
    resume: bool,
) -> dict[str, list[list[float]]]:
    """Step scores of each split's solutions, kept in the output if there is one."""
    cases = [(name, case) for name, part in splits.items() for case in part]
    tokens = [encode(Solution(case.place, {}, case.problem, case.steps, True), prm, options.split) for _, case in cases]
    scores: list[list[float]] = []
    if output is None:
        for part in _batches(prm, tokens, options.placed.tokens, 0):
            scores += part
    else:
        digest = hashlib.blake2b(digest_size=8)
        for name, case in cases:
            digest.update(json.dumps([name, case.id, case.problem, case.steps, case.wrong]).encode())
        placed = options.placed
        made_with |= {"split": options.split, "tokens": placed.tokens, "dtype": placed.dtype}
        made_with |= {"convention": placed.convention, "data": f"{len(cases)} solutions, digest {digest.hexdigest()}"}
        with ResumableOutput(Path(output) / STEPS, "repirl eval", resume=resume) as file:
            file.begin(made_with, len(cases))
            if file.num_rows:
                with open(Path(output) / STEPS, encoding="utf-8") as lines:
                    scores = [json.loads(line)["step_scores"] for line in lines]
            for part in _batches(prm, tokens, options.placed.tokens, file.num_rows):
                rows = zip(cases[len(scores) :], part, strict=False)
                file.write([_line(name, case, steps) for (name, case), steps in rows], {})
                scores += part
    result, place = {}, 0
    for name, part_cases in splits.items():
        result[name] = scores[place : place + len(part_cases)]
        place += len(part_cases)
    return result


def _line(name: str, case: Case, steps: Sequence[float]) -> str:
    row: dict[str, Any] = {"split": name, "id": case.id, "wrong": case.wrong}
    if case.classification is not None:
        row["classification"] = case.classification
    return json.dumps(row | {"step_scores": list(steps)}, ensure_ascii=False)


def _batches(prm: PRM, tokens: Sequence[EncodedSolution], budget: int, done: int) -> Iterator[list[list[float]]]:
    """Step scores part by part, always of the same parts: a reward depends, by rounding, on what is scored with it."""
    lengths = [len(one) for one in tokens]
    if done == len(tokens):
        return
    with Progress("eval", sum(lengths), sum(lengths[:done])) as progress:
        for start, end in chunks(lengths, _BATCHES * budget):
            if end <= done:
                continue
            scores: list[list[float]] = [[]] * (end - start)
            for i, one in score_encoded(prm, tokens[start:end], budget):
                scores[i] = one.steps.tolist()
                progress.add(lengths[start + i])
            yield scores


def _processbench(
    splits: Mapping[str, list[Case]],
    scores: Mapping[str, list[list[float]]],
    threshold: float,
    calibrated_on: str | None,
) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for name, cases in splits.items():
        predicted = [first_error(steps, threshold) for steps in scores[name]]
        labels = [_label("processbench", case) for case in cases]
        s = processbench_scores([-1 if p is None else p for p in predicted], labels)
        figures[name] = {
            "error_acc": s.error_acc,
            "correct_acc": s.correct_acc,
            "f1": s.f1,
            "num_errors": s.num_errors,
            "num_correct": s.num_correct,
        }
    others = [name for name in splits if name != calibrated_on]
    result: dict[str, Any] = {"splits": figures, "mean_f1": _mean([part["f1"] for part in figures.values()])}
    if calibrated_on is not None:
        result["calibrated_on"] = calibrated_on
        result["mean_f1_of_others"] = _mean([figures[name]["f1"] for name in others])
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    """None where any value is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _prmbench(
    splits: Mapping[str, list[Case]],
    scores: Mapping[str, list[list[float]]],
    threshold: float,
    _: str | None,
) -> dict[str, Any]:
    kinds: dict[str, list[PRMBenchRow]] = {}
    for name, cases in splits.items():
        for case, steps in zip(cases, scores[name], strict=True):
            row = prmbench_row([score > threshold for score in steps], [step + 1 for step in case.wrong])
            kinds.setdefault(case.classification or "", []).append(row)
    figures = {kind: _prmbench_figures(kinds[kind]) for kind in _in_order(kinds)}
    overall = [row for kind, rows in kinds.items() if kind != CORRECT for row in rows]
    categories = {
        name: _mean([figures[kind]["prm_score"] for kind in members if kind in figures])
        for name, members in CATEGORIES.items()
        if any(kind in figures for kind in members)
    }
    return {"overall": _prmbench_figures(overall), "classifications": figures, "categories": categories}


def _in_order(kinds: Mapping[str, Any]) -> list[str]:
    """PRMBench's classifications in its order, then others, the correct samples last."""
    order = [kind for members in CATEGORIES.values() for kind in members]
    return sorted(kinds, key=lambda kind: (kind == CORRECT, order.index(kind) if kind in order else len(order), kind))


def _prmbench_figures(rows: Sequence[PRMBenchRow]) -> dict[str, Any]:
    """In percent; see repirl.evals.prmbench."""
    if not rows:
        return {"samples": 0} | dict.fromkeys(("prm_score", "f1", "negative_f1", "first_error_acc", "total_step_acc"))
    total = prmbench_scores(rows)
    first = [row.first_error_acc for row in rows if row.first_error_acc is not None]
    counts = {name: sum(row.f1_matrix[name] for row in rows) for name in ("TP", "FP", "TN", "FN")}
    has_wrong = counts["FP"] + counts["TN"] > 0
    return {
        "samples": len(rows),
        "prm_score": 100 * (total.prm_score if has_wrong else total.f1),
        "f1": 100 * total.f1,
        "negative_f1": 100 * total.negative_f1 if has_wrong else None,
        "first_error_acc": 100 * fmean(first) if first else None,
        "total_step_acc": 100 * (counts["TP"] + counts["TN"]) / sum(counts.values()),
        "steps": counts,
    }


def print_result(result: dict[str, Any]) -> None:
    """A table of the figures, and the threshold with where it is from."""
    from repirl.report.display import print_table

    if result["benchmark"] == "processbench":
        rows = [
            [name, s["num_errors"], s["num_correct"], *(_percent(s[key]) for key in ("error_acc", "correct_acc", "f1"))]
            for name, s in result["splits"].items()
        ]
        rows.append(["mean", "", "", "", "", _percent(result["mean_f1"])])
        if "calibrated_on" in result:
            rows.append([f"without {result['calibrated_on']}", "", "", "", "", _percent(result["mean_f1_of_others"])])
        print_table(
            "processbench, in percent", ["", "erroneous", "correct", "acc erroneous", "acc correct", "F1"], rows
        )
    else:
        names = ("prm_score", "f1", "negative_f1", "first_error_acc")
        parts = {**result["classifications"], "overall": result["overall"]}
        rows = [[name, part["samples"], *(_percent(part[key]) for key in names)] for name, part in parts.items()]
        print_table("prmbench, in percent", ["", "samples", "PRM-Score", "F1", "negative F1", "first error acc"], rows)
        for name, value in result["categories"].items():
            print(f"{name}: PRM-Score {_percent(value)}, the mean of its classifications")
    print(f"threshold {result['threshold']:.6g} ({result['threshold_is']})")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
