"""The right answer of a row, as the verifier of the row takes it."""

from __future__ import annotations

from typing import Any

from repirl.data.code import read_tests
from repirl.data.values import Place, shown
from repirl.dataconfig import DataConfig
from repirl.verify.choose import mixed_answer

KINDS = ("math", "code", "custom")


def read_answer(row: dict[str, Any], place: Place, column: str, option: str, data: DataConfig) -> str:
    """What the verifier judges responses to a row by: a text, or the text of tests.

    Args:
        row: of the data.
        place: where it stands.
        column: with the answer.
        option: which names the column.
        data: says what answers are (`answers`), or which column says it for each row (`verifier_column`).

    Raises:
        DataError: the row has no such column, or something else is in it; it names the row.
    """
    if data.verifier_column is None:
        return answer_of(row, place, column, option, tests=data.answers == "tests")
    kind = place.value(row, data.verifier_column, "data.verifier_column")
    if kind not in KINDS:
        raise place.error(f"{data.verifier_column!r} is {shown(kind)}, expected one of {', '.join(KINDS)}")
    return mixed_answer(kind, answer_of(row, place, column, option, tests=kind == "code"))


def answer_of(row: dict[str, Any], place: Place, column: str, option: str, *, tests: bool) -> str:
    """The answer in a column; tests: it is one of programs."""
    if tests:
        return read_tests(row, place, column, option).text()
    return place.answer(place.value(row, column, option), column)
