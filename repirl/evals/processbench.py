"""ProcessBench: the first wrong step of solutions (Zheng et al. 2025, arXiv 2412.06559; Qwen/ProcessBench of the hub).

Rows have `id`, `problem`, `steps` (a list) and `label`: the first wrong step from 0, -1 for none. A step is predicted
to be wrong where its score is below a threshold. Of each split (gsm8k, math, olympiadbench, omnimath) there is the
accuracy on solutions with an error, on those without one, and F1, the harmonic mean of both; of the whole the plain
mean of the splits' F1.
"""

from __future__ import annotations

from typing import Any

from repirl.data.sources import read_rows
from repirl.data.values import Place, shown
from repirl.dataconfig import SourceConfig
from repirl.evals.steps import Case, text_list


def first_wrong(
    row: dict[str, Any], place: Place, num_steps: int, column: str = "label", option: str = "ProcessBench"
) -> int:
    """The first wrong step of a row, from 0, or -1; DataError where the column holds no such number. option: what names
    the column, for messages."""
    label = place.value(row, column, option)
    if not isinstance(label, int) or isinstance(label, bool) or not -1 <= label < num_steps:
        raise place.error(
            f"{column!r} is {shown(label)}, expected the number of the first wrong step, from 0 to {num_steps - 1}, or "
            "-1 for none"
        )
    return label


def read_processbench(source: SourceConfig) -> list[Case]:
    """The solutions of a split; wrong: the first wrong step, if there is one. DataError for rows of another format."""
    cases = []
    for number, place, row in read_rows(source, "test"):
        steps = text_list(row, place, "steps")
        label = first_wrong(row, place, len(steps))
        problem = place.text(place.value(row, "problem", "ProcessBench"), "problem")
        wrong = () if label == -1 else (label,)
        cases.append(Case(str(row.get("id", number)), place, problem, steps, wrong))
    return cases
