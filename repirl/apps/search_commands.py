"""`repirl search` and `repirl adapt`, and their options. Whatever takes seconds to import waits until they run."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.apps.commands import add_prm, add_verifier, chosen_verifier, placed
from repirl.apps.score_commands import SOURCES
from repirl.config import ConfigError
from repirl.configfile import parse_overrides

OVERRIDES = "other options of the configuration can be given as --a.b VALUE, such as --rollout.engine vllm"


def add_search_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    _add_search(commands)
    _add_adapt(commands)


def _add_search(commands: Any) -> None:
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


def _add_adapt(commands: Any) -> None:
    command = commands.add_parser(
        "adapt",
        help="test-time training: a policy on prompts, by the rewards of a frozen PRM, without outcomes",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    command.add_argument("--policy", required=True, metavar="DIR", help="an exported policy, or any causal model")
    add_prm(command)
    command.add_argument("--prompts", required=True, metavar="FILE", help=f"rows with a prompt; {SOURCES}")
    command.add_argument(
        "--output", required=True, metavar="DIR", help="gets policy/, adapt.json, responses.jsonl, and the run"
    )
    command.add_argument("--turns", type=int, default=100, metavar="N", help="it stops after so many; default: 100")
    command.add_argument(
        "--max-kl",
        default="0.1",
        metavar="X",
        help="it stops further than so many nats a token from the start; none: no limit; default: 0.1",
    )
    command.add_argument(
        "--every", type=int, default=5, metavar="N", help="turns whose rollouts are one evaluation; default: 5"
    )
    command.add_argument(
        "--patience",
        default="4",
        metavar="K",
        help="it stops when the PRM's reward has not risen in so many evaluations; none: no limit; default: 4",
    )
    command.add_argument("--lr", type=float, default=1e-6, metavar="X", help="learning rate; default: 1e-6")
    command.add_argument("--prompts-per-turn", type=int, default=32, metavar="N", help="default: 32, or all")
    command.add_argument("--samples", type=int, default=4, metavar="K", help="responses to a prompt; default: 4")
    command.add_argument(
        "--max-tokens", type=int, metavar="N", help="of a response; default: 3000, or what the model has positions for"
    )
    command.add_argument("--prompt-column", default="prompt", metavar="NAME", help="default: prompt")
    command.add_argument(
        "--answer-column",
        metavar="NAME",
        help="right answers, for the accuracy before and after alone",
    )
    command.add_argument("--seed", type=int, default=0, help="of sampling, and of the order of the prompts")
    add_verifier(command, required=False)
    command.add_argument("--resume", action="store_true", help="go on after an interruption")
    command.set_defaults(run=_adapt)


def _search(options: argparse.Namespace, overrides: list[str]) -> int:
    values, on = parse_overrides(overrides), placed(options)
    from repirl.apps.beams import SearchShape
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
        verifier=chosen_verifier(options),
        placed=on,
    )
    counts = search(
        options.model, options.prm, options.input, options.output, chosen, values=values, resume=options.resume
    )
    print_counts(counts, options.method)
    print(f"{options.output}: {counts.prompts} rows")
    return 0


def _adapt(options: argparse.Namespace, overrides: list[str]) -> int:
    values, on = parse_overrides(overrides), placed(options)
    max_kl, patience = (_number(options, name) for name in ("max_kl", "patience"))
    from repirl.apps.adapt import AdaptOptions, adapt, print_result
    from repirl.apps.stop_rule import StopOptions
    from repirl.distributed.world import leave_world

    if patience is not None and patience != int(patience):
        raise ConfigError(f"--patience is {options.patience!r}, expected a whole number, or none")
    chosen = AdaptOptions(
        stop=StopOptions(options.turns, max_kl, options.every, None if patience is None else int(patience)),
        learning_rate=options.lr,
        prompts=options.prompts_per_turn,
        samples=options.samples,
        max_tokens=options.max_tokens,
        prompt=options.prompt_column,
        answer=options.answer_column,
        seed=options.seed,
        verifier=chosen_verifier(options),
        placed=on,
    )
    result = adapt(
        options.policy, options.prm, options.prompts, options.output, chosen, values=values, resume=options.resume
    )
    leave_world()
    print_result(result)
    print(f"{options.output}/policy")
    return 0


def _number(options: argparse.Namespace, name: str) -> float | None:
    """A number, or None for the word none."""
    text = getattr(options, name)
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')} is {text!r}, expected a number, or none") from error
