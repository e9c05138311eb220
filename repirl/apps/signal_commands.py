"""`repirl signal`, and its options. Whatever takes seconds to import waits until it runs."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.apps.commands import refuse_overrides


def add_signal_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "signal", help="do a run's PRM rewards tell which unsolved prompts it solves later?", allow_abbrev=False
    )
    command.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run's output_dir")
    command.add_argument("--output", metavar="FILE", help="JSON: all figures; default: none")
    command.add_argument(
        "--turns",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="up to which prompts are unsolved; default: a quarter, half and three quarters of the run",
    )
    command.add_argument(
        "--resamples", type=int, default=1000, metavar="N", help="of the bootstrap over prompts; default: 1000"
    )
    command.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    command.set_defaults(run=_signal)


def _signal(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    from repirl.apps.signal import print_signal, signal

    result = signal(options.folder, options.output, turns=options.turns, resamples=options.resamples, seed=options.seed)
    print_signal(result)
    if options.output:
        print(options.output)
    return 0
