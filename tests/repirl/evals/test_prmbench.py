"""Rows of PRMBench: correct samples, numbers before steps, several wrong steps, and what is refused."""

import json

import pytest

from repirl.data.errors import DataError
from repirl.dataconfig import SourceConfig
from repirl.evals.prmbench import read_prmbench

ROW = {
    "original_question": "A?",
    "modified_question": "B?",
    "original_process": ["1. x = 1", "2. so 2.5"],
    "modified_process": ["1. x = 1", "Step 2. x = 1 again", "3. 2.5 it is", "2.5"],
    "modified_steps": [2],
    "error_steps": [3, 2],
    "reason": "",
    "idx": "p1",
    "question": "A?",
    "classification": "redundency",
}


def read(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prmbench(SourceConfig(path=str(path)))


def test_redundant_samples_come_with_a_correct_one(tmp_path, caplog):
    other = ROW | {"classification": "circular", "error_steps": 1}
    correct, redundant, circular = read(tmp_path / "a.jsonl", ROW, other, ROW)
    assert (correct.id, correct.problem, correct.wrong) == ("correct_p1", "A?", ())
    assert correct.steps == ("x = 1", "so 2.5")
    assert (redundant.id, redundant.problem, redundant.wrong) == ("redundency_p1", "B?", (1, 2))
    assert redundant.steps == ("x = 1", "x = 1 again", "2.5 it is", "2.5")
    assert (circular.id, circular.wrong, circular.classification) == ("circular_p1", (0,), "circular")
    assert "left out 1 rows with the classification and idx of an earlier one" in caplog.text


def test_rows_of_another_format_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for steps in ([0], [5], ["1"], None, [True]):
        with pytest.raises(DataError, match=r"line 1: 'error_steps' is .*, expected numbers of steps, from 1 to 4"):
            read(path, ROW | {"error_steps": steps})
    with pytest.raises(DataError, match="line 1: 'modified_process' is 'x', expected a list of steps"):
        read(path, ROW | {"modified_process": "x"})
    with pytest.raises(DataError, match=r"line 1 has no column 'classification' \(PRMBench\)"):
        read(path, {"steps": []})
