"""The files of results follow their schema, and the CSV holds what they do."""

import csv
import json
from copy import deepcopy
from pathlib import Path

import pytest

from bench import schema

RESULTS = Path(__file__).parents[2] / "bench" / "results"
FILES = sorted(RESULTS.glob("*/ops*.json"))


@pytest.fixture
def result():
    return json.loads((RESULTS / "cpu" / "ops.json").read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_committed_files_follow_the_schema(file):
    content = schema.load(file)
    assert content["cases"]


def test_there_are_committed_files():
    assert len(FILES) >= 3


def test_problems_are_named_with_their_place(result):
    assert schema.problems(result) == []
    result["threads"] = "two"
    result["cases"][1]["rows"][0]["median"] = None
    del result["cases"][2]["case"]["dtype"]
    result["cases"][0]["yardstick"]["typo"] = 1
    assert schema.problems(result) == [
        "threads is 'two', not count",
        "cases[0].yardstick.typo is not in the schema",
        "cases[1].rows[0].median is None, not number",
        "cases[2].case.dtype is missing",
    ]
    assert schema.problems([]) == ["the file is [], not an object"]


def test_a_format_has_what_came_with_it(result):
    newer = deepcopy(result) | {"format": 2}
    missing = schema.problems(newer)
    assert "cases[0].checked_rows is missing" in missing
    assert "cases[0].yardstick.seconds is missing" in missing


def test_files_that_cannot_be_used_are_refused(result, tmp_path):
    file = tmp_path / "ops.json"
    with pytest.raises(ValueError, match=r"ops\.json cannot be read"):
        schema.load(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"ops\.json cannot be read"):
        schema.load(file)
    file.write_text(json.dumps({"cases": []}))
    with pytest.raises(ValueError, match=r"is not what bench\.run --json writes: date is missing; "):
        schema.load(file)
    file.write_text(json.dumps(result | {"format": 3}))
    with pytest.raises(ValueError, match="is of format 3; this revision reads up to 2: use a newer one"):
        schema.load(file)


def test_the_description_has_every_field():
    text = schema.markdown()
    for part, fields in schema.PARTS.items():
        assert f"**{part}**" in text
        assert all(f"| `{name}` | {field.kind} |" in text for name, field in fields.items())


def test_the_csv_has_a_line_for_every_row(result, tmp_path):
    file = tmp_path / "new" / "ops.csv"
    schema.write_csv(file, {"ops.json": result})
    with file.open(newline="") as source:
        lines = list(csv.DictReader(source))
    assert list(lines[0]) == schema.COLUMNS
    assert len(lines) == sum(len(measured["rows"]) for measured in result["cases"])
    row, first = result["cases"][0]["rows"][0], lines[0]
    assert (first["file"], first["N"], first["D"], first["V"]) == ("ops.json", "1024", "576", "49152")
    assert (first["contender"], first["ours"], first["reason"]) == (row["contender"], "True", "")
    assert float(first["median_s"]) == row["median"]
    assert float(first["yardstick_s"]) == result["cases"][0]["yardstick"]["median"]
    assert float(first["error_entropy"]) == row["errors"]["entropy"]
    assert first["error_dweight"] == ""
    assert lines[1]["reason"] == "is for training"
