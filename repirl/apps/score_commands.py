"""`repirl score` and `repirl localize`, and their options. Whatever takes seconds to import waits until they run."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.apps.commands import add_prm, placed, refuse_overrides

SOURCES = "JSON lines, CSV or Parquet, or a data set of the hub as owner/name:split"


def add_score_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "score", help="token, step and response scores of solutions in a file, by a trained PRM", allow_abbrev=False
    )
    add_prm(command, required=False, more="; with --server, what the server serves")
    command.add_argument(
        "--server",
        metavar="URL",
        help="a vLLM server that computes the rewards, such as http://127.0.0.1:8000; --dtype is the type it uses",
    )
    command.add_argument(
        "--server-timeout", type=float, default=300.0, metavar="SECONDS", help="for one answer; default: 300"
    )
    command.add_argument(
        "--input", required=True, metavar="FILE", help=f"rows with prompt and response or steps; {SOURCES}"
    )
    command.add_argument(
        "--output", required=True, metavar="FILE", help="JSON lines: the rows, with step_scores and score"
    )
    command.add_argument(
        "--prompt-column", default="prompt", metavar="NAME", help="default: prompt; a.b is part b of a"
    )
    command.add_argument("--response-column", metavar="NAME", help="text; default: response, where there is one")
    command.add_argument("--steps-column", metavar="NAME", help="a list of steps; default: steps, where there is one")
    _add_split(command)
    command.add_argument(
        "--aggregate",
        choices=("mean", "sum", "min", "last", "prod"),
        help="of step scores, to the response's score; default: what the PRM's config.json says",
    )
    command.add_argument("--token-rewards", action="store_true", help="write the reward of each token, too: rewards")
    command.add_argument("--unfinished", action="store_true", help="responses are beginnings: without an end token")
    command.add_argument("--prefix", default="", metavar="TEXT", help="before the names of the added columns")
    command.add_argument("--resume", action="store_true", help="go on with the file; what is done is kept")
    command.set_defaults(run=_score)

    command = commands.add_parser(
        "localize", help="first wrong step by a trained PRM, judged as ProcessBench does", allow_abbrev=False
    )
    add_prm(command)
    command.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE",
        help=f"rows of ProcessBench: problem, steps, label; {SOURCES}",
    )
    command.add_argument("--threshold", type=float, metavar="X", help="a step that scores below it is wrong")
    command.add_argument("--calibrate", metavar="FILE", help="take the threshold with the best F1 on these rows")
    command.add_argument("--output", metavar="FILE", help="JSON lines: the rows, with step_scores and prediction")
    command.add_argument("--prompt-column", default="problem", metavar="NAME", help="default: problem")
    command.add_argument("--steps-column", default="steps", metavar="NAME", help="default: steps")
    command.add_argument("--label-column", default="label", metavar="NAME", help="first wrong step; default: label")
    _add_split(command)
    command.set_defaults(run=_localize)


def _add_split(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--split",
        metavar="HOW",
        help="steps end with a newline, a blank-line, or tag:TEXT, which is taken out; default: as the PRM's "
        "config.json says. Given steps are joined likewise",
    )


def _score(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    on = placed(options)
    from repirl.apps.score import ScoreOptions, score
    from repirl.apps.server import Server
    from repirl.apps.solutions import Columns

    chosen = ScoreOptions(
        columns=Columns(options.prompt_column, options.response_column, options.steps_column),
        finished=not options.unfinished,
        split=options.split,
        aggregate=options.aggregate,
        token_rewards=options.token_rewards,
        prefix=options.prefix,
        placed=on,
        server=None if options.server is None else Server(options.server, options.server_timeout),
    )
    counts = score(options.prm, options.input, options.output, chosen, resume=options.resume)
    print(f"{options.output}: {counts.rows} rows, {counts.steps} steps, {counts.tokens} tokens scored")
    return 0


def _localize(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    on = placed(options)
    from repirl.apps.first_errors import LocalizeOptions, described, localize
    from repirl.apps.solutions import Columns

    chosen = LocalizeOptions(
        columns=Columns(options.prompt_column, None, options.steps_column),
        label_column=options.label_column,
        split=options.split,
        threshold=options.threshold,
        placed=on,
    )
    print(described(localize(options.prm, options.input, chosen, calibration=options.calibrate, output=options.output)))
    return 0
