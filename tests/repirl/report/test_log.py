"""Metrics on disk survive kills."""

import json

import pytest

from repirl.report.log import MetricsLogger, read_metrics


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
