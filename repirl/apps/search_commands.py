"""`repirl search`, and its options. Whatever takes seconds to import waits until it runs."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.apps.commands import add_prm, add_verifier, code_options, placed
from repirl.apps.score_commands import SOURCES
from repirl.configfile import parse_overrides

OVERRIDES = "other options of the configuration can be given as --a.b VALUE, such as --rollout.engine vllm"


def add_search_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "search",
        help="step-level search for responses by a trained PRM: beam search or DVTS",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", required=True, metavar="DIR", help="an exported policy, any causal model, or a run's folder"
    )
    add_prm(command)
    command.add_argument("--input", required=True, metavar="FILE", help=f"rows with a prompt; {SOURCES}")
    command.add_argument(
        "--output", required=True, metavar="FILE", help="JSON lines: the rows, with response and score"
    )
    command.add_argument("--method", default="beam", metavar="NAME", help="beam or dvts; default: beam")
    command.add_argument("--beams", type=int, default=16, metavar="N", help="continued in each round; default: 16")
    command.add_argument(
        "--width",
        type=int,
        default=4,
        metavar="M",
        help="how often each of the N / M beams that are kept is continued (dvts: of N / M trees); default: 4",
    )
    command.add_argument(
        "--max-steps", type=int, default=40, metavar="N", help="rounds; the last one goes to the end; default: 40"
    )
    command.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a response; default: 3000, or what the model has positions for"
    )
    command.add_argument("--temperature", type=float, default=0.8, metavar="X", help="of sampling; default: 0.8")
    command.add_argument(
        "--separator",
        metavar="TEXT",
        help="what ends a step: a text, newline or blank-line; default: as the PRM's config.json says",
    )
    command.add_argument(
        "--aggregate",
        choices=("mean", "sum", "min", "last", "prod"),
        help="of step scores, to the score of a beam; default: what the PRM's config.json says",
    )
    command.add_argument(
        "--baseline", action="store_true", help="sample whole responses, too, of as many tokens, to compare with"
    )
    command.add_argument("--prompt-column", default="prompt", metavar="NAME", help="default: prompt")
    command.add_argument(
        "--answer-column", default="answer", metavar="NAME", help="default: answer, where there is one"
    )
    command.add_argument(
        "--vote-temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="of the weighted vote: weights are softmax(score / X); default: 1",
    )
    command.add_argument("--prompts-per-batch", type=int, default=8, metavar="N", help="side by side; default: 8")
    command.add_argument("--seed", type=int, default=0, help="of sampling")
    add_verifier(command, required=False)
    command.add_argument("--resume", action="store_true", help="go on with the file; what is done is kept")
    command.set_defaults(run=_search)


def _search(options: argparse.Namespace, overrides: list[str]) -> int:
    values, on = parse_overrides(overrides), placed(options)
    from repirl.apps.beams import SearchShape
    from repirl.apps.judge import verifier_config
    from repirl.apps.search import SearchOptions, print_counts, search
    from repirl.apps.solutions import SEPARATORS

    chosen = SearchOptions(
        shape=SearchShape(options.method, options.beams, options.width, options.max_steps),
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        separator=SEPARATORS.get(options.separator, options.separator),
        aggregate=options.aggregate,
        baseline=options.baseline,
        prompt=options.prompt_column,
        answer=options.answer_column,
        vote_temperature=options.vote_temperature,
        seed=options.seed,
        prompts=options.prompts_per_batch,
        verifier=verifier_config(options.verifier, options.processes, options.timeout, code_options(options)),
        placed=on,
    )
    counts = search(
        options.model, options.prm, options.input, options.output, chosen, values=values, resume=options.resume
    )
    print_counts(counts, options.method)
    print(f"{options.output}: {counts.prompts} rows")
    return 0
