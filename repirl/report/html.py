"""A run as one self-contained HTML page: figures, learning curves, and solutions coloured token by token.

The file contains its styles, drawings and a short script, and loads nothing from elsewhere. The page follows the
reader's light or dark setting. The same report always gives the same bytes.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict


class ComparisonTable(TypedDict):
    """The final table. Every row has a cell for every column; the first cell of a row is its name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


class Series(TypedDict):
    """One line of a chart. x and y have the same length; where y is None or not finite, the line has a gap."""

    name: str
    x: list[float]
    y: list[float | None]


class Curve(TypedDict):
    """One chart. percent: y is a share in [0, 1], shown in percent."""

    title: str
    xlabel: str
    ylabel: str
    series: list[Series]
    percent: bool


class Variant(TypedDict):
    """One model's view of a solution: a reward for every token.

    Tokens before response_start belong to the prompt and are not coloured. error_span: a known
    error, as the index of its first token and the index after its last one.
    """

    name: str
    tokens: list[str]
    rewards: list[float]
    error_span: list[int] | None
    response_start: int


class Sample(TypedDict):
    """One solution. correct: whether it is right; None if that is unknown."""

    title: str
    prompt: str
    note: str
    variants: list[Variant]
    correct: bool | None


class Report(TypedDict):
    """The content of a page. configuration: YAML. All texts are plain text; they are escaped here."""

    title: str
    subtitle: str
    configuration: str
    environment: dict[str, str]
    table: ComparisonTable
    notes: list[str]
    curves: list[Curve]
    samples: list[Sample]


# Okabe and Ito's palette (2008): colour-blind readers can tell the colours apart. Brighter versions for dark pages.
_SERIES_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0548a", "#a87400", "#2a9bd6", "#55585f")
_SERIES_DARK = ("#58b0ea", "#ff8f4d", "#2fc79b", "#e69ac5", "#f0c14b", "#93d3f5", "#b4b8c0")
# Reward colours from low over middle to high: vermilion and blue differ for colour-blind readers too.
_REWARD_LIGHT = ("#c43c06", "#f3f4f6", "#0f62ab")
_REWARD_DARK = ("#ff7f45", "#242a35", "#5cb0f5")
# Black or white text: the better of the two has a contrast of at least 4.58 with any shade.
_INKS = ("#000000", "#ffffff")
_LEVELS = 7
_WIDTH, _HEIGHT = 520, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 46
_MINUS = "\u2212"


def write_report(path: str | os.PathLike, report: Report) -> None:
    """Write the page as UTF-8. An old page stays until the new one is complete.

    Raises:
        ValueError: a part of the report is missing, or lists that belong together differ in length.
    """
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(render(report), encoding="utf-8", newline="\n")
    temporary.replace(target)


def render(report: Report) -> str:
    """The page's text. Raises ValueError as `write_report` does."""
    missing = sorted(Report.__annotations__.keys() - report.keys())
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}; repirl.report.html.Report says what it holds")
    # A name has the same colour everywhere on the page.
    names = dict.fromkeys(series["name"] for curve in report["curves"] for series in curve["series"])
    shades = {name: f"s{index % len(_SERIES_LIGHT)}" for index, name in enumerate(names)}
    parts = [
        _header(report),
        _tiles(report["curves"], shades),
        _table(report["table"], report["notes"]),
        _curves(report["curves"], shades),
        _samples(report["samples"]),
        _details(report),
    ]
    title = _escape(report["title"])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Tell the browser that the page must not load anything.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n"
        + "".join(part for part in parts if part)
        + f"</main>\n<script>\n{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def reward_scale(rewards: Iterable[float]) -> tuple[float, float]:
    """The centre of a colour scale (the median) and its spread (the 99th percentile of the distance from it).

    A few extreme tokens do not make the others pale: they get the last colour. Values that are not finite are ignored.
    """
    values = sorted(r for r in rewards if _finite(r))
    if not values:
        return 0.0, 1.0
    centre = _quantile(values, 0.5)
    distances = sorted(abs(v - centre) for v in values)
    return centre, _quantile(distances, 0.99) or distances[-1] or 1.0


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours #rrggbb, from 1 to 21, as WCAG 2 defines it."""
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def reward_colours(dark: bool = False) -> list[tuple[int, str, str]]:
    """(level, background, text colour) of every shade, from the lowest reward to the highest."""
    low, middle, high = _REWARD_DARK if dark else _REWARD_LIGHT
    shades = []
    for level in range(-_LEVELS, _LEVELS + 1):
        background = _mix(middle, high if level > 0 else low, (abs(level) / _LEVELS) ** 0.85)
        shades.append((level, background, max(_INKS, key=lambda ink: contrast(ink, background))))
    return shades


