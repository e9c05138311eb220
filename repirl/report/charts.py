"""Learning curves as SVG drawings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from repirl.report.colours import SERIES_LIGHT
from repirl.report.markup import MINUS, escape, is_finite, number

# Points of a line that are drawn; of more, the lowest and the highest of each stretch.
MAX_POINTS = 400
# A line of more points has no dots, which would hide it.
_MAX_DOTS = 25
_WIDTH, _HEIGHT = 520, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 12, 48
# Patterns of dashes in page.css. Their number and that of the colours have no common divisor.
_DASHES = 4

Point = tuple[float, float | None]


class Series(TypedDict):
    """One line of a chart. x and y have the same length; where y is None or not finite, the line has a gap."""

    name: str
    x: list[float]
    y: list[float | None]


class Curve(TypedDict):
    """One chart. percent: y is a share in [0, 1], shown in percent. note: stands below it."""

    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    percent: bool
    note: NotRequired[str]


def shades_of(names: Sequence[str]) -> dict[str, str]:
    """The styles of lines, by name: a colour and a pattern of dashes, no two alike for the first 28."""
    return {name: f"s{i % len(SERIES_LIGHT)} d{i % _DASHES}" for i, name in enumerate(dict.fromkeys(names))}


def figure(curve: Curve, shades: dict[str, str]) -> str:
    """A chart with its title, axes and legend.

    Raises:
        ValueError: a series has not as many x as y values.
    """
    lines = [thin(_points(series)) for series in curve["series"]]
    percent = curve["percent"]
    last = [next((number(y, percent) for _, y in reversed(line) if y is not None), "no values") for line in lines]
    legend = "".join(
        f'<li data-last="{value}">{key(shades[series["name"]])}<span>{escape(series["name"])}</span> '
        f"<b>{value}</b></li>"
        for series, value in zip(curve["series"], last, strict=True)
    )
    has_values = any(y is not None for line in lines for _, y in line)
    drawing = _drawing(curve, lines, shades, last) if has_values else '<p class="empty">No values were recorded.</p>\n'
    note = f'<p class="note">{escape(curve["note"])}</p>\n' if curve.get("note") else ""
    return (
        f'<figure class="card">\n<figcaption><h3>{escape(curve["title"])}</h3>'
        f'<p class="axis"><span>{escape(curve["ylabel"])}</span><span class="at"></span></p></figcaption>\n'
        f'{drawing}<ul class="legend">{legend}</ul>\n{note}</figure>\n'
    )


def key(shade: str) -> str:
    """A short piece of a line, for legends."""
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><g class="{shade}">' + (
        '<line class="line" x1="1" x2="25" y1="5" y2="5"/></g></svg>'
    )


def thin(line: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points of a line: of each of most/2 stretches the lowest and the highest, in their order, and the
    first and the last point of all. A stretch without any value stays a gap."""
    if len(line) <= most:
        return list(line)
    kept = []
    num_stretches = most // 2 - 1
    inner = line[1:-1]
    for index in range(num_stretches):
        part = inner[index * len(inner) // num_stretches : (index + 1) * len(inner) // num_stretches]
        known = [(y, i) for i, (_, y) in enumerate(part) if y is not None]
        ends = {min(known)[1], max(known)[1]} if known else {0}
        kept += [part[i] for i in sorted(ends)]
    return [line[0], *kept, line[-1]]


def _points(series: Series) -> list[Point]:
    x, y = series["x"], series["y"]
    if len(x) != len(y):
        raise ValueError(f"series {series['name']!r} has {len(x)} x and {len(y)} y values, expected as many")
    known = [(a, b) for a, b in zip(x, y, strict=True) if is_finite(a)]
    return [(float(a), float(b) if b is not None and is_finite(b) else None) for a, b in known]


class _Frame:
    """Where numbers stand in the drawing, and the ticks of both axes."""

    def __init__(self, lines: Sequence[Sequence[Point]]) -> None:
        xs = [x for line in lines for x, y in line if y is not None]
        ys = [y for line in lines for _, y in line if y is not None]
        one = min(xs) == max(xs)
        self.x_low, self.x_high = min(xs) - 0.5 * one, max(xs) + 0.5 * one
        self.y_ticks = ticks(min(ys), max(ys), 5)
        if min(ys) >= 0:
            # Around equal values there are ticks on both sides; what is never negative has none below 0.
            self.y_ticks = [tick for tick in self.y_ticks if tick >= 0]
        self.y_low, self.y_high = min(self.y_ticks[0], min(ys)), max(self.y_ticks[-1], max(ys))
        whole = all(x == int(x) for x in xs)
        self.x_ticks = [
            t for t in ticks(self.x_low, self.x_high, 6) if self.x_low <= t <= self.x_high and not (whole and t % 1)
        ]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _drawing(curve: Curve, lines: list[list[Point]], shades: dict[str, str], last: list[str]) -> str:
    """A grid, axes, and a line for each series with its gaps. page.js reads values off data-x and data-y, which are
    those of the lines' points in their order."""
    frame, percent = _Frame(lines), curve["percent"]
    base = _HEIGHT - _BOTTOM
    values = ", ".join(f"{series['name']} {value}" for series, value in zip(curve["series"], last, strict=True))
    out = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" data-xlabel="{escape(curve["xlabel"])}" '
        f'aria-label="{escape(curve["title"])}, {escape(curve["ylabel"])}, by {escape(curve["xlabel"])}; '
        f'last: {escape(values)}">\n'
    ]
    for tick in frame.y_ticks:
        _, v = frame.place(frame.x_low, tick)
        label = tick_label(tick, frame.y_ticks, percent)
        out.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>'
            f'<text class="y" x="{_LEFT - 8}" y="{v:.1f}" dy="0.35em">{label}</text>\n'
        )
    out.append(f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>\n')
    for tick in frame.x_ticks:
        h, _ = frame.place(tick, frame.y_low)
        out.append(f'<text class="x" x="{h:.1f}" y="{base + 18}">{tick_label(tick, frame.x_ticks, False)}</text>\n')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(f'<text class="x" x="{middle:.0f}" y="{_HEIGHT - 6}">{escape(curve["xlabel"])}</text>\n')
    out.append(f'<line class="cursor" y1="{_TOP}" y2="{base}"/>\n')
    for series, line in zip(curve["series"], lines, strict=True):
        out.append(_line(line, shades[series["name"]], frame, percent))
    return "".join(out) + "</svg>\n"


def _line(line: list[Point], shade: str, frame: _Frame, percent: bool) -> str:
    known = [(x, y) for x, y in line if y is not None]
    numbers = " ".join(number(x, digits=7) for x, _ in known), " ".join(number(y, percent) for _, y in known)
    out = [f'<g class="series {shade}" data-x="{numbers[0]}" data-y="{numbers[1]}">\n']
    stretches = _stretches(line)
    for stretch in stretches:
        path = " ".join(f"{h:.1f},{v:.1f}" for h, v in (frame.place(*point) for point in stretch))
        out.append(f'<polyline class="line" points="{path}"/>\n')
    # A point between two gaps would not be seen.
    dots = known if len(known) <= _MAX_DOTS else [stretch[0] for stretch in stretches if len(stretch) == 1]
    for point in dots:
        h, v = frame.place(*point)
        out.append(f'<circle class="spot" cx="{h:.1f}" cy="{v:.1f}" r="3.2"/>\n')
    return "".join(out) + '<circle class="mark" r="4.6"/>\n</g>\n'


def _stretches(line: list[Point]) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in line:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [part for part in parts if part]


def ticks(low: float, high: float, num: int) -> list[float]:
    """About `num` round values (1, 2 or 5 times a power of ten); the first is <= `low`, the last >= `high`."""
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(tick: float, all_ticks: Sequence[float], percent: bool) -> str:
    """A tick's number with as many decimals as the ticks need; large numbers in thousands (k), millions (M), ..."""
    scale: float = 100 if percent else 1
    step = (all_ticks[1] - all_ticks[0]) * scale if len(all_ticks) > 1 else abs(tick) or 1.0
    largest = max(map(abs, all_ticks)) * scale
    if not percent and (step < 1e-4 or largest >= 1e15):
        return f"{tick:.3g}".replace("-", MINUS)
    suffix = "%" if percent else ""
    if not percent and largest >= 1e4:
        suffix, unit = next((s, u) for s, u in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if largest >= u)
        scale, step = 1 / unit, step / unit
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{tick * scale:.{decimals}f}"
    if float(text) == 0:
        return "0%" if percent else "0"
    return text.replace("-", MINUS) + suffix
