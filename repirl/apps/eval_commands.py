"""`repirl eval`: on what a configuration holds out, or on a benchmark. Whatever takes seconds to import waits until it
runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from repirl.config import ConfigError
from repirl.configfile import parse_overrides

# The names in repirl.evals.BENCHMARKS, which takes long to import.
ANSWER_BENCHMARKS = (
    "gsm8k",
    "math500",
    "aime",
    "amc",
    "minerva",
    "olympiadbench",
    "humaneval",
    "humaneval-base",
    "mbpp",
    "livecodebench",
)
# Benchmarks of reward models.
STEP_BENCHMARKS = ("processbench", "prmbench")
# Options of each kind that are None unless they are given.
ASK_OPTIONS = ("samples", "temperature", "max_response_tokens", "problems", "prompt")
ANSWER_OPTIONS = ("model", "responses", *ASK_OPTIONS, "resamples", "processes", "timeout", "allow_unsandboxed")
STEP_OPTIONS = ("prm", "threshold", "calibrate", "split", "reference", "convention", "tokens")


def add_benchmark_options(command: argparse.ArgumentParser) -> None:
    """The options of `repirl eval --benchmark`."""
    group = command.add_argument_group("benchmarks")
    group.add_argument(
        "--benchmark",
        metavar="NAME",
        choices=(*ANSWER_BENCHMARKS, *STEP_BENCHMARKS),
        help=f"of a policy: {', '.join(ANSWER_BENCHMARKS)}; of a PRM: {', '.join(STEP_BENCHMARKS)}",
    )
    group.add_argument(
        "--data", nargs="+", metavar="FILE", help="its data: JSON lines, CSV or Parquet, or owner/name:split of the hub"
    )
    group.add_argument("--output", metavar="DIR", help="gets results.json and each response or row")
    group.add_argument("--resume", action="store_true", help="go on with --output; what is done is kept")
    answers = command.add_argument_group(
        "benchmarks of answers (with --model every option of the configuration, such as --rollout.engine or --seed)"
    )
    answers.add_argument("--model", metavar="DIR", help="an exported policy, or any causal language model")
    answers.add_argument("--responses", metavar="FILE", help="judge these instead of asking a model")
    answers.add_argument("--samples", type=int, metavar="N", help="to each problem, beside the greedy one")
    answers.add_argument("--temperature", type=float, metavar="X", help="of the samples")
    answers.add_argument("--max-response-tokens", type=int, metavar="N", help="a response is cut off after so many")
    answers.add_argument("--problems", type=int, metavar="N", help="the first N problems; default: all")
    answers.add_argument(
        "--prompt", metavar="TEXT", help="around the problem, with {problem}; default: the benchmark's"
    )
    answers.add_argument("--resamples", type=int, metavar="N", help="of the bootstrap; default: 1000")
    answers.add_argument("--processes", type=int, metavar="N", help="that judge; default: 1")
    answers.add_argument("--timeout", type=float, metavar="SECONDS", help="for one response; default: 20")
    answers.add_argument(
        "--allow-unsandboxed", action="store_true", default=None, help="run programs where there is no sandbox, too"
    )
    steps = command.add_argument_group(
        f"{' and '.join(STEP_BENCHMARKS)} (--device and --dtype say how the PRM is loaded)"
    )
    steps.add_argument("--prm", metavar="DIR", help="an exported PRM, or a run's folder or a step_N folder")
    steps.add_argument("--threshold", type=float, metavar="X", help="a step that scores below it is wrong")
    steps.add_argument("--calibrate", metavar="FILE", help="take the threshold that is best on these rows")
    steps.add_argument("--split", metavar="HOW", help="what is put between steps; as in repirl score")
    steps.add_argument("--reference", metavar="DIR", help="of `implicit` rewards, if it moved")
    steps.add_argument("--convention", metavar="NAME", help="of a PRM of others; as in repirl score")
    steps.add_argument("--tokens", type=int, metavar="N", help="in a batch; default: 16384")


def run_benchmark(options: argparse.Namespace, overrides: list[str]) -> int:
    """Run `repirl eval --benchmark` and print its figures; ConfigError for options that do not fit together."""
    for name in ("config", "checkpoint"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} is not for benchmarks: export the model (repirl export), and give its folder")
    if not options.data:
        raise ConfigError(f"--benchmark {options.benchmark} needs its data: give --data FILE")
    changes = parse_overrides(overrides)
    if options.benchmark in STEP_BENCHMARKS:
        return _steps(options, changes)
    return _answers(options, changes)


def refuse_benchmark_options(options: argparse.Namespace) -> None:
    """ConfigError where there are options of benchmarks without one."""
    for name in ("data", "output", *ANSWER_OPTIONS, *STEP_OPTIONS):
        if getattr(options, name) is not None:
            raise ConfigError(f"{_option(name)} is for benchmarks: give --benchmark NAME, too")
    if options.resume:
        raise ConfigError("--resume is for benchmarks: give --benchmark NAME, too")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ConfigError(f"{_option(name)} is {why}")


def _steps(options: argparse.Namespace, changes: Mapping[str, Any]) -> int:
    _refuse(options, ANSWER_OPTIONS, f"for benchmarks of answers, not for {options.benchmark}")
    if others := sorted(set(changes) - {"device", "dtype"}):
        raise ConfigError(f"--{others[0]} is not for {options.benchmark}")
    if options.prm is None:
        raise ConfigError(f"--benchmark {options.benchmark} judges a PRM: give --prm DIR")
    if options.resume and options.output is None:
        raise ConfigError("--resume goes on with a folder: give --output DIR")
    from repirl.apps.eval_steps import StepOptions, eval_prm, print_result
    from repirl.apps.trained import Placed

    names = {name: name for name in ("reference", "convention", "tokens")}
    placed = Placed(**{**changes, **_given(options, names)})
    chosen = StepOptions(options.threshold, options.split, placed)
    print_result(
        eval_prm(
            options.benchmark,
            options.data,
            options.prm,
            options.output,
            chosen,
            calibration=options.calibrate,
            resume=options.resume,
        )
    )
    if options.output is not None:
        print(options.output)
    return 0


def _given(options: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """The options that are given, by other names: those that `names` has for them."""
    return {name: getattr(options, option) for option, name in names.items() if getattr(options, option) is not None}


def _answers(options: argparse.Namespace, changes: Mapping[str, Any]) -> int:
    _refuse(options, STEP_OPTIONS, f"for {' and '.join(STEP_BENCHMARKS)}")
    if len(options.data) > 1:
        raise ConfigError(f"--data names {len(options.data)} files, expected one for --benchmark {options.benchmark}")
    if (options.model is None) == (options.responses is None):
        raise ConfigError("give one of --model DIR and --responses FILE")
    from repirl.apps.eval_answers import GradeOptions, eval_model, eval_responses, print_result

    seed = changes.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"--seed is {seed!r}, expected a number of at least 0")
    names = {"processes": "processes", "timeout": "timeout_seconds", "resamples": "resamples"}
    names["allow_unsandboxed"] = "allow_unsandboxed"
    grading = GradeOptions(seed=seed, **_given(options, names))
    [data] = options.data
    if options.model is None:
        _refuse(options, ASK_OPTIONS, "for --model, not for responses that are there")
        if others := sorted(set(changes) - {"seed"}):
            raise ConfigError(f"--{others[0]} is for --model, not for responses that are there")
        if options.resume:
            raise ConfigError("--resume is for --model, not for responses that are there")
        print_result(eval_responses(options.benchmark, data, options.responses, options.output, grading=grading))
        if options.output is not None:
            print(options.output)
        return 0
    if options.output is None:
        raise ConfigError("give --output DIR: the responses are kept there")
    from repirl.apps.eval_sampling import AskOptions
    from repirl.distributed.world import leave_world, own_rank

    asking = AskOptions(
        options.samples, options.temperature, options.max_response_tokens, options.problems, options.prompt, changes
    )
    result = eval_model(
        options.benchmark, data, options.model, options.output, asking, grading=grading, resume=options.resume
    )
    leave_world()
    if own_rank() == 0:
        print_result(result)
        print(options.output)
    return 0