def _header(report: Report) -> str:
    return (
        f"<header>\n<h1>{_escape(report['title'])}</h1>\n"
        f'<p class="subtitle">{_escape(report["subtitle"])}</p>\n</header>\n'
    )


def _tiles(curves: Sequence[Curve], shades: dict[str, str]) -> str:
    """The first percent chart as large numbers: the last value of each series, and its difference to the first one."""
    curve = next((c for c in curves if c["percent"]), None)
    if curve is None:
        return ""
    tiles = []
    for series in curve["series"]:
        shade = shades[series["name"]]
        values = [y for y in series["y"] if y is not None and math.isfinite(y)]
        if not values:
            continue
        points = 100 * (values[-1] - values[0])
        kind = "up" if points > 0 else "down" if points < 0 else "same"
        change = f"{'+' if points >= 0 else _MINUS}{abs(points):.1f} points"
        tiles.append(
            f'<li class="{shade}"><span class="tile-name">{_escape(series["name"])}</span>'
            f'<span class="tile-value">{_number(values[-1], True)}</span>'
            f'<span class="tile-change {kind}">{change} from {_number(values[0], True)}</span></li>\n'
        )
    if not tiles:
        return ""
    label = _escape(curve["title"])
    listed = "".join(tiles)
    return (
        f'<section aria-label="{label}">\n<p class="eyebrow">{label}</p>\n'
        f'<ul class="tiles">\n{listed}</ul>\n</section>\n'
    )


def _table(table: ComparisonTable, notes: Sequence[str]) -> str:
    columns = table["columns"]
    for row in table["rows"]:
        if len(row) != len(columns):
            raise ValueError(f"table row {row!r} has {len(row)} cells, expected {len(columns)}: {columns}")
    head = "".join(f'<th scope="col">{_escape(c)}</th>' for c in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{_cell(cell)}</th>' if i == 0 else f"<td>{_cell(cell)}</td>" for i, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in table["rows"]
    )
    listed = "".join(f"<li>{_escape(note)}</li>\n" for note in notes)
    return (
        "<section>\n<h2>Results</h2>\n"
        f'<div class="card scroll" tabindex="0" role="region" aria-label="Results"><table>\n<thead><tr>{head}</tr>'
        f"</thead>\n<tbody>\n{body}</tbody>\n</table></div>\n"
        + (f'<ul class="notes">\n{listed}</ul>\n' if listed else "")
        + "</section>\n"
    )


def _curves(curves: Sequence[Curve], shades: dict[str, str]) -> str:
    figures = "".join(_figure(curve, shades) for curve in curves)
    return f'<section>\n<h2>Learning curves</h2>\n<div class="grid">\n{figures}</div>\n</section>\n' if figures else ""


def _figure(curve: Curve, shades: dict[str, str]) -> str:
    points = [_points(series) for series in curve["series"]]
    finite = [p for line in points for p in line if p[1] is not None]
    legend = []
    for index, (series, line) in enumerate(zip(curve["series"], points, strict=True)):
        last = next((y for _, y in reversed(line) if y is not None), None)
        shown = "no values" if last is None else _number(last, curve["percent"])
        legend.append(
            f'<li data-series="{index}" data-last="{shown}">{_key(shades[series["name"]])}'
            f"{_escape(series['name'])} <b>{shown}</b></li>"
        )
    drawing = _drawing(curve, points, shades) if finite else '<p class="empty">No values were recorded.</p>\n'
    return (
        f'<figure class="card">\n<figcaption><h3>{_escape(curve["title"])}</h3>'
        f'<p class="axis">{_escape(curve["ylabel"])}<span class="at"></span></p></figcaption>\n'
        f'{drawing}<ul class="legend">{"".join(legend)}</ul>\n</figure>\n'
    )


