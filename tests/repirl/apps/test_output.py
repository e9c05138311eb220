"""Files that are written part by part: what a kill leaves is cut off, and what is not theirs is not touched."""

import json
import re
import signal

import pytest

from repirl.apps.output import ResumableOutput
from repirl.config import ConfigError, RunError
from repirl.interrupt import Interrupted


def test_what_a_kill_left_is_cut_off(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with ResumableOutput(path, "it", resume=False) as file:
        file.begin({"way": 1}, 3)
        file.write(['"é"', '"\ud800"'], {"tokens": 5})
    with open(path, "a") as lines:
        lines.write("half a li")
    with ResumableOutput(path, "it", resume=True) as file:
        assert (file.num_rows, file.counts) == (2, {"tokens": 5})
        file.begin({"way": 1}, 3)
        file.write(["3"], {"tokens": 6})
    assert [json.loads(line) for line in path.read_text().splitlines()] == ["é", "\ud800", 3]
    assert json.loads(path.with_name("out.jsonl.meta.json").read_text())["rows"] == 3


def test_files_that_were_changed_or_made_otherwise_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResumableOutput(path, "it", resume=False) as file:
        file.begin({"way": 1}, 3)
        file.write(["1"], {})
    before = path.read_bytes()
    with (
        ResumableOutput(path, "it", resume=True) as file,
        pytest.raises(ConfigError, match="was made with way 1, now it is 2"),
    ):
        file.begin({"way": 2}, 3)
    assert path.read_bytes() == before
    path.write_text("")
    with pytest.raises(ConfigError, match="is shorter than `it` left it"):
        ResumableOutput(path, "it", resume=True)


def test_nothing_stays_where_nothing_was_begun(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResumableOutput(path, "it", resume=False), pytest.raises(ConfigError, match="another `it` writes"):
        ResumableOutput(path, "it", resume=False)
    assert list(tmp_path.iterdir()) == []
    # Begun, but killed before a row: it begins anew.
    with ResumableOutput(path, "it", resume=False) as file:
        file.begin({"way": 1}, 3)
    with ResumableOutput(path, "it", resume=False) as file:
        file.begin({"way": 2}, 3)
        assert file.num_rows == 0


def test_an_interruption_says_what_is_there(tmp_path):
    path = tmp_path / "out.jsonl"
    told = f"SIGINT: stopped; 4 of 6 prompts are in {str(path)!r}, go on with it by --resume"
    for rows, said in ((0, "SIGINT: stopped; nothing was saved"), (4, told)):
        with (  # noqa: PT012 (what is written before is what it is about)
            pytest.raises(Interrupted, match=re.escape(said)),
            ResumableOutput(path, "it", resume=False, unit="prompts") as file,
        ):
            file.begin({"way": 1}, 6)
            file.write(["1"] * bool(rows), {}, rows)
            raise Interrupted(signal.SIGINT)


def test_places_that_cannot_be_written_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output '.*out.jsonl' cannot be written"):
        ResumableOutput(tmp_path / "file" / "out.jsonl", "it", resume=False)

    def full(_):
        raise OSError(28, "No space left on device")

    with ResumableOutput(tmp_path / "out.jsonl", "it", resume=False) as file:
        file.begin({}, 3)
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(RunError, match="cannot be written: No space left on device"):
            file.write(["1"], {})
