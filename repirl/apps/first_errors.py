"""`repirl localize`: the first wrong step of each solution by a trained PRM, judged as ProcessBench does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from repirl.apps.benchmarks import ProcessBenchScores, calibrate, processbench_scores
from repirl.apps.lines import LinesFile
from repirl.apps.localize import first_error
from repirl.apps.score import Progress
from repirl.apps.solutions import Columns, Solution, as_source, check_split, encode, read_solutions, score_encoded
from repirl.apps.trained import Placed, trained_prm
from repirl.config import ConfigError
from repirl.evals.processbench import first_wrong
from repirl.output_path import LINES, check_file, is_same
from repirl.prm import PRM

# Of step scores that are probabilities, where none is given.
EVEN_CHANCE = 0.5
# What --output adds to each row.
ADDED = ("step_scores", "prediction")


@dataclass(frozen=True)
class LocalizeOptions:
    """How solutions are read and judged.

    Args:
        columns: which columns hold problem and steps.
        label_column: the first wrong step, from 0; -1 for none.
        split: what is put between steps, as in repirl.apps.solutions.encode.
        threshold: steps that score below it are wrong; None for one that is calibrated, or else 0.5 where step scores
            are probabilities.
        placed: how the PRM is loaded, and how many tokens a batch may hold.
    """

    columns: Columns = field(default_factory=lambda: Columns("problem", None, "steps"))
    label_column: str = "label"
    split: str | None = None
    threshold: float | None = None
    placed: Placed = field(default_factory=Placed)

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.threshold is not None and self.threshold != self.threshold:
            raise ConfigError("--threshold is nan, expected a number")


@dataclass(frozen=True)
class Localized:
    """threshold: which was used · origin: where it is from · scores: of each input, by its name."""

    threshold: float
    origin: str
    scores: dict[str, ProcessBenchScores]

    @property
    def mean_f1(self) -> float | None:
        """The plain mean of the inputs' F1; None where one has none."""
        f1 = [s.f1 for s in self.scores.values()]
        known = [value for value in f1 if value is not None]
        return fmean(known) if known and len(known) == len(f1) else None


@dataclass(frozen=True)
class _File:
    solutions: list[Solution]
    labels: list[int]


def localize(
    prm: str | os.PathLike,
    sources: Sequence[str | os.PathLike],
    options: LocalizeOptions | None = None,
    *,
    calibration: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
) -> Localized:
    """Predict the first wrong step of each solution, and compare with the labels.

    Rows are ProcessBench's: `problem`, `steps` (a list), `label` (the first wrong step from 0, -1 for none). Of a step
    the score is PRM.step_scores' and the first one below the threshold is the prediction.

    Args:
        prm: an exported PRM, or a run's folder or step_N folder.
        sources: files or data sets ("owner/name:split" of the hub), each judged for itself.
        options: how; None for the defaults.
        calibration: a file of the same format: the threshold is the one with the best F1 there.
        output: a file for the rows of the input, with `step_scores` and `prediction`; None for none.

    Raises:
        ConfigError: rows, models or options that cannot be used, or an output that exists.
        RunError: the output cannot be written, or a reward is not finite.
    """
    options = options or LocalizeOptions()
    if calibration is not None and options.threshold is not None:
        raise ConfigError(f"--threshold {options.threshold} and --calibrate {os.fspath(calibration)}: give one of them")
    names = [os.fspath(source) for source in sources]
    if output is not None:
        check_file(output, LINES, names if calibration is None else [*names, calibration])
    refuse_twice("--input", names)
    files = {name: _read(name, options, output=output is not None) for name in names}
    tuned = None if calibration is None else _read(os.fspath(calibration), options)
    with trained_prm(prm, options.placed) as (loaded, _):
        check_threshold(loaded, options.threshold, calibrated=tuned is not None)
        tuned_on = os.fspath(calibration or "")
        known = None if tuned is None else (_step_scores(loaded, tuned, options, tuned_on), tuned.labels)
        threshold, origin = choose_threshold(options.threshold, known, tuned_on, names)
        scored = {name: _step_scores(loaded, file, options, name) for name, file in files.items()}
    predicted = {name: [_predict(steps, threshold) for steps in scored[name]] for name in names}
    if output is not None:
        _write(LinesFile(output), files, scored, predicted)
    scores = {name: processbench_scores(predicted[name], files[name].labels) for name in names}
    return Localized(threshold, origin, scores)


