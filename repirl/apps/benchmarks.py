"""Metrics of public benchmarks of process reward models: ProcessBench and PRMBench.

Sources: ProcessBench (Zheng et al. 2025, arXiv 2412.06559), PRMBench (Song et al. 2025, arXiv 2501.03124), and their
evaluation scripts. Where those divide by zero, there is None (no row of that kind) or 0 (F1 of two zeros) here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessBenchScores:
    """In percent; None where there is no row of that kind.

    Args:
        error_acc: of the solutions with an error, those whose first wrong step is predicted.
        correct_acc: of the solutions without one, those that are predicted to have none.
        f1: harmonic mean of both.
        num_errors: solutions with an error.
        num_correct: solutions without one.
    """

    error_acc: float | None
    correct_acc: float | None
    f1: float | None
    num_errors: int
    num_correct: int


def processbench_scores(predictions: Sequence[int | None], labels: Sequence[int]) -> ProcessBenchScores:
    """ProcessBench's accuracies and F1.

    Args:
        predictions: of each solution the first wrong step, from 0; -1 for none. None, no prediction, is wrong.
        labels: the same, as it is.
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for prediction, label in zip(predictions, labels, strict=True):
        hits[label != -1].append(prediction == label)
    errors, correct = (100 * sum(h) / len(h) if h else None for h in (hits[True], hits[False]))
    f1 = None if errors is None or correct is None else _harmonic(errors, correct)
    return ProcessBenchScores(errors, correct, f1, len(hits[True]), len(hits[False]))


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0


