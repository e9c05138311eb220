"""The commands that use what was trained, and their options. Whatever takes seconds to import waits until they run."""

from __future__ import annotations

import argparse
from typing import Any

from repirl.config import ConfigError
from repirl.options import VerifierConfig


def refuse_overrides(overrides: list[str]) -> None:
    """ConfigError where there are arguments that a command without a configuration does not know."""
    if overrides:
        raise ConfigError(f"unexpected argument {overrides[0]!r}; see repirl COMMAND --help")


def add_commands(commands: Any) -> None:
    """commands: the parser's subparsers."""
    command = commands.add_parser(
        "judge", help="what a verifier says of responses in a file, and why", allow_abbrev=False
    )
    add_verifier(command, required=True)
    command.add_argument("--input", required=True, metavar="FILE", help="rows with a response and a right answer")
    command.add_argument(
        "--output", metavar="FILE", help="JSON lines: the rows, with verdict and reason; default: none"
    )
    command.add_argument("--response-column", default="response", metavar="NAME", help="default: response")
    command.add_argument(
        "--answer-column", default="answer", metavar="NAME", help="default: answer; a.b is part b of column a"
    )
    command.set_defaults(run=_judge)

    command = commands.add_parser(
        "rerank", help="best-of-N by a trained PRM beside voting, for N = 1, 2, 4, ... samples", allow_abbrev=False
    )
    command.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="rows with prompt and response (as repirl sample writes them) or responses",
    )
    add_prm(command, required=False, more="; needed where rows have no score")
    command.add_argument("--output", metavar="FILE", help="JSON: all figures, and what was chosen; default: none")
    command.add_argument("--prompt-column", default="prompt", metavar="NAME", help="default: prompt")
    command.add_argument("--answer-column", default="answer", metavar="NAME", help="default: answer")
    command.add_argument("--score-column", default="score", metavar="NAME", help="default: score")
    command.add_argument(
        "--aggregate",
        choices=("mean", "min", "last", "prod"),
        help="of step scores, to the response's score; default: what the PRM's config.json says",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="of the weighted vote: weights are softmax(score / X) over the N responses; default: 1",
    )
    command.add_argument(
        "--subsets",
        type=int,
        default=200,
        metavar="N",
        help="drawn of each prompt's responses, for votes; default: 200",
    )
    command.add_argument("--seed", type=int, default=0, help="of these draws")
    add_verifier(command, required=False)
    command.set_defaults(run=_rerank)


def add_prm(command: argparse.ArgumentParser, required: bool = True, more: str = "") -> None:
    """The options that say which PRM is loaded, and how; `placed` reads them."""
    command.add_argument(
        "--prm", required=required, metavar="DIR", help=f"an exported PRM, or a run's folder or a step_N folder{more}"
    )
    command.add_argument("--reference", metavar="DIR", help="of `implicit` rewards, if it moved")
    command.add_argument(
        "--convention",
        choices=("classifier", "qwen-math-prm", "math-shepherd"),
        help="the PRM is one of others, which scores ends of steps by this convention",
    )
    command.add_argument("--tokens", type=int, default=16384, metavar="N", help="in a batch; default: 16384")
    command.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: a GPU if there is one")
    command.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights"
    )


def placed(options: argparse.Namespace) -> Any:
    """The repirl.apps.trained.Placed of the options that `add_prm` adds."""
    if options.tokens < 1:
        raise ConfigError(f"--tokens is {options.tokens}, expected at least 1")
    from repirl.apps.trained import Placed

    return Placed(options.device, options.dtype, options.reference, options.tokens, options.convention)


def add_verifier(command: argparse.ArgumentParser, required: bool) -> None:
    """The options that say what judges responses; repirl.apps.judge.verifier_config reads them."""
    command.add_argument(
        "--verifier",
        required=required,
        default="math",
        metavar="NAME",
        help="math, code, or a function of your own as module:function" + ("" if required else "; default: math"),
    )
    command.add_argument(
        "--allow-unsandboxed", action="store_true", help="of code: run programs where there is no sandbox, too"
    )
    command.add_argument("--processes", type=int, default=1, metavar="N", help="that judge; default: 1")
    command.add_argument("--timeout", type=float, default=20.0, metavar="SECONDS", help="for one response; default: 20")


def chosen_verifier(options: argparse.Namespace) -> VerifierConfig:
    """The verifier that the options of `add_verifier` name."""
    from repirl.apps.judge import verifier_config

    code = {"allow_unsandboxed": True} if options.allow_unsandboxed else {}
    return verifier_config(options.verifier, options.processes, options.timeout, code)


def _judge(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    from repirl.apps.judge import judge, print_counts

    config = chosen_verifier(options)
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


def _rerank(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    on = placed(options)
    from repirl.apps.rerank import RerankOptions, print_results, rerank

    chosen = RerankOptions(
        prompt=options.prompt_column,
        answer=options.answer_column,
        score=options.score_column,
        aggregate=options.aggregate,
        temperature=options.temperature,
        subsets=options.subsets,
        seed=options.seed,
        verifier=chosen_verifier(options),
        placed=on,
    )
    print_results(rerank(options.input, options.output, prm=options.prm, options=chosen))
    if options.output:
        print(options.output)
    return 0
