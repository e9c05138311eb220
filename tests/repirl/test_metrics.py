"""Metrics on disk survive kills; timers add up; the display needs no terminal."""

import io
import json
import time

import pytest
from rich.console import Console

from repirl.report.metrics import (
    MetricsLogger,
    PhaseTimer,
    ProgressDisplay,
    peak_memory_bytes,
    print_table,
    read_metrics,
    reset_peak_memory,
)


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
    high = peak_memory_bytes()
    assert high >= len(block)
    del block
    reset_peak_memory()
    assert peak_memory_bytes() < high - 100 * 2**20


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


def test_tables_are_never_cut():
    out = io.StringIO()
    print_table("T", ["", "a" * 30], [["x", "1234567890123456789"]], Console(file=out, width=30))
    assert "1234567890123456789" in out.getvalue().replace("\n", "").replace("│", "").replace(" ", "")
