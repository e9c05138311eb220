"""PRMBench: wrong steps of nine kinds (Song et al. 2025, arXiv 2501.03124; ssmisya/PRMBench, whose script is followed).

Rows have `modified_question`, `modified_process` (a list of steps), `error_steps` (from 1, maybe several),
`classification` and `idx`; those of the classification `redundency` (as the data spells it) are a correct sample as
well, by `original_question` and `original_process`. A step is kept where its score is above a threshold, 0.5 for
probabilities. PRMBench's second threshold, 0.15 for redundancy, is for models that give a redundancy score beside; one
score a step is read as in PRMBench's own code for such models, by the first threshold everywhere.

PRM-Score is the mean of the F1 of right steps that are kept and the F1 of wrong steps that are rejected, over the steps
of all samples but the correct ones, and of each classification. Where a classification has no wrong step
(multi_solutions, correct), its PRM-Score is the F1 of right steps.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from repirl.data.sources import read_rows
from repirl.data.values import Place, shown
from repirl.dataconfig import SourceConfig
from repirl.evals.steps import Case, text_list

logger = logging.getLogger(__name__)

CORRECT, REDUNDANT = "correct", "redundency"
CATEGORIES = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
# The numbers before the steps are taken out, as in PRMBench's code.
_NUMBER = re.compile(r"\s*(?:step\s*)?\d+\.\s+(?=\S)", re.IGNORECASE)


def read_prmbench(source: SourceConfig) -> list[Case]:
    """The samples of a file. Of those with the same classification and idx the first is taken, and a warning says how
    many others there are. DataError for rows of another format."""
    cases: dict[str, Case] = {}
    num_twice = 0
    for number, place, row in read_rows(source, "train"):
        kind = place.text(place.value(row, "classification", "PRMBench"), "classification")
        steps = _steps(row, place, "modified_process")
        wrong = _wrong(row, place, len(steps))
        name = str(row.get("idx", number))
        if kind == REDUNDANT:
            original = _steps(row, place, "original_process")
            problem = place.text(place.value(row, "original_question", "PRMBench"), "original_question")
            key = f"{CORRECT}_{name}"
            cases.setdefault(key, Case(key, place, problem, original, (), CORRECT))
        problem = place.text(place.value(row, "modified_question", "PRMBench"), "modified_question")
        key = f"{kind}_{name}"
        num_twice += key in cases
        cases.setdefault(key, Case(key, place, problem, steps, wrong, kind))
    if num_twice:
        logger.warning("%s: left out %d rows with the classification and idx of an earlier one", source.path, num_twice)
    return list(cases.values())


def _steps(row: dict[str, Any], place: Place, column: str) -> tuple[str, ...]:
    return tuple(_NUMBER.sub("", step, count=1) for step in text_list(row, place, column))


def _wrong(row: dict[str, Any], place: Place, num_steps: int) -> tuple[int, ...]:
    values = place.value(row, "error_steps", "PRMBench")
    numbers = values if isinstance(values, list) else [values]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= num_steps for n in numbers):
        raise place.error(f"'error_steps' is {shown(values)}, expected numbers of steps, from 1 to {num_steps}")
    return tuple(sorted({n - 1 for n in numbers}))