def _points(series: Series) -> list[tuple[float, float | None]]:
    x, y = series["x"], series["y"]
    if len(x) != len(y):
        raise ValueError(f"series {series['name']!r} has {len(x)} x and {len(y)} y values, expected as many")
    known = [(a, b) for a, b in zip(x, y, strict=True) if _finite(a)]
    return [(float(a), float(b) if b is not None and _finite(b) else None) for a, b in known]


def _drawing(curve: Curve, points: list[list[tuple[float, float | None]]], shades: dict[str, str]) -> str:
    """The chart as SVG: a grid, axes, a line for each series with its gaps, and a dot with its value for each point."""
    xs = [x for line in points for x, y in line if y is not None]
    ys = [y for line in points for _, y in line if y is not None]
    percent = curve["percent"]
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (min(xs) - 0.5, max(xs) + 0.5)
    y_ticks = _ticks(min(ys), max(ys), 5)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    x_ticks = [t for t in _ticks(x_low, x_high, 6) if x_low <= t <= x_high]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_escape(curve["title"])} by '
        f'{_escape(curve["xlabel"])}">\n'
    ]
    for tick in y_ticks:
        _, v = place(x_low, tick)
        label = _tick_label(tick, y_ticks, percent)
        out.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>'
            f'<text class="y" x="{_LEFT - 8}" y="{v:.1f}" dy="0.35em">{label}</text>\n'
        )
    base = _HEIGHT - _BOTTOM
    out.append(f'<line class="base" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>\n')
    for tick in x_ticks:
        h, _ = place(tick, y_low)
        out.append(f'<text class="x" x="{h:.1f}" y="{base + 18}">{_tick_label(tick, x_ticks, False)}</text>\n')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(f'<text class="x" x="{middle:.0f}" y="{_HEIGHT - 6}">{_escape(curve["xlabel"])}</text>\n')
    out.append(f'<line class="cursor" y1="{_TOP}" y2="{base}"/>\n')
    for index, (series, line) in enumerate(zip(curve["series"], points, strict=True)):
        out.append(f'<g class="{shades[series["name"]]}" data-series="{index}">\n')
        for run in _runs(line):
            path = " ".join(f"{h:.1f},{v:.1f}" for h, v in (place(*point) for point in run))
            out.append(f'<polyline class="line" points="{path}"/>\n')
        spots = [(x, y) for x, y in line if y is not None]
        # In a line with many points, dots would hide the line.
        crowded = " quiet" if len(spots) > 25 else ""
        for x, y in spots[:: math.ceil(len(spots) / 400)] if spots else []:
            h, v = place(x, y)
            value = _number(y, percent)
            name = _escape(series["name"])
            out.append(
                f'<circle class="spot{crowded}" cx="{h:.1f}" cy="{v:.1f}" r="3.2" data-x="{_number(x)}" '
                f'data-y="{value}"><title>{name}, {_escape(curve["xlabel"])} {_number(x)}: {value}</title></circle>\n'
            )
        out.append("</g>\n")
    out.append("</svg>\n")
    return "".join(out)


def _runs(line: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The stretches between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in line:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _key(shade: str) -> str:
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true"><g class="{shade}">' + (
        '<line class="line" x1="1" x2="25" y1="5" y2="5"/><circle class="spot" cx="13" cy="5" r="3.4"/></g></svg>'
    )


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    pooled: dict[str, list[float]] = {}
    for sample in samples:
        for variant in sample["variants"]:
            num_tokens, num_rewards = len(variant["tokens"]), len(variant["rewards"])
            if num_tokens != num_rewards:
                raise ValueError(
                    f"{variant['name']!r} of sample {sample['title']!r} has {num_tokens} tokens and {num_rewards} "
                    "rewards, expected one reward a token"
                )
            pooled.setdefault(variant["name"], []).extend(variant["rewards"][variant["response_start"] :])
    scales = {name: reward_scale(rewards) for name, rewards in pooled.items()}
    ramp = "".join(f'<i class="{_level_class(level)}"></i>' for level in range(-_LEVELS, _LEVELS + 1))
    legend = "".join(
        f'<li><span class="who">{_escape(name)}</span>'
        f'<span class="ends">{_number(centre - spread, digits=3)} or less</span>'
        f'<span class="ramp">{ramp}</span><span class="ends">{_number(centre + spread, digits=3)} or more</span></li>\n'
        for name, (centre, spread) in scales.items()
    )
    cards = "".join(_sample(sample, scales) for sample in samples)
    return (
        "<section>\n<h2>Token rewards</h2>\n"
        '<p class="lead">Every token in the colour of its reward: <b class="tone low">low</b> to '
        '<b class="tone high">high</b>, plain at the median. <u class="err">Underlined</u>: the error that was '
        "planted. Point at a token, or tap it, for its value. "
        "Each scale spans 99% of that model\u2019s rewards here.</p>\n"
        f'<ul class="scales">\n{legend}</ul>\n{cards}</section>\n'
    )


