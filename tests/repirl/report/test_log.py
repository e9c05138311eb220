"""Metrics on disk survive kills, full disks and bad lines."""

import errno
import itertools
import json
import logging
import os
import shutil

import pytest

from repirl.report.log import LogError, MetricsLogger, read_metrics


def steps(folder):
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def test_resume_cuts_what_the_killed_run_wrote_later(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        for step in range(5):
            logger.log(step, {"x": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "x"')
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    with MetricsLogger(tmp_path, tensorboard=False, start_step=2) as logger:
        logger.log(3, {"x": 30.0})
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["x"] == 30.0
    # A fresh start in the same folder begins anew.
    with MetricsLogger(tmp_path, tensorboard=False):
        pass
    assert steps(tmp_path) == []


def test_lines_are_on_disk_at_once_and_stay_valid_json(tmp_path):
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"a": float("nan"), "b": 2.0, "c": float("-inf")})
        text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 1, "a": None, "b": 2.0, "c": None, "nonfinite": ["a", "c"]}


@pytest.mark.parametrize("cut", [1, 5, 16])
def test_a_line_cut_anywhere_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"x": step})
    path.write_text(path.read_text()[: -1 - cut])
    assert steps(tmp_path) == [1, 2]
    with MetricsLogger(tmp_path, tensorboard=False, start_step=2) as logger:
        logger.log(3, {"x": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsLogger(tmp_path, tensorboard=False, start_step=2) as logger:
        logger.log(3, {})
    assert steps(tmp_path) == [1, 2, 3]


def test_tensorboard_gets_every_value(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, tensorboard=True) as logger:
        logger.log(1, {"policy/loss": 0.25})
        logger.log(2, {"policy/loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [(1, 0.25), (2, 0.5)]


GOOD = ['{"step": 1, "x": 1.0}', '{"step": 2, "x": null, "nonfinite": ["x"]}', '{"step": 3, "x": 3}']
BAD = [
    "{",
    "",
    "\0" * 40,
    "3",
    "[1, 2]",
    '"step"',
    "null",
    "{}",
    '{"x": 1.0}',
    '{"step": null}',
    '{"step": true}',
    '{"step": -1}',
    '{"step": "2"}',
    '{"step": 2.5}',
    '{"step": 2, "x": "high"}',
    '{"step": 2, "x": [1]}',
    '{"step": 2, "nonfinite": 3}',
    '{"step": ' + "9" * 5000 + "}",
    "[" * 100_000,
    b"\xff\xfe",
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_line_that_is_no_record_costs_no_other(tmp_path, caplog, bad):
    path = tmp_path / "metrics.jsonl"
    bad = bad if isinstance(bad, bytes) else bad.encode()
    first, second, third = (line.encode() for line in GOOD)
    path.write_bytes(b"\n".join([first, bad, second, third, b'{"step": 4']))
    with caplog.at_level(logging.WARNING):
        assert steps(tmp_path) == [1, 2, 3]
    assert f"{path}: line 2 cannot be read as metrics; left out" in caplog.text
    with MetricsLogger(tmp_path, tensorboard=False, start_step=2) as logger:
        logger.log(3, {"x": 5.0})
    assert "line 2 cannot be read as metrics; moved to metrics.damaged.jsonl" in caplog.text
    assert path.read_text().splitlines() == [*GOOD[:2], '{"step": 3, "x": 5.0}']
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == bad + b"\n"
    caplog.clear()
    assert steps(tmp_path) == [1, 2, 3]
    assert not caplog.text


def test_many_lines_that_are_no_records_are_counted(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("{\n" * 20 + GOOD[0] + "\n")
    with caplog.at_level(logging.WARNING):
        assert steps(tmp_path) == [1]
    assert "lines 1, 2, 3, 4, 5, 6, 7, 8 and 12 more cannot be read as metrics" in caplog.text


def fail_with(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["os.write", "os.fsync"])
def test_a_full_disk_leaves_the_lines_before(tmp_path, monkeypatch, call):
    plain, calls = os.write, itertools.count()

    def write(file, data):
        """A part fits."""
        return plain(file, data[:5]) if next(calls) == 0 else fail_with(errno.ENOSPC)()

    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"x": 1.0})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(call, write if call == "os.write" else fail_with(errno.ENOSPC))
            message = "No space left on device; make room on that disk, and go on from the newest checkpoint with --res"
            with pytest.raises(LogError, match=message):
                logger.log(2, {"x": 2.0})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_at_the_start_leaves_the_file(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(GOOD[0] + "\n")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail_with(errno.ENOSPC))
        with pytest.raises(LogError, match="No space left on device"):
            MetricsLogger(tmp_path, tensorboard=False, start_step=1)
    assert steps(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_folder_that_is_gone_is_told(tmp_path, how):
    folder = tmp_path / "run"
    with MetricsLogger(folder, tensorboard=False) as logger:
        logger.log(1, {"x": 1.0})
        if how == "removed":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "other")
        if how == "replaced":
            folder.mkdir()
            (folder / "metrics.jsonl").write_text("")
        with pytest.raises(LogError, match=r"run/metrics.jsonl' is gone .*: its folder was removed or renamed"):
            logger.log(2, {"x": 2.0})
    # Nothing was made anew, and nothing was added to what lies elsewhere by now.
    assert folder.exists() == (how == "replaced")
    if how != "removed":
        assert steps(tmp_path / "other") == [1]


def test_metrics_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LogError, match=r"metrics cannot be read from .*: Is a directory"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(LogError, match="metrics cannot be written to"):
        MetricsLogger(tmp_path, tensorboard=False, start_step=1)


@pytest.mark.parametrize("when", ["start", "step"])
def test_without_room_for_tensorboard_the_run_goes_on(tmp_path, monkeypatch, caplog, capfd, when):
    pytest.importorskip("tensorboard")
    from repirl.report.tensorboard import TensorBoardFile

    monkeypatch.setattr(TensorBoardFile, "_add" if when == "start" else "write", fail_with(errno.ENOSPC))
    with caplog.at_level(logging.WARNING), MetricsLogger(tmp_path, tensorboard=True) as logger:
        for step in (1, 2, 3):
            logger.log(step, {"x": step})
    assert caplog.text.count("TensorBoard's files cannot be written ([Errno 28] No space left on device)") == 1
    assert steps(tmp_path) == [1, 2, 3]
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_of_a_resumed_run_forgets_later_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (2, 2.0)):
        with MetricsLogger(tmp_path, tensorboard=True, start_step=start) as logger:
            for step in range(start + 1, 5):
                logger.log(step, {"x": value, "y": float("inf")})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