def calibrate(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold with the best ProcessBench F1, over all thresholds there are.

    A step that scores below the threshold is predicted to be wrong. So a solution with label e is predicted right by
    the thresholds in (score of e, least score before e], one without error by those up to its least score: as the
    threshold grows past the ends of these intervals, the hits change, and are counted.

    Args:
        scores: of the steps of each solution.
        labels: of each solution the first wrong step, from 0; -1 for none.

    Returns:
        The middle of the first interval of thresholds with the best F1.

    Raises:
        ValueError: there are not solutions of both kinds.
    """
    num_errors = sum(label != -1 for label in labels)
    num_correct = len(labels) - num_errors
    if not num_errors or not num_correct:
        raise ValueError(
            f"a threshold needs solutions with and without an error, there are {num_errors} and {num_correct}"
        )
    # At a score t, what changes for thresholds just above t: hits among the solutions with an error, and without one.
    changes: dict[float, list[int]] = {value: [0, 0] for steps in scores for value in steps}
    errors, correct = 0, num_correct
    for steps, label in zip(scores, labels, strict=True):
        if label == -1:
            changes[min(steps)][1] -= 1
        elif (least := min(steps[:label], default=math.inf)) > steps[label]:
            changes[steps[label]][0] += 1
            if least < math.inf:
                changes[least][0] -= 1
    values = sorted(changes)
    best, threshold = _harmonic(errors / num_errors, correct / num_correct), values[0] - 1.0
    for number, value in enumerate(values):
        errors, correct = errors + changes[value][0], correct + changes[value][1]
        f1 = _harmonic(errors / num_errors, correct / num_correct)
        if f1 > best:
            last = number + 1 == len(values)
            best, threshold = f1, value + 1.0 if last else (value + values[number + 1]) / 2
    return threshold


def calibrate_kept(scores: Sequence[Sequence[float]], wrong: Sequence[Sequence[int]]) -> float:
    """The threshold with the best PRM-Score, over all thresholds there are. A step above it is kept.

    Args:
        scores: of the steps of each solution.
        wrong: of each solution the wrong steps, from 0.

    Returns:
        The middle of the first interval of thresholds with the best score.

    Raises:
        ValueError: there are not steps of both kinds.
    """
    steps = sorted((s, i in bad) for one, bad in zip(scores, wrong, strict=True) for i, s in enumerate(one))
    num_wrong = sum(is_wrong for _, is_wrong in steps)
    if not 0 < num_wrong < len(steps):
        raise ValueError(f"a threshold needs wrong and right steps, there are {num_wrong} and {len(steps) - num_wrong}")
    # Below the least score all steps are kept; then they are rejected one after the other.
    true_negatives, false_negatives = 0, 0
    best, threshold = _prm_score(len(steps) - num_wrong, num_wrong, 0, 0), steps[0][0] - 1.0
    for number, (score, is_wrong) in enumerate(steps):
        true_negatives, false_negatives = true_negatives + is_wrong, false_negatives + (not is_wrong)
        last = number + 1 == len(steps)
        if not last and steps[number + 1][0] == score:
            continue
        value = _prm_score(
            len(steps) - num_wrong - false_negatives, num_wrong - true_negatives, true_negatives, false_negatives
        )
        if value > best:
            best, threshold = value, score + 1.0 if last else (score + steps[number + 1][0]) / 2
    return threshold


def _prm_score(tp: int, fp: int, tn: int, fn: int) -> float:
    return (_f1(tp, fp, fn) + _f1(tn, fn, fp)) / 2


@dataclass(frozen=True)
class PRMBenchRow:
    """PRMBench's figures of one solution; shares from 0 to 1, None where there is no such step.

    Args:
        correct_step_acc: of the right steps, those that were kept.
        wrong_step_acc: of the wrong steps, those that were rejected.
        total_step_acc: of all steps, those that were judged right.
        first_error_acc: whether the first wrong step was rejected, 1 or 0.
        model_response_acc: of all steps, those that were kept.
        f1_matrix: numbers of steps: TP right and kept, FP wrong and kept, TN wrong and rejected, FN right and rejected.
    """

    correct_step_acc: float | None
    wrong_step_acc: float | None
    total_step_acc: float
    first_error_acc: int | None
    model_response_acc: float
    f1_matrix: dict[str, int]


@dataclass(frozen=True)
class PRMBenchScores:
    """PRMBench's totals, from 0 to 1: f1 of right steps that are kept, negative_f1 of wrong steps that are rejected,
    and prm_score, the mean of both."""

    f1: float
    negative_f1: float
    prm_score: float


def prmbench_row(kept: Sequence[bool], error_steps: Iterable[int]) -> PRMBenchRow:
    """PRMBench's figures of one solution.

    Args:
        kept: for each step whether it is judged valid; PRMBench's rule is a score above 0.5.
        error_steps: the wrong steps, counted from 1 as in PRMBench's files.

    Raises:
        ValueError: there is no step, or a wrong step that does not exist.
    """
    wrong = {step - 1 for step in error_steps}
    if not kept or not wrong <= set(range(len(kept))):
        raise ValueError(f"wrong steps {sorted(i + 1 for i in wrong)} (from 1) of a solution with {len(kept)} steps")
    counts = Counter({"TP": 0, "FP": 0, "TN": 0, "FN": 0})
    for number, keeps in enumerate(kept):
        counts[("FP" if keeps else "TN") if number in wrong else ("TP" if keeps else "FN")] += 1
    return PRMBenchRow(
        counts["TP"] / (len(kept) - len(wrong)) if len(kept) > len(wrong) else None,
        counts["TN"] / len(wrong) if wrong else None,
        (counts["TP"] + counts["TN"]) / len(kept),
        int(not kept[min(wrong)]) if wrong else None,
        (counts["TP"] + counts["FP"]) / len(kept),
        dict(counts),
    )


def prmbench_scores(rows: Iterable[PRMBenchRow]) -> PRMBenchScores:
    """The totals over the steps of many solutions. PRMBench's own are over those that are not of the classification
    `correct`."""
    counts = Counter[str]()
    for row in rows:
        counts.update(row.f1_matrix)
    tp, fp, tn, fn = (counts[name] for name in ("TP", "FP", "TN", "FN"))
    return PRMBenchScores(_f1(tp, fp, fn), _f1(tn, fn, fp), _prm_score(tp, fp, tn, fn))


def _f1(hits: int, false: int, missed: int) -> float:
    return 2 * hits / (2 * hits + false + missed) if hits else 0.0