def _sample(sample: Sample, scales: dict[str, tuple[float, float]]) -> str:
    badge = ""
    if sample["correct"] is not None:
        kind, text = ("good", "\u2713 right") if sample["correct"] else ("bad", "\u2717 wrong")
        badge = f'<span class="badge {kind}">{text}</span>'
    title = f"<h3>{_escape(sample['title'])}</h3>" if sample["title"] != sample["prompt"] else ""
    prompt = f'<p class="prompt">{_escape(sample["prompt"])}</p>' if sample["prompt"] else ""
    variants = "".join(_variant(variant, scales[variant["name"]]) for variant in sample["variants"])
    return (
        f'<article class="card sample">\n<div class="sample-head">{title}{prompt}{badge}</div>\n'
        f'<p class="note">{_escape(sample["note"])}</p>\n{variants}</article>\n'
    )


def _variant(variant: Variant, scale: tuple[float, float]) -> str:
    start, span = variant["response_start"], variant["error_span"]
    tokens, rewards = variant["tokens"], variant["rewards"]
    out, inside = [], False
    for index, (token, reward) in enumerate(zip(tokens, rewards, strict=True)):
        if span and index == span[0] and span[0] < span[1]:
            out.append('<u class="err">')
            inside = True
        out.append(f'<span class="t p">{_visible(token)}</span>' if index < start else _token(token, reward, scale))
        if inside and span and (index == span[1] - 1 or index == len(tokens) - 1):
            out.append("</u>")
            inside = False
    return (
        f'<div class="variant"><p class="variant-head"><span class="who">{_escape(variant["name"])}</span>'
        f'{_lowest(variant)}<output class="read"></output></p>\n<div class="tokens">{"".join(out)}</div></div>\n'
    )


def _lowest(variant: Variant) -> str:
    """The text about the token with the lowest reward, and whether it is in the known error."""
    known = [(r, i) for i, r in enumerate(variant["rewards"]) if i >= variant["response_start"] and _finite(r)]
    if not known:
        return ""
    reward, index = min(known)
    token, span = _visible(variant["tokens"][index]), variant["error_span"]
    text = f"lowest: <code>{token}</code> {_number(reward, digits=3)}"
    if span is None:
        return f'<span class="lowest">{text}</span>'
    if span[0] <= index < span[1]:
        return f'<span class="lowest in-error">{text}, \u2713 the planted error</span>'
    return f'<span class="lowest">{text}, not the planted error</span>'


def _token(token: str, reward: float, scale: tuple[float, float]) -> str:
    label = _escape(token.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7"))
    value = _number(reward)
    if not _finite(reward):
        kind = "qn"
    else:
        centre, spread = scale
        position = max(-1.0, min(1.0, (reward - centre) / spread))
        kind = _level_class(round(position * _LEVELS))
    return f'<span class="t {kind}" title="{label}  {value}">{_visible(token)}</span>'


def _details(report: Report) -> str:
    pairs = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>\n"
        for name, value in report["environment"].items()
    )
    lines = "\n".join(_yaml_line(line) for line in report["configuration"].splitlines())
    return (
        "<section>\n<h2>How it was made</h2>\n"
        + (f'<dl class="card facts">\n{pairs}</dl>\n' if pairs else "")
        + (f"<details>\n<summary>Configuration</summary>\n<pre>{lines}</pre>\n</details>\n" if lines else "")
        + "</section>\n"
    )


def _yaml_line(line: str) -> str:
    key = re.match(r"(\s*(?:- )?)([\w.\-]+)(:)(?=\s|$)", line)
    if line.lstrip().startswith("#"):
        return f'<span class="c">{_escape(line)}</span>'
    if key is None:
        return _escape(line)
    return f'{key[1]}<span class="k">{_escape(key[2])}</span>:{_escape(line[key.end() :])}'


