"""Files of JSON lines that commands write."""

import datetime
import json

import pytest

from repirl.apps.lines import LinesFile
from repirl.config import ConfigError, RunError


def test_a_file_has_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    file = LinesFile(path)
    rows = [{"text": "é", "half": "\ud800"}, {"day": datetime.date(2020, 1, 2)}]
    file.write(rows[:1])
    file.write(rows[1:])
    assert not path.exists()
    file.finish()
    assert [one.name for one in path.parent.iterdir()] == ["a.jsonl"]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "é" in lines[0]
    assert list(map(json.loads, lines)) == [rows[0], {"day": "2020-01-02"}]
    with pytest.raises(ConfigError, match=r"a\.jsonl' exists already: choose another file$"):
        LinesFile(path)


def test_what_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output .*a\.jsonl' cannot be written: .*file' is a file, not a folder"):
        LinesFile(tmp_path / "file" / "a.jsonl")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    file = LinesFile(tmp_path / "a.jsonl")
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(RunError, match=r"--output .*a\.jsonl' cannot be written: No space left on device"):
        file.write([{}])
