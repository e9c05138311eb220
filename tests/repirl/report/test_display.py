"""The display needs no terminal, and tables lose no digit."""

import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from repirl.report.display import Pace, ProgressDisplay, print_table, sparkline


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


def test_display_shows_length_truncation_kl_clip_and_speed():
    metrics = {"rollout/length": 7.25, "rollout/truncated": 0.125, "policy/approx_kl": 0.00123, "tokens": 3000}
    metrics |= {"policy/clip_fraction": 0.015, "policy/kl_reference": 0.25, "seconds/step": 2.0}
    plain, console = io.StringIO(), Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressDisplay(1, "repirl", console=Console(file=plain, width=80)) as display:
        display.update(1, metrics)
    assert plain.getvalue() == (
        "repirl 1/1: response length (tokens) 7.2, truncated responses 12.5%, KL from the rollouts (nats/token) "
        "0.0012, KL from the reference (nats/token) 0.25, clipped tokens 1.5%, tokens/s 1,500, seconds 2.00\n"
    )
    with ProgressDisplay(1, "repirl", console=console) as display:
        display.update(1, metrics)
        console.print(display._view())
    shown = console.file.getvalue()
    assert all(value in shown for value in ("7.2", "12.5%", "0.0012", "0.25", "1.5%", "1,500"))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_the_table_stays_on_the_terminal(error):
    """Nothing is erased after the last time that it was drawn."""
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, _environ={"TERM": "xterm"})
    with suppress(KeyboardInterrupt), ProgressDisplay(4, "repirl", console=console) as display:
        display.update(3, {"eval/accuracy": 0.75})
        if error is not None:
            raise error
    text = out.getvalue()
    assert "\x1b[2K" not in text[text.rindex("75.0%") :]
    assert "3/4" in text


def test_a_long_plain_run_prints_every_twentieth_step_and_every_evaluation():
    out = io.StringIO()
    with ProgressDisplay(100, "run", console=Console(file=out, width=80)) as display:
        for step in range(1, 101):
            display.update(step, {"eval/accuracy": 0.5} if step == 7 else {"policy/loss": 0.0})
    shown = [int(re.match(r"run (\d+)/100", line)[1]) for line in out.getvalue().splitlines()]
    assert shown == sorted([*range(5, 101, 5), 7])


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
    assert sparkline([0.0, float("nan"), 1.0, 0.6]) == "▁█▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0]) == ""
    assert len(sparkline([float(i) for i in range(100)])) == 32


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


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pace_leaves_out_the_first_step_and_counts_what_is_left():
    clock = Clock()
    pace = Pace(3000, clock)
    told = []
    for step, seconds in [(11, 500.0), (12, 2.0), (13, 3.0)]:
        clock.now += seconds
        pace.done(step)
        told.append(str(pace))
    assert told == ["", "2 s/step, 1:39:36 left", "2.5 s/step, 2:04:28 left"]
    for step in range(14, 3001):
        clock.now += 0.5
        pace.done(step)
        # The last twenty steps alone.
        assert step < 40 or step == 3000 or str(pace).startswith("0.5 s/step, ")
    assert str(pace) == ""


def test_slow_steps_without_a_terminal_have_a_line_each():
    out, clock = io.StringIO(), Clock()
    display = ProgressDisplay(1000, "run", console=Console(file=out, width=80), clock=clock)
    with display:
        for step in range(1, 8):
            clock.now += 25.0 if step < 5 else 90.0
            display.update(step, {"policy/loss": 0.0})
    lines = out.getvalue().splitlines()
    assert [int(re.match(r"run (\d+)/1000", line)[1]) for line in lines] == [3, 5, 6, 7]
    assert lines[0].startswith("run 3/1000, 25 s/step, 6:55:25 left: policy loss")


def test_a_first_step_that_compiles_says_so():
    out = io.StringIO()
    with ProgressDisplay(2, "run", compiles=True, console=Console(file=out, width=80)) as display:
        display.phase("prm")
        display.update(1, {"policy/loss": 0.0})
    assert out.getvalue().startswith("run: the first step compiles kernels and takes longer than those after it\n")
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    display = ProgressDisplay(2, "run", compiles=True, console=console)
    display.phase("prm")
    assert display._progress.tasks[0].fields["phase"] == "prm (first step: kernels are compiled)"
    display.update(1, {})
    display.phase("prm")
    assert display._progress.tasks[0].fields["phase"] == "prm"