def _escape(value: object) -> str:
    """Escape a text for HTML, also inside quotes. Control characters become visible symbols, lone surrogates "?"."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return html.escape(text, quote=True)


def _visible(token: str) -> str:
    """Escape a token, and add pale signs for white space. Text that a reader copies does not contain these signs."""
    if token == "":
        return '<i class="w none"></i>'
    signs = {" ": '<i class="w"> </i>', "\n": '<i class="w nl">\n</i>', "\t": '<i class="w tab">\t</i>'}
    return "".join(signs.get(part) or _escape(part) for part in re.split(r"([ \n\t])", token))


def _cell(cell: str | float) -> str:
    return _escape(cell) if isinstance(cell, str) else _number(cell)


def _number(value: float, percent: bool = False, digits: int = 4) -> str:
    """Significant digits, or percent with one decimal; a real minus sign."""
    if not _finite(value):
        return "n/a" if value is None else str(float(value)).replace("-", _MINUS)
    if percent:
        return f"{100 * value:.1f}%".replace("-", _MINUS)
    text = f"{value:.0f}" if abs(value) >= 1e4 and abs(value) < 1e9 else f"{value:.{digits}g}"
    return ("0" if float(text) == 0 else text).replace("-", _MINUS)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _ticks(low: float, high: float, num: int) -> list[float]:
    """About `num` round values (1, 2 or 5 times a power of ten); the first is <= `low`, the last >= `high`."""
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / num
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_label(tick: float, ticks: Sequence[float], percent: bool) -> str:
    scale = 100 if percent else 1
    step = (ticks[1] - ticks[0]) * scale if len(ticks) > 1 else abs(tick) or 1.0
    if not percent and (step < 1e-4 or max(map(abs, ticks)) >= 1e6):
        return f"{tick:.2g}".replace("-", _MINUS)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{tick * scale:.{decimals}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", _MINUS) + ("%" if percent else "")


def _quantile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    index = math.floor(position)
    following = ordered[min(index + 1, len(ordered) - 1)]
    return ordered[index] + (position - index) * (following - ordered[index])


def _level_class(level: int) -> str:
    return f"q{'m' if level < 0 else 'p' if level > 0 else ''}{abs(level)}"


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _mix(first: str, second: str, share: float) -> str:
    pairs = zip(_channels(first), _channels(second), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _luminance(colour: str) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _style() -> str:
    def colours(dark: bool) -> str:
        series = "".join(f"--s{i}:{c};" for i, c in enumerate(_SERIES_DARK if dark else _SERIES_LIGHT))
        shades = "".join(
            f"--{_level_class(level)}:{back};--{_level_class(level)}-ink:{ink};"
            for level, back, ink in reward_colours(dark)
        )
        return f"{series}\n{shades}"

    classes = "".join(f".s{i}{{--line:var(--s{i})}}\n" for i in range(len(_SERIES_LIGHT)))
    for level, _, _ in reward_colours():
        name = _level_class(level)
        classes += f".{name}{{background:var(--{name});color:var(--{name}-ink)}}\n"
    dark = f"@media (prefers-color-scheme:dark){{:root{{{_DARK}\n{colours(True)}}}}}\n"
    return f":root{{{_LIGHT}\n{colours(False)}}}\n{dark}{_RULES}{classes}"


_LIGHT = """color-scheme:light dark;
--mono:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f6f7f9;--card:#ffffff;--ink:#14171d;--soft:#5b6370;--edge:#e1e4ea;--rule:#e9ebf0;
--good:#0a7a52;--good-back:#e0f5ec;--bad:#b23405;--bad-back:#fdeae1;--wash:#e8f1fa;"""

_DARK = """
--page:#0f1218;--card:#171b23;--ink:#e9ecf2;--soft:#9aa3b2;--edge:#2a303c;--rule:#252b36;
--good:#4fd6a6;--good-back:#12352b;--bad:#ff9c6b;--bad-back:#41210f;--wash:#16263a;"""

