"""What a run records of its start."""

import json
import re
from datetime import UTC, datetime

import pytest
import torch

import repirl
from repirl.config import Config
from repirl.report.log import LogError
from repirl.report.record import read_starts, record_start, revision

CPU = torch.device("cpu")


def config(folder, **changes):
    values = {"objective": "rloo", "output_dir": str(folder), "steps": 3, "policy": {"model": "m"}}
    data = {"train": "t.jsonl"}
    return Config.model_validate(values | {"data": data, "verifier": {"kind": "math"}} | changes)


def test_a_start_says_when_where_and_by_what(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    record_start(config(tmp_path), 0, CPU, 2)
    [start] = read_starts(tmp_path)
    assert before <= datetime.fromisoformat(start["time"]) <= datetime.now(UTC)
    assert start["step"] == 0
    assert start["version"] == repirl.__version__
    assert start["packages"]["torch"] == torch.__version__
    assert start["configuration"]["steps"] == 3
    assert start["machine"]["processes"] == 2
    assert start["machine"]["gpu"] is None
    assert start["machine"]["cores"] > 0
    assert start["command"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_that_goes_on_adds_a_start_and_a_new_one_begins_anew(tmp_path):
    record_start(config(tmp_path), 0, CPU, 1)
    record_start(config(tmp_path, steps=5), 3, CPU, 1)
    starts = read_starts(tmp_path)
    assert [(start["step"], start["configuration"]["steps"]) for start in starts] == [(0, 3), (3, 5)]
    record_start(config(tmp_path), 0, CPU, 1)
    assert len(read_starts(tmp_path)) == 1


@pytest.mark.parametrize("content", ["", "{", '{"starts": {}}', '{"starts": [1]}', "[]", "[" * 100_000])
def test_a_damaged_file_is_said_and_does_not_stop_the_run(tmp_path, caplog, content):
    (tmp_path / "run.json").write_text(content)
    assert read_starts(tmp_path) == []
    assert "run.json cannot be used" in caplog.text
    record_start(config(tmp_path), 2, CPU, 1)
    assert [start["step"] for start in read_starts(tmp_path)] == [2]


def test_no_file_is_no_start(tmp_path, caplog):
    assert read_starts(tmp_path) == []
    assert not caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(LogError, match=re.escape(str(tmp_path / "run.json"))):
        record_start(config(tmp_path), 0, CPU, 1)


def test_the_revision_is_a_commit_or_not_known(tmp_path):
    assert revision() is None or re.fullmatch(r"[0-9a-f]{12}(\+changes)?", revision())
    assert json.dumps(revision())
