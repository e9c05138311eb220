"""Figures of the ops' results as SVG, with the standard library: one for each question, in light and dark colours.

Bars for each case; and where cases differ in N alone, or in V alone, curves. The same results make the same bytes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from bench.cases import size_of

_WIDTH = 880
_MARGIN, _GAP = 16, 28
_PANEL = (_WIDTH - 2 * _MARGIN - _GAP) / 2
_BAR, _PITCH = 13, 19
_LABELS, _NUMBERS = 178, 50
_CURVES_HEIGHT, _CURVES_LABELS = 290, 230
# Of DejaVu Sans, the widest of the fonts below, at 12 px.
_CHARACTER = 7.3
_MIB = 2**20

_STYLE = """
svg{--back:#fff;--ink:#1c2128;--dim:#57606a;--grid:#d9dde2;--ours:#d55e00;--peer:#8c96a3;--floor:#0062a8}
@media (prefers-color-scheme:dark){svg{--back:#0d1117;--ink:#e6edf3;--dim:#a3adb8;--grid:#30363d;--ours:#ff8f4d;
--peer:#7d8793;--floor:#6cb6ff}}
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--ink)}
.title{font-size:17px;font-weight:600}.case{font-weight:600}.dim{fill:var(--dim)}.mark{fill:var(--floor)}
.number{stroke:var(--back);stroke-width:4px;paint-order:stroke}.us{fill:var(--ours);font-weight:600}.end{text-anchor:end}.mid{text-anchor:middle}
.back{fill:var(--back)}.bar{fill:var(--peer)}.bar.ours{fill:var(--ours)}
.grid{stroke:var(--grid);stroke-width:1}.floor{stroke:var(--floor);stroke-width:1.5;stroke-dasharray:5 3}
.whisker{stroke:var(--ink);stroke-width:1}
.line{fill:none;stroke:var(--peer);stroke-width:1.5}.line.ours{stroke:var(--ours);stroke-width:2.5}
.dot{fill:var(--peer)}.dot.ours{fill:var(--ours)}.lead{stroke:var(--dim);stroke-width:.7}
"""


class Figure(NamedTuple):
    """One question about a file's results: a number for each row, and what it is to be compared with."""

    name: str
    """In the file's name."""
    question: str
    explanation: str
    axis: Callable[[dict[str, Any]], str]
    """Of a measured case: the unit."""
    value: Callable[[dict[str, Any], dict[str, Any]], float | None]
    """Of a measured case and a row; None if it was not measured."""
    mark: Callable[[dict[str, Any]], tuple[float, str] | None]
    """Of a measured case: a value to compare with, and its name."""
    text: Callable[[float], str]
    spread: bool = False
    """Whether bars have whiskers: the quartiles of times."""


def needed_products(case: dict[str, Any]) -> float:
    """How many products of N x D x V a case's results take at least; for given logits, how many copies of them.

    One forward and one for each gradient, of the rows that are not ignored. Given logits are read and their gradient is
    written, which is a copy's traffic.
    """
    if case["task"] == "logits":
        return 1.0
    return (1 if case["task"] == "score" else 2 if case["frozen"] else 3) * (1 - case["masked"])


def _products(measured: dict[str, Any], row: dict[str, Any]) -> float | None:
    return row["median"] / measured["yardstick"]["median"] if "median" in row and "reason" not in row else None


def _time_mark(measured: dict[str, Any]) -> tuple[float, str] | None:
    needed = needed_products(measured["case"])
    if measured["case"]["task"] == "logits":
        return needed, "floor: memory bandwidth, 1 copy"
    return needed, f"floor: {needed:.2g} product{'s' * (needed != 1)}"


def _memory(measured: dict[str, Any], row: dict[str, Any]) -> float | None:
    # Less is not told apart by resident memory, and has no logarithm.
    return max(row["extra_bytes"] / _MIB, 0.5) if "extra_bytes" in row and "reason" not in row else None


def _memory_mark(measured: dict[str, Any]) -> tuple[float, str] | None:
    case = measured["case"]
    size = case["num_rows"] * size_of(case["shape"])[1] * (2 if case["dtype"] == "bf16" else 4) / _MIB
    return size, f"[N, V] once: {size:.0f} MiB"


def _error(measured: dict[str, Any], row: dict[str, Any]) -> float | None:
    errors = [error for error in row.get("errors", {}).values() if error is not None]
    return max(errors) if errors and "reason" not in row else None


def _error_mark(measured: dict[str, Any]) -> tuple[float, str] | None:
    # Values are float32 in either case; gradients have the dtype of the inputs.
    in_bf16 = measured["case"]["dtype"] == "bf16" and measured["case"]["task"] != "score"
    return (2.0**-9, "rounding to bfloat16") if in_bf16 else (2.0**-24, "rounding to float32")


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


FIGURES = [
    Figure(
        "time",
        "How long does a step take?",
        "Median, in multiples of one bare matrix product of the same size (for given logits: of one copy of them); "
        "thin lines across the ends of bars: quartiles. Floor: the products that the results need, at the speed of "
        "PyTorch's bare product; a contender that multiplies faster can be below it.",
        lambda measured: "copies" if measured["case"]["task"] == "logits" else "products",
        _products,
        _time_mark,
        _short,
        spread=True,
    ),
    Figure(
        "memory",
        "How much memory does a step need?",
        "Peak of a step without inputs and gradients, MiB. Dashed: the size of one tensor of all logits.",
        lambda measured: "MiB",
        _memory,
        _memory_mark,
        lambda value: f"{value:.0f}" if value >= 0.95 else "<1",
    ),
    Figure(
        "error",
        "How exact are the results?",
        "Largest error of values or gradients against float64, relative to the largest value. Dashed: what rounding "
        "the exact result to its dtype may cost.",
        lambda measured: "relative error",
        _error,
        _error_mark,
        lambda value: f"{value:.1e}".replace("e-0", "e-"),
    ),
]


def figures(result: dict[str, Any]) -> dict[str, str]:
    """SVG by name (``time``, ``memory``, ``error``, each also ``..._over_N`` and ``..._over_V``), as far as the result
    has cases for it."""
    drawn = {}
    for figure in FIGURES:
        cases = [m for m in result["cases"] if any(figure.value(m, row) is not None for row in m["rows"])]
        swept = [(axis, group) for axis in "NV" for group in sweeps(cases, axis)]
        in_curves = {measured["name"] for _, group in swept for measured in group}
        single = [measured for measured in cases if measured["name"] not in in_curves]
        if single:
            panels = [_bars(figure, measured) for measured in _in_pairs(single)]
            drawn[figure.name] = _page(figure, panels, figure.question, columns=2)
        for axis in "NV":
            panels = [_curves(figure, group, axis) for named, group in swept if named == axis]
            if panels:
                title = f"{figure.question.removesuffix('?')}, over {axis}?"
                drawn[f"{figure.name}_over_{axis}"] = _page(figure, panels, title, columns=1)
    return drawn


def _in_pairs(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases that were measured in both dtypes first, these beside each other."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for measured in cases:
        groups.setdefault(tuple(v for k, v in measured["case"].items() if k != "dtype"), []).append(measured)
    return [measured for group in sorted(groups.values(), key=len, reverse=True) for measured in group]


def _sizes(measured: dict[str, Any]) -> dict[str, int]:
    num_features, num_columns = size_of(measured["case"]["shape"])
    return {"N": measured["case"]["num_rows"], "D": num_features, "V": num_columns}


def sweeps(cases: Iterable[dict[str, Any]], axis: str) -> list[list[dict[str, Any]]]:
    """Groups of at least three cases that differ in ``axis`` (N or V) alone, in the order of its sizes."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for measured in cases:
        case = measured["case"]
        fixed = tuple(size for name, size in _sizes(measured).items() if name != axis)
        key = (*fixed, case["dtype"], case["task"], case["masked"], case["frozen"])
        groups.setdefault(key, []).append(measured)
    return [sorted(group, key=lambda m: _sizes(m)[axis]) for group in groups.values() if len(group) >= 3]


class _Panel(NamedTuple):
    height: float
    parts: list[str]
    """SVG, from the panel's upper left corner."""


def _page(figure: Figure, panels: Sequence[_Panel], title: str, columns: int) -> str:
    """The figure with its title and explanation, and its panels in rows of ``columns``."""
    lines = _wrapped(figure.explanation, 118)
    top = 40 + 17 * len(lines) + 22
    body, y = [], top + 8.0
    for i in range(0, len(panels), columns):
        row = panels[i : i + columns]
        for j, panel in enumerate(row):
            body.append(f'<g transform="translate({_MARGIN + j * (_PANEL + _GAP):.0f} {y:.0f})">')
            body += [*panel.parts, "</g>"]
        y += max(panel.height for panel in row) + 22
    height = round(y)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
        f' role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" width="{_WIDTH}" height="{height}"/>',
        _text(_MARGIN, 28, title, "title"),
        *(_text(_MARGIN, 50 + 17 * i, line, "dim") for i, line in enumerate(lines)),
        f'<rect class="bar ours" x="{_MARGIN}" y="{top - 19}" width="12" height="12"/>',
        _text(_MARGIN + 18, top - 8, "ours", "us"),
        f'<rect class="bar" x="{_MARGIN + 66}" y="{top - 19}" width="12" height="12"/>',
        _text(_MARGIN + 84, top - 8, "others", "dim"),
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}>{escape(text)}</text>'


def _line(x: float, y: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


class _Axis(NamedTuple):
    """Where a value lies between ``start`` and ``end``, in pixels: by its logarithm if values span a decade."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def at(self, value: float) -> float:
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        if not self.log:
            power = 10.0 ** math.floor(math.log10(self.high))
            step = next(power * n for n in (0.1, 0.2, 0.5, 1, 2) if self.high / (power * n) < 5.5)
            return [i * step for i in range(math.floor(self.high / step + 1e-9) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if self.high / self.low < 150 else (1,)
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if self.low <= tick * (1 + 1e-9) <= self.high * (1 + 2e-9)]
        return ticks[:: math.ceil(len(ticks) / 8)]


def _axis(values: Iterable[float], start: float, end: float, from_zero: bool = True) -> _Axis:
    values = [value for value in values if value > 0]
    low, high = min(values), max(values)
    if high / low >= 10:
        # Half a decade below the lowest, so that its bar can be seen.
        return _Axis(low / 1.6, high * 1.05, True, start, end)
    return _Axis(0.0 if from_zero else low, high * 1.05, False, start, end)


def _tick_text(value: float) -> str:
    if value == 0 or 0.01 <= value < 1e4:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _bars(figure: Figure, measured: dict[str, Any]) -> _Panel:
    """One case: a bar with its number for each contender that was measured, the smallest first."""
    rows = [(value, row) for row in measured["rows"] if (value := figure.value(measured, row)) is not None]
    rows.sort(key=lambda pair: pair[0])
    mark = figure.mark(measured)
    scale = measured["yardstick"]["median"] if figure.spread else 1.0
    shown = [value for value, _ in rows] + ([mark[0]] if mark else [])
    axis = _axis(shown, _LABELS, _PANEL - _NUMBERS)
    top, bottom = 54, 54 + _PITCH * len(rows)
    parts, numbers = _heading(measured), []
    for tick in axis.ticks():
        parts.append(_line(axis.at(tick), top - 2, axis.at(tick), bottom + 2, "grid"))
        parts.append(_text(axis.at(tick), bottom + 16, _tick_text(tick), "dim mid"))
    log = ", log scale" * axis.log
    parts.append(_text((axis.start + axis.end) / 2, bottom + 31, figure.axis(measured) + log, "dim mid"))
    if mark:
        x = axis.at(mark[0])
        half = len(mark[1]) * _CHARACTER / 2
        parts.append(_text(min(max(x, half), _PANEL - half), top - 8, mark[1], "mark mid"))
    for i, (value, row) in enumerate(rows):
        y = top + _PITCH * i + (_PITCH - _BAR) / 2
        kind = " ours" * row["ours"]
        parts.append(_text(_LABELS - 8, y + 11, row["contender"], "us end" if row["ours"] else "end"))
        width = max(axis.at(value) - _LABELS, 1.5)
        parts.append(f'<rect class="bar{kind}" x="{_LABELS}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}"/>')
        end = axis.at(value)
        if figure.spread:
            low, high = (max(row[key] / scale, axis.low) for key in ("low", "high"))
            end = max(end, axis.at(high))
            parts.append(_line(axis.at(low), y + _BAR / 2, axis.at(high), y + _BAR / 2, "whisker"))
        numbers.append(_text(end + 5, y + 11, figure.text(value), "number" + " us" * row["ours"]))
    if mark:
        parts.append(_line(axis.at(mark[0]), top - 4, axis.at(mark[0]), bottom + 2, "floor"))
    return _Panel(bottom + 36, parts + numbers)


def _heading(measured: dict[str, Any], without: str = "") -> list[str]:
    case = measured["case"]
    sizes = ", ".join(f"{name} = {size}" for name, size in _sizes(measured).items() if name != without)
    model = "" if "x" in case["shape"] or without == "V" else f"{case['shape']}: "
    varied = ", ".join([f"{case['masked']:.0%} masked"] * (case["masked"] > 0) + ["frozen head"] * case["frozen"])
    title = f"{case['task']}, {case['dtype']}" + f", {varied}" * bool(varied)
    return [_text(0, 12, title, "case"), _text(0, 28, model + sizes, "dim")]


def _curves(figure: Figure, group: list[dict[str, Any]], axis_name: str) -> _Panel:
    """Cases that differ in N or V alone: a line for each contender, with its name at the end, and the mark's."""
    lines: dict[str, list[tuple[float, float]]] = {}
    ours = {row["contender"] for measured in group for row in measured["rows"] if row["ours"]}
    marks = []
    for measured in group:
        size = float(_sizes(measured)[axis_name])
        for row in measured["rows"]:
            if (value := figure.value(measured, row)) is not None:
                lines.setdefault(row["contender"], []).append((size, value))
        if mark := figure.mark(measured):
            marks.append((size, mark[0], mark[1]))
    top, bottom = 46, _CURVES_HEIGHT
    left, right = 52, _WIDTH - 2 * _MARGIN - _CURVES_LABELS
    sizes = [size for line in lines.values() for size, _ in line]
    across = _Axis(min(sizes), max(sizes), True, left, right)
    up = _axis([value for line in lines.values() for _, value in line] + [m[1] for m in marks], bottom, top)
    parts = _heading(group[0], axis_name)
    for tick in up.ticks():
        parts.append(_line(left, up.at(tick), right, up.at(tick), "grid"))
        parts.append(_text(left - 6, up.at(tick) + 4, _tick_text(tick), "dim end"))
    shown = sorted(set(sizes))
    for size in shown[:: math.ceil(len(shown) / 5)]:
        parts.append(_line(across.at(size), bottom, across.at(size), bottom + 4, "grid"))
        parts.append(_text(across.at(size), bottom + 17, f"{size:.0f}", "dim mid"))
    unit = figure.axis(group[0]) + ", log scale" * up.log
    parts.append(_text((left + right) / 2, bottom + 32, f"{axis_name} (log scale); upwards: {unit}", "dim mid"))
    ends = []
    for name, line in sorted(lines.items(), key=lambda item: item[0] in ours):
        kind = " ours" * (name in ours)
        points = [(across.at(size), up.at(value)) for size, value in line]
        parts.append(f'<polyline class="line{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        parts += [f'<circle class="dot{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        number = figure.text(line[-1][1])
        ends.append((*points[-1], f"{name} {number}", "us" if name in ours else ""))
    if marks:
        points = [(across.at(size), up.at(value)) for size, value, _ in marks]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="floor" fill="none" points="{path}"/>')
        ends.append((*points[-1], marks[-1][2], "mark"))
    return _Panel(bottom + 36, parts + _end_labels(ends, right, top, bottom))


def _end_labels(ends: list[tuple[float, float, str, str]], right: float, top: float, bottom: float) -> list[str]:
    """Names beside the ends of lines, moved apart so that none overlaps another."""
    ends = sorted(ends, key=lambda end: end[1])
    pitch = min(15.0, (bottom + 10 - top) / max(len(ends) - 1, 1))
    places: list[float] = []
    for _, y, _, _ in ends:
        places.append(max(y, places[-1] + pitch) if places else y)
    # Back up from the bottom, if the last ones were pushed below it.
    for i in reversed(range(len(places))):
        limit = bottom + 10 if i == len(places) - 1 else places[i + 1] - pitch
        places[i] = min(places[i], limit)
    parts = []
    for (x, y, text, kind), place in zip(ends, places, strict=True):
        parts.append(_line(x + 4, y, right + 12, place, "lead"))
        parts.append(_text(right + 15, place + 4, text, kind))
    return parts
