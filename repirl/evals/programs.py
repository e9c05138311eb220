"""What benchmarks of programs have in common."""

from __future__ import annotations

from repirl.data.code import read_tests
from repirl.data.values import Place
from repirl.evals.benchmark import Fields

# What of the reasons of repirl.verify.code says that there was nothing to run.
UNREADABLE = ("no code found",)


def tests_of(fields: Fields, place: Place) -> str:
    """The tests of a row whose fields have the names of the public data set's columns (repirl.data.code), but for the
    problem."""
    row = {name: value for name, value in fields.items() if value is not None}
    row["prompt"] = row.pop("problem")
    return read_tests(row, place, "tests", "--data").text()