_RULES = """*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:linear-gradient(var(--wash),var(--page) 340px) no-repeat var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:44px 24px 72px}
h1{font-size:clamp(28px,5vw,42px);line-height:1.12;letter-spacing:-.022em;margin:0}
h2{font-size:22px;letter-spacing:-.012em;margin:0 0 14px}
h3{font-size:16px;margin:0}
section{margin-top:44px}
.subtitle{font-size:18px;color:var(--soft);margin:10px 0 0;max-width:46em}
.eyebrow{margin:-8px 0 10px;color:var(--soft);font-size:14px}
.card{background:var(--card);border:1px solid var(--edge);border-radius:14px;margin:0}
.tiles{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:0;padding:0}
.tiles li{background:var(--card);border:1px solid var(--edge);border-radius:14px;border-top:4px solid var(--line);
padding:14px 18px 16px;display:flex;flex-direction:column}
.tile-name{font-weight:600}
.tile-value{font-size:38px;font-weight:700;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile-change{font-size:14px;color:var(--soft)}
.tile-change.up{color:var(--good)}.tile-change.down{color:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:11px 14px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{font-size:13px;font-weight:600;color:var(--soft)}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);padding-left:18px}
tbody th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
.notes{color:var(--soft);font-size:14px;margin:14px 0 0;padding-left:20px;max-width:76em}
.notes li{margin:5px 0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
figure{padding:16px 18px 14px;min-width:0}
.axis{margin:1px 0 8px;color:var(--soft);font-size:13.5px;display:flex;justify-content:space-between;gap:12px}
.at{color:var(--ink);font-weight:600;white-space:nowrap}
.empty{color:var(--soft);padding:48px 0;text-align:center}
figure>svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font-size:12.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
.x{text-anchor:middle}.y{text-anchor:end}
.rule{stroke:var(--rule)}.base{stroke:var(--soft);stroke-opacity:.6}
.cursor{stroke:var(--soft);stroke-dasharray:3 3;visibility:hidden}
.line{fill:none;stroke:var(--line);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.s1 .line{stroke-dasharray:8 3.5}.s2 .line{stroke-dasharray:2 4}.s3 .line{stroke-dasharray:10 3 2 3}
.spot{fill:var(--line);stroke:var(--card);stroke-width:1.2}
.s1 .line,.s2 .line,.s3 .line{stroke-width:2.4}
.quiet{opacity:0}.spot.on{opacity:1;stroke:var(--ink);stroke-width:1.6}
.legend{list-style:none;margin:8px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:4px 20px;font-size:14px}
.legend b{font-variant-numeric:tabular-nums}
.key{width:26px;height:10px;margin-right:7px}
.lead{color:var(--soft);max-width:62em;margin:0 0 14px}
.tone{padding:0 7px;border-radius:4px}
.tone.low{background:var(--qm7);color:var(--qm7-ink)}.tone.high{background:var(--qp7);color:var(--qp7-ink)}
.scales{list-style:none;margin:0 0 16px;padding:0;display:grid;
grid-template-columns:max-content max-content minmax(90px,220px) max-content;gap:6px 12px;
font-size:13.5px;align-items:center}
.scales li{display:contents}
.ends{color:var(--soft);font-variant-numeric:tabular-nums}
.ends:nth-child(2){text-align:right}
.ramp{display:flex;height:12px;border-radius:6px;overflow:hidden;border:1px solid var(--edge)}
.ramp i{flex:1}
.who{font-weight:600}
.sample{padding:16px 18px 18px;margin-bottom:14px}
.sample-head{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:center}
.prompt{font:600 17px/1.5 var(--mono);margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
h3+.prompt{flex-basis:100%;font-weight:400;font-size:15px}
.badge{font-size:13px;font-weight:600;border-radius:99px;padding:2px 11px}
.good{color:var(--good);background:var(--good-back)}.bad{color:var(--bad);background:var(--bad-back)}
.note{margin:2px 0 0;color:var(--soft);font-size:14px}
.variant{margin-top:14px}
.variant-head{margin:0 0 5px;font-size:14px;display:flex;flex-wrap:wrap;gap:0 14px;align-items:baseline}
.lowest{color:var(--soft);font-variant-numeric:tabular-nums}
.lowest.in-error{color:var(--good)}
.lowest code{font-family:var(--mono);background:var(--q0);color:var(--q0-ink);
padding:1px 5px;border-radius:4px}
.read{margin-left:auto;font-weight:600;font-variant-numeric:tabular-nums}
.tokens{tab-size:4;font:16px/2.05 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
.t{display:inline;padding:4px 4px;border-radius:4px;margin-right:2px;
-webkit-box-decoration-break:clone;box-decoration-break:clone;cursor:default}
.t.on{outline:2px solid var(--ink);outline-offset:1px}
.p{color:var(--soft)}
.qn{color:var(--ink);
background:repeating-linear-gradient(45deg,var(--q0),var(--q0) 4px,var(--edge) 4px,var(--edge) 8px)}
.err{text-decoration:none;border-bottom:3px solid var(--ink);padding-bottom:6px;margin-right:2px}
.lead .err{padding-bottom:0}
.tokens .err .t:last-child{margin-right:0}
.w{font-style:normal;position:relative}
.w::before{content:"\\00b7";position:absolute;left:0;width:100%;text-align:center;opacity:.5}
.w.nl::before{content:"\\21b5";position:static}
.w.tab::before{content:"\\21e5"}
.w.none::before{content:"\\2205";position:static}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px 22px;padding:18px}
dt{color:var(--soft);font-size:13px}dd{margin:0;overflow-wrap:anywhere}
details{background:var(--card);border:1px solid var(--edge);border-radius:14px;margin-top:14px}
summary{cursor:pointer;padding:13px 18px;font-weight:600}
pre{margin:0;padding:4px 18px 18px;overflow-x:auto;font:13.5px/1.6 var(--mono)}
.k{color:var(--s0)}.c{color:var(--soft)}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media (max-width:620px){main{padding:28px 16px 48px}section{margin-top:34px}svg text{font-size:16px}
.subtitle{font-size:16px}.tiles{grid-template-columns:1fr}
.tiles li{display:grid;grid-template-columns:1fr auto;align-items:center;padding:10px 16px 12px}
.tile-value{grid-row:1/3;grid-column:2;font-size:32px}.tile-change{font-size:13px}
figure{padding:14px 12px 12px}.sample{padding:14px}.facts{grid-template-columns:1fr 1fr}
.facts div:last-child{grid-column:1/-1}
.scales{grid-template-columns:max-content 1fr max-content}.scales .who{grid-column:1/-1;margin-top:2px}
th,td{padding:10px 11px}th:first-child{border-right:1px solid var(--rule)}}
@media print{body{background:none}.card,details{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

# The legend doubles as the reading of the point that the cursor is at; a token shows its value on hover and on tap.
_SCRIPT = """for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector(":scope > svg");
  if (!svg) continue;
  const spots = [...svg.querySelectorAll(".spot")], cursor = svg.querySelector(".cursor");
  const at = figure.querySelector(".at"), keys = [...figure.querySelectorAll(".legend li")];
  const xlabel = svg.getAttribute("aria-label").split(" by ").pop();
  const clear = () => {
    spots.forEach(s => s.classList.remove("on"));
    cursor.style.visibility = "hidden";
    at.textContent = "";
    keys.forEach(k => { k.querySelector("b").textContent = k.dataset.last; });
  };
  const read = event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = null;
    for (const s of spots) {
      if (!nearest || Math.abs(s.cx.baseVal.value - x) < Math.abs(nearest.cx.baseVal.value - x)) nearest = s;
    }
    clear();
    if (!nearest) return;
    const here = spots.filter(s => s.dataset.x === nearest.dataset.x);
    cursor.setAttribute("x1", nearest.getAttribute("cx"));
    cursor.setAttribute("x2", nearest.getAttribute("cx"));
    cursor.style.visibility = "visible";
    at.textContent = xlabel + " " + nearest.dataset.x;
    keys.forEach(k => {
      const spot = here.find(s => s.parentNode.dataset.series === k.dataset.series);
      k.querySelector("b").textContent = spot ? spot.dataset.y : "\\u2013";
    });
    here.forEach(s => s.classList.add("on"));
  };
  svg.addEventListener("pointermove", read);
  svg.addEventListener("pointerdown", read);
  svg.addEventListener("pointerleave", clear);
}
for (const variant of document.querySelectorAll(".variant")) {
  const output = variant.querySelector(".read");
  const show = event => {
    const token = event.target.closest(".t[title]");
    variant.querySelectorAll(".t.on").forEach(t => t.classList.remove("on"));
    output.textContent = token ? token.title : "";
    if (token) token.classList.add("on");
  };
  variant.addEventListener("pointerover", show);
  variant.addEventListener("click", show);
  variant.addEventListener("pointerleave", () => {
    variant.querySelectorAll(".t.on").forEach(t => t.classList.remove("on"));
    output.textContent = "";
  });
}
"""
