"""The display needs no terminal, and tables lose no digit."""

import io
import re
from contextlib import suppress

import pytest
from rich.console import Console

from repirl.report.display import ProgressDisplay, print_table, sparkline


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
