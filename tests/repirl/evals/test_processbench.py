"""Rows of ProcessBench, and what is refused."""

import json

import pytest

from repirl.data.errors import DataError
from repirl.dataconfig import SourceConfig
from repirl.evals.processbench import read_processbench

ROW = {"id": "gsm8k-0", "generator": "x", "problem": "1+1?", "steps": ["1+1=3", "so 3"], "label": 0}


def read(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_processbench(SourceConfig(path=str(path)))


def test_labels_become_wrong_steps(tmp_path):
    wrong, right = read(tmp_path / "a.jsonl", ROW, ROW | {"id": "gsm8k-1", "label": -1})
    assert (wrong.id, wrong.problem, wrong.steps, wrong.wrong) == ("gsm8k-0", "1+1?", ("1+1=3", "so 3"), (0,))
    assert (right.id, right.wrong, right.classification) == ("gsm8k-1", (), None)


def test_rows_of_another_format_are_refused(tmp_path):
    for label in (2, -2, None, True, "0"):
        with pytest.raises(DataError, match=r"line 1: 'label' is .*, from 0 to 1, or -1 for none"):
            read(tmp_path / "a.jsonl", ROW | {"label": label})
    with pytest.raises(DataError, match=r"line 1: 'steps' is \[\], expected a list of steps"):
        read(tmp_path / "a.jsonl", ROW | {"steps": []})
    with pytest.raises(DataError, match=r"has no column 'problem' \(ProcessBench\)"):
        read(tmp_path / "a.jsonl", {"steps": ["a"], "label": -1})