def refuse_twice(option: str, names: Sequence[str]) -> None:
    """ConfigError where two names are those of one file."""
    for number, name in enumerate(names):
        if any(is_same(name, other) for other in names[:number]):
            raise ConfigError(f"{option} names {name!r} twice")


def _predict(scores: Sequence[float], threshold: float) -> int:
    error = first_error(scores, threshold)
    return -1 if error is None else error


def check_threshold(prm: PRM, threshold: float | None, *, calibrated: bool) -> None:
    """ConfigError where there is no threshold, neither given nor calibrated, and none goes without saying."""
    if threshold is None and not calibrated and prm.description.steps.score != "end":
        raise ConfigError(
            "step scores of this PRM are no probabilities, so that no threshold goes without saying: give "
            "--threshold NUMBER, or --calibrate FILE"
        )


def choose_threshold(
    given: float | None,
    tuned: tuple[Sequence[Sequence[float]], Sequence[Any]] | None,
    name: str,
    names: Sequence[str],
    best: Callable[[Sequence[Sequence[float]], Sequence[Any]], float] = calibrate,
) -> tuple[float, str]:
    """The threshold, and where it is from.

    Args:
        given: by the user; None if it is not.
        tuned: step scores and labels to calibrate it on; None for none.
        name: of the file that these are from.
        names: of the inputs.
        best: finds the threshold.
    """
    if given is not None:
        return given, "given"
    if tuned is None:
        return EVEN_CHANCE, "an even chance, as step scores are probabilities"
    try:
        threshold = best(*tuned)
    except ValueError as error:
        raise ConfigError(f"--calibrate {name}: {error}") from error
    told = f"calibrated on {name}, {len(tuned[1])} solutions"
    if any(is_same(name, source) for source in names):
        told += "; that is an input, too: its own figures are optimistic"
    return threshold, told


def _read(name: str, options: LocalizeOptions, *, output: bool = False) -> _File:
    solutions = read_solutions(as_source(name), options.columns)
    labels = []
    for solution in solutions:
        place, column = solution.place, options.label_column
        if isinstance(solution.response, str):
            raise place.error("the response is text, expected a list of steps, which the label counts")
        label = first_wrong(solution.row, place, len(solution.response), column, "--label-column")
        if output and (taken := [name for name in ADDED if name in solution.row]):
            raise place.error(f"there is a column {taken[0]!r} already, which --output would replace: rename it")
        labels.append(label)
    return _File(solutions, labels)


def _step_scores(prm: PRM, file: _File, options: LocalizeOptions, name: str) -> list[list[float]]:
    encoded = [encode(solution, prm, options.split) for solution in file.solutions]
    scores: list[list[float]] = [[]] * len(encoded)
    with Progress(f"localize {name}", sum(map(len, encoded))) as progress:
        for i, one in score_encoded(prm, encoded, options.placed.tokens):
            scores[i] = one.steps.tolist()
            progress.add(len(encoded[i]))
    return scores


def _write(
    file: LinesFile, files: dict[str, _File], scored: dict[str, list[list[float]]], predicted: dict[str, list[int]]
) -> None:
    for name, part in files.items():
        for solution, steps, first in zip(part.solutions, scored[name], predicted[name], strict=True):
            file.write([solution.row | dict(zip(ADDED, (steps, first), strict=True))])
    file.finish()


def described(result: Localized) -> str:
    """The figures as text: the threshold and where it is from, and a line for each input."""

    def shown_percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [f"threshold {result.threshold:.6g} ({result.origin})"]
    for name, s in result.scores.items():
        lines.append(
            f"{name}: acc on erroneous {shown_percent(s.error_acc)} ({s.num_errors} solutions), acc on correct "
            f"{shown_percent(s.correct_acc)} ({s.num_correct}), F1 {shown_percent(s.f1)}"
        )
    if len(result.scores) > 1:
        lines.append(f"mean F1 of {len(result.scores)} inputs {shown_percent(result.mean_f1)}")
    return "\n".join(lines)
