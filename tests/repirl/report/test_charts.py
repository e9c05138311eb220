"""Lines, ticks, and what of a long line is drawn."""

import math

import pytest
from pages import Page

from repirl.report.charts import MAX_POINTS, figure, shades_of, thin, tick_label, ticks


def curve(x, y, **changes):
    series = [{"name": "a", "x": x, "y": y}]
    return {"title": "t", "xlabel": "turn", "ylabel": "nats", "series": series, "percent": False} | changes


def test_a_long_line_keeps_its_ends_and_its_peaks():
    line = [(float(i), math.sin(i / 3000)) for i in range(100_000)]
    line[31_234] = (31_234.0, 50.0)
    line[77_777] = (77_777.0, -50.0)
    kept = thin(line)
    assert len(kept) <= MAX_POINTS
    assert {line[0], line[-1], line[31_234], line[77_777]} <= set(kept)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})


def test_a_short_line_is_kept_and_a_long_gap_stays_one():
    short = [(float(i), 1.0) for i in range(MAX_POINTS)]
    assert thin(short) == short
    line = [(float(i), None if 4000 <= i < 8000 else float(i)) for i in range(12_000)]
    assert {4000 <= x < 8000 for x, y in thin(line) if y is None} == {True}
    assert all(y is None for _, y in thin([(float(i), None) for i in range(1000)]))


def test_a_long_run_gives_a_small_chart():
    x = [float(i) for i in range(100_000)]
    text = figure(curve(x, [math.sin(i) for i in x]), shades_of(["a"]))
    assert len(text) < 40_000
    assert len(Page(text).all("g", "series")[0][0]["data-x"].split()) <= MAX_POINTS


def test_points_and_values_belong_together():
    page = Page(figure(curve([1, 2, 3, 4, 5], [1, 2, None, 4, None]), shades_of(["a"])))
    [(line, _)] = page.all("g", "series")
    points = [pair for a, _ in page.all("polyline") for pair in a["points"].split()]
    assert len(points) == len(line["data-x"].split()) == len(line["data-y"].split()) == 3


@pytest.mark.parametrize(("low", "high", "first"), [(0.0, 0.0, "0"), (0.0, 3e-7, "0"), (5.0, 5.0, "4.4")])
def test_what_is_never_negative_has_no_negative_ticks(low, high, first):
    page = Page(figure(curve([0, 1], [low, high]), shades_of(["a"])))
    labels = [text for a, text in page.all("text", "y")]
    assert labels[0] == first
    assert not any(label.startswith("\u2212") for label in labels)


def test_turns_are_whole():
    page = Page(figure(curve([0, 1], [0, 1]), shades_of(["a"])))
    assert [text for _, text in page.all("text", "x")] == ["0", "1", "turn"]


def test_large_ticks_are_short():
    assert [tick_label(t, [0, 5000, 10_000], False) for t in (0, 5000, 10_000)] == ["0", "5k", "10k"]
    assert tick_label(2e6, [0, 2e6, 4e6], False) == "2M"
    assert tick_label(-0.2, [-0.4, -0.2, 0], False) == "\u22120.2"
    assert tick_label(0.005, [0, 0.005], True) == "0.5%"


def test_ticks_span_the_values():
    for low, high in ((0, 1), (-3, 7), (1e-9, 2e-9), (5, 5), (-1e12, 1e12)):
        made = ticks(low, high, 5)
        assert made[0] <= low
        assert made[-1] >= high
        assert len(made) <= 8


def test_many_lines_can_be_told_apart():
    shades = shades_of([str(i) for i in range(28)])
    assert len(set(shades.values())) == 28
