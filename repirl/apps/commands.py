"""The commands that use what was trained, and their options. Whatever takes seconds to import waits until they run."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.config import ConfigError


def refuse_overrides(overrides: list[str]) -> None:
    """ConfigError where there are arguments that a command without a configuration does not know."""
    if overrides:
        raise ConfigError(f"unexpected argument {overrides[0]!r}; see repirl COMMAND --help")


def add_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "judge", help="what a verifier says of responses in a file, and why", allow_abbrev=False
    )
    _add_verifier(command, required=True)
    command.add_argument("--input", required=True, metavar="FILE", help="rows with a response and a right answer")
    command.add_argument(
        "--output", metavar="FILE", help="JSON lines: the rows, with verdict and reason; default: none"
    )
    command.add_argument("--response-column", default="response", metavar="NAME", help="default: response")
    command.add_argument(
        "--answer-column", default="answer", metavar="NAME", help="default: answer; a.b is part b of column a"
    )
    command.set_defaults(run=_judge)


def _add_verifier(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument(
        "--verifier",
        required=required,
        default="math",
        metavar="NAME",
        help="math, or a function of your own as module:function" + ("" if required else "; default: math"),
    )
    command.add_argument("--processes", type=int, default=1, metavar="N", help="that judge; default: 1")
    command.add_argument("--timeout", type=float, default=20.0, metavar="SECONDS", help="for one response; default: 20")


def _judge(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    from repirl.apps.judge import judge, print_counts, verifier_config

    config = verifier_config(options.verifier, options.processes, options.timeout)
    counts = judge(
        config,
        options.input,
        options.output,
        response_column=options.response_column,
        answer_column=options.answer_column,
    )
    print_counts(counts)
    if options.output:
        print(f"{options.output}: {counts.responses} rows with verdict and reason")
    return 0
