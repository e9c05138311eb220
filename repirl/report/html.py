"""Results as one self-contained HTML page: figures, learning curves, and responses coloured token by token.

The file contains its styles, drawings and a short script, and loads nothing from elsewhere. The page follows the
reader's light or dark setting. The same report always gives the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TypedDict

from repirl.report.charts import Curve, Series, figure, shades_of
from repirl.report.colours import colour_rules
from repirl.report.markup import MINUS, escape, is_finite, number
from repirl.report.responses import Sample, Step, Variant, samples_section

__all__ = ["ComparisonTable", "Curve", "Report", "Sample", "Series", "Step", "Variant", "render", "write_report"]


class ComparisonTable(TypedDict):
    """A table. Every row has a cell for every column; the first cell of a row is its name."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


class _Optional(TypedDict, total=False):
    curves_lead: str
    samples_lead: str
    tables: dict[str, ComparisonTable]
    configurations: dict[str, str]


class Report(_Optional):
    """The content of a page. All texts are plain text; they are escaped here.

    configuration: YAML; or several by name, in `configurations`. These may be left out: curves_lead and samples_lead,
    which stand above the curves and the responses; tables, more of them about how it was made, by title.
    """

    title: str
    subtitle: str
    configuration: str
    environment: dict[str, str]
    table: ComparisonTable
    notes: list[str]
    curves: list[Curve]
    samples: list[Sample]


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
    missing = sorted(Report.__required_keys__ - report.keys())
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}; repirl.report.html.Report says what it holds")
    # A name has the same colour everywhere on the page.
    shades = shades_of([series["name"] for curve in report["curves"] for series in curve["series"]])
    parts = [
        _header(report),
        _tiles(report["curves"], shades),
        _results(report["table"], report["notes"]),
        _curves(report["curves"], shades, report.get("curves_lead", "")),
        samples_section(report["samples"], shades, report.get("samples_lead", "")),
        _details(report),
    ]
    title = escape(report["title"])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Tell the browser that the page must not load anything.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<style>\n{_file('page.css')}{colour_rules()}</style>\n</head>\n<body>\n<main>\n"
        + "".join(part for part in parts if part)
        + f"</main>\n<script>\n{_file('page.js')}</script>\n</body>\n</html>\n"
    )


def _file(name: str) -> str:
    return (resources.files("repirl.report") / name).read_text(encoding="utf-8")


def _header(report: Report) -> str:
    links = {"Results": "results", "Curves": "curves" if report["curves"] else "", "How it was made": "made"}
    if report["samples"]:
        links = {"Results": "results", "Curves": links["Curves"], "Responses": "responses", "How it was made": "made"}
    listed = "".join(f'<li><a href="#{target}">{name}</a></li>' for name, target in links.items() if target)
    return (
        f"<header>\n<h1>{escape(report['title'])}</h1>\n"
        f'<p class="subtitle">{escape(report["subtitle"])}</p>\n'
        f'<nav aria-label="Parts of this page"><ul class="parts">{listed}</ul></nav>\n</header>\n'
    )


def _tiles(curves: Sequence[Curve], shades: dict[str, str]) -> str:
    """The first percent chart as large numbers: the last value of each series, and its difference to the first one."""
    curve = next((c for c in curves if c["percent"]), None)
    if curve is None:
        return ""
    tiles = []
    for series in curve["series"]:
        values = [y for y in series["y"] if y is not None and is_finite(y)]
        if not values:
            continue
        points = 100 * (values[-1] - values[0])
        kind = "up" if points > 0 else "down" if points < 0 else "same"
        change = f"{'+' if points >= 0 else MINUS}{abs(points):.1f} points"
        tiles.append(
            f'<li class="{shades[series["name"]]}"><span class="tile-name">{escape(series["name"])}</span>'
            f'<span class="tile-value">{number(values[-1], True)}</span>'
            f'<span class="tile-change {kind}">{change} from {number(values[0], True)}</span></li>\n'
        )
    if not tiles:
        return ""
    label = escape(curve["title"])
    listed = "".join(tiles)
    return (
        f'<section class="first" aria-label="{label}">\n<p class="eyebrow">{label}</p>\n'
        f'<ul class="tiles">\n{listed}</ul>\n</section>\n'
    )


def _results(table: ComparisonTable, notes: Sequence[str]) -> str:
    listed = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    return (
        f'<section id="results">\n<h2>Results</h2>\n{_table(table, "Results")}'
        + (f'<ul class="notes">\n{listed}</ul>\n' if listed else "")
        + "</section>\n"
    )


def _table(table: ComparisonTable, label: str) -> str:
    """On a narrow screen each row is a block with a line for each cell, named by its column. So the columns' names
    stand in the cells, too; and roles say what the elements are, as browsers forget it of tables with another
    layout."""
    columns = table["columns"]
    for row in table["rows"]:
        if len(row) != len(columns):
            raise ValueError(f"table row {row!r} has {len(row)} cells, expected {len(columns)}: {columns}")
    head = "".join(f'<th scope="col" role="columnheader">{escape(c)}</th>' for c in columns)
    body = []
    for row in table["rows"]:
        cells = "".join(
            f'<td role="cell" data-label="{escape(column)}">{_cell(cell)}</td>'
            for column, cell in zip(columns[1:], row[1:], strict=True)
        )
        body.append(f'<tr role="row"><th scope="row" role="rowheader">{_cell(row[0])}</th>{cells}</tr>\n')
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table role="table">\n'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n<tbody role="rowgroup">\n{"".join(body)}</tbody>\n'
        "</table></div>\n"
    )


def _cell(cell: str | float) -> str:
    return escape(cell) if isinstance(cell, str) else number(cell)


def _curves(curves: Sequence[Curve], shades: dict[str, str], lead: str) -> str:
    figures = "".join(figure(curve, shades) for curve in curves)
    if not figures:
        return ""
    above = f'<p class="lead">{escape(lead)}</p>\n' if lead else ""
    return f'<section id="curves">\n<h2>Learning curves</h2>\n{above}<div class="grid">\n{figures}</div>\n</section>\n'


def _details(report: Report) -> str:
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in report["environment"].items()
    )
    tables = "".join(
        f"<h3>{escape(title)}</h3>\n{_table(table, title)}" for title, table in report.get("tables", {}).items()
    )
    configurations = {"Configuration": report["configuration"]} if report["configuration"] else {}
    configurations |= {f"Configuration of {name}": text for name, text in report.get("configurations", {}).items()}
    return (
        '<section id="made">\n<h2>How it was made</h2>\n'
        + (f'<dl class="card facts">\n{pairs}</dl>\n' if pairs else "")
        + tables
        + _yaml_blocks(configurations)
        + "</section>\n"
    )


def _yaml_blocks(texts: Mapping[str, str]) -> str:
    blocks = []
    for title, text in texts.items():
        lines = "\n".join(_yaml_line(line) for line in text.splitlines())
        blocks.append(
            f"<details>\n<summary>{escape(title)}</summary>\n"
            f'<pre tabindex="0" role="region" aria-label="{escape(title)}">{lines}</pre>\n</details>\n'
        )
    return "".join(blocks)


def _yaml_line(line: str) -> str:
    name = re.match(r"(\s*(?:- )?)([\w.\-]+)(:)(?=\s|$)", line)
    if line.lstrip().startswith("#"):
        return f'<span class="c">{escape(line)}</span>'
    if name is None:
        return escape(line)
    return f'{name[1]}<span class="k">{escape(name[2])}</span>:{escape(line[name.end() :])}'
