"""Solutions with known wrong steps, of benchmarks of process reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from repirl.data.values import Place, shown


@dataclass(frozen=True)
class Case:
    """A solution.

    Args:
        id: as the data names it.
        place: of its row, for messages.
        problem: text.
        steps: of the solution.
        wrong: the wrong steps, from 0, in order; in ProcessBench the first one only.
        classification: in PRMBench the kind of error.
    """

    id: str
    place: Place
    problem: str
    steps: tuple[str, ...]
    wrong: tuple[int, ...]
    classification: str | None = None


def text_list(row: dict[str, Any], place: Place, column: str) -> tuple[str, ...]:
    """A column with a list of texts. DataError for anything else."""
    values = place.value(row, column, "--data")
    if not isinstance(values, list) or not values:
        raise place.error(f"{column!r} is {shown(values)}, expected a list of steps")
    return tuple(place.text(value, f"{column}.{number}") for number, value in enumerate(values))
