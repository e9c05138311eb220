"""Metrics on disk survive kills; timers add up; the display needs no terminal."""

import io
import json
import re
import time

import pytest
import torch
from rich.console import Console

from repirl.report.metrics import (
    MetricsLogger,
    PhaseTimer,
    ProgressDisplay,
    _sparkline,
    peak_memory_bytes,
    print_table,
    read_metrics,
    reset_peak_memory,
)

CPU = torch.device("cpu")


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


def test_timer_adds_up_by_phase():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("a"):
            time.sleep(0.01)
    with pytest.raises(RuntimeError, match="x"), timer("b"):
        raise RuntimeError("x")
    metrics = timer.step_metrics()
    assert set(metrics) == {"seconds/a", "seconds/b", "seconds/step"}
    assert 0.02 <= metrics["seconds/a"] <= metrics["seconds/step"]
    assert set(timer.step_metrics()) == {"seconds/step"}


def test_peak_memory_starts_anew_after_a_reset():
    block = bytearray(200 * 2**20)
    high = peak_memory_bytes(CPU)
    assert high >= len(block)
    del block
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < high - 100 * 2**20


def test_display_prints_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with ProgressDisplay(4, "repirl", console=Console(file=out, width=80)) as display:
        for step in range(1, 5):
            display.phase("rollout")
            display.update(step, {"eval/accuracy": step / 4, "seconds/step": 0.5})
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1] == "repirl 4/4: held-out accuracy 100.0%, seconds 0.50"
    assert "\x1b" not in out.getvalue()


def test_display_on_a_terminal_shows_the_newest_metrics():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with ProgressDisplay(4, "repirl", console=console) as display:
        display.update(1, {"eval/accuracy": 0.25})
        display.update(2, {"eval/accuracy": 0.5, "prm/ess_fraction": float("nan")})
        console.print(display._view())
    assert "50.0%" in out.getvalue()
    assert "2/4" in out.getvalue()


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


def test_a_long_plain_run_prints_every_twentieth_step_and_every_evaluation():
    out = io.StringIO()
    with ProgressDisplay(100, "run", console=Console(file=out, width=80)) as display:
        for step in range(1, 101):
            display.update(step, {"eval/accuracy": 0.5} if step == 7 else {"policy/loss": 0.0})
    found = [int(re.match(r"run (\d+)/100", line)[1]) for line in out.getvalue().splitlines()]
    assert found == sorted([*range(5, 101, 5), 7])


def test_an_error_inside_leaves_the_terminal_with_its_cursor():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, _environ={"TERM": "xterm"})

    def fail() -> None:
        with ProgressDisplay(3, "run", console=console) as display:
            display.update(1, {"eval/accuracy": 0.5})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_sparkline_spans_its_values_and_leaves_out_what_is_not_finite():
    assert _sparkline([0.0, float("nan"), 1.0, 0.6]) == "▁█▅"
    assert _sparkline([2.0, 2.0]) == "▁▁"
    assert _sparkline([1.0]) == ""
    assert len(_sparkline([float(i) for i in range(100)])) == 32


@pytest.mark.parametrize("width", [120, 80, 40])
def test_no_cell_of_a_table_is_cut_or_broken(width):
    columns = [
        "",
        "accuracy",
        "error AUROC",
        "error F1",
        "ESS",
        "rollout s",
        "PRM s",
        "policy s",
        "tokens/s",
        "peak MiB",
    ]
    rows = [
        ["start", "26.5%", "0.712", "0.401", *["-"] * 6],
        ["rePIRL, PRM only", "81.0%", "0.951", "0.801", "0.44", "131", "122", "112", "14801", "702"],
    ]
    out = io.StringIO()
    print_table("Results", columns, rows, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    for row in rows:
        assert any(line.split() == " ".join(row).split() for line in lines)
    # The demo's ten columns fit into a log of 80.
    if width >= 80:
        assert max(map(len, lines)) <= width
