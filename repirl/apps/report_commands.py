"""`repirl report`, and its options. Whatever takes seconds to import waits until it runs."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.apps.commands import refuse_overrides


def add_report_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "report", help="a run, or several beside each other, as one HTML page", allow_abbrev=False
    )
    command.add_argument(
        "--run",
        dest="runs",
        action="append",
        required=True,
        metavar="DIR",
        help="a run's output_dir; may be given several times",
    )
    command.add_argument("--output", metavar="FILE", help="is replaced; default, of one run: report.html in its folder")
    command.add_argument(
        "--responses", type=int, default=40, metavar="N", help="of those that each run kept; default: 40"
    )
    command.add_argument(
        "--metric",
        dest="metrics",
        action="append",
        default=[],
        metavar="NAME",
        help="one more of metrics.jsonl as a curve; may be given several times",
    )
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    from repirl.apps.report import report

    path = report(options.runs, options.output, responses=options.responses, metrics=options.metrics)
    print(f"the page is at {path}: open it in a browser")
    return 0
