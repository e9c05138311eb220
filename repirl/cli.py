"""The command line: repirl train | plan | demo | eval | export | sample | label | bench, and the commands that use what
was trained: judge | rerank | score | localize."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from repirl.interrupt import Interrupted, Signals, end_at_next_signal, end_with_torchrun
from repirl.systems import LABELS

# What the extra `train` brings, by the names under which it is imported.
NEEDED = (
    "accelerate datasets gguf jinja2 math_verify peft pydantic rich safetensors tensorboard tokenizers torchao "
    "transformers yaml"
)


def missing_packages() -> list[str]:
    """Which packages of the extra `train` are not there. Nothing is imported: a package that is there and broken is
    not missing, and its own error is the one to see."""
    missing = []
    for name in NEEDED.split():
        try:
            if name not in sys.modules and find_spec(name) is None:
                missing.append(name)
        except ModuleNotFoundError:
            missing.append(name)
    return missing


try:
    from repirl.apps.commands import add_commands, refuse_overrides
    from repirl.apps.eval_commands import add_benchmark_options, refuse_benchmark_options, run_benchmark
    from repirl.apps.export_commands import add_export_commands
    from repirl.apps.help_commands import ShowOptions, ShowVersions, add_help_commands
    from repirl.apps.report_commands import add_report_commands
    from repirl.apps.score_commands import add_score_commands
    from repirl.apps.search_commands import add_search_commands
    from repirl.apps.signal_commands import add_signal_commands
    from repirl.config import Config, ConfigError, RunError
    from repirl.configfile import describe, list_presets, load_config, parse_overrides
    from repirl.output_path import check_folder
except ModuleNotFoundError:
    # `main` says what to install, rather than a traceback of whoever imports this.
    if not missing_packages():
        raise

OVERRIDES = "every option of the configuration can be given as --a.b VALUE; repirl help lists them"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for what the user can mend, 1 for what else ended a run in an expected way (one
    message, no traceback, either way); 130 when interrupted, 143 when told to end (repirl.interrupt)."""
    if missing := missing_packages():
        print(
            f"repirl: not installed: {', '.join(missing)}; the command line needs the extra `train`: "
            "pip install 'repirl[train]' (in a checkout: pip install '.[train]')",
            file=sys.stderr,
        )
        return 2
    parser = make_parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    end_with_torchrun()
    try:
        with Signals(defer=False):
            _check_spelling(options, overrides)
            return options.run(options, overrides)
    except ConfigError as error:
        print(f"repirl: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"repirl: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        end_at_next_signal()
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"repirl: {interruption}", file=sys.stderr)
        return interruption.exit_code


def _check_spelling(options: argparse.Namespace, overrides: list[str]) -> None:
    """ConfigError where an override looks like a misspelt option of the command."""
    own = [f"--{name.replace('_', '-')}" for name in vars(options) if name not in ("command", "run")]
    for argument in overrides:
        name = argument.partition("=")[0]
        if name.startswith("--") and "." not in name and name[2:] not in {*Config.model_fields, "preset"}:
            close = difflib.get_close_matches(name, own, n=1)
            if close:
                raise ConfigError(f"unknown option {name} (did you mean {close[0]}?)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all commands."""
    parser = argparse.ArgumentParser(
        prog="repirl", description="Process reward models and policies, trained together by inverse RL."
    )
    parser.add_argument("--version", action=ShowVersions)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (_add_training, _add_tools, add_commands, add_score_commands, add_export_commands, add_search_commands):
        add(commands)
    for add in (add_signal_commands, add_report_commands, add_help_commands):
        add(commands)
    return parser


def _add_training(commands: Any) -> None:
    """The commands that train, or plan to. commands: the parser's subparsers."""
    command = commands.add_parser(
        "train", help="train from a configuration", epilog=OVERRIDES, allow_abbrev=False, add_help=False
    )
    command.add_argument("-h", "--help", action=ShowOptions)
    command.add_argument("--config", metavar="FILE", help="YAML; its key `preset` may name one (repirl presets)")
    command.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on from the newest checkpoint of DIR, by default of output_dir; without a configuration, with that of "
        "the run itself",
    )
    command.add_argument(
        "--changed",
        metavar="NAME,...",
        help="with --resume: options, models and data that are meant to differ from the run's, such as "
        "policy.optimizer.lr, lr (of every side) or data.train",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check configuration and data, print both and the batch arithmetic"
    )
    command.set_defaults(run=_train)

    command = commands.add_parser(
        "plan", help="memory by phase, before anything is loaded", epilog=OVERRIDES, allow_abbrev=False
    )
    command.add_argument("--config", metavar="FILE", help="the run's configuration")
    command.add_argument(
        "--memory", default="24,48,80", metavar="GIB,...", help="of a device (or, on a CPU, of a process): does it fit?"
    )
    command.add_argument("--ranks", type=int, default=1, metavar="N", help="processes that share the run")
    command.set_defaults(run=_plan)

    command = commands.add_parser("demo", help="the whole loop in minutes, without any download", allow_abbrev=False)
    command.add_argument(
        "--task", choices=("arithmetic", "code"), default="arithmetic", help="code: programs, run on tests"
    )
    command.add_argument("--output-dir", metavar="DIR", help="default: runs/demo, of code runs/demo-code")
    command.add_argument("--seed", type=int, default=0, help="of data, model and sampling")
    command.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads; default 1, the model is too small for more"
    )
    command.set_defaults(run=_demo)


def _add_tools(commands: Any) -> None:
    """The commands that train nothing. commands: the parser's subparsers."""
    command = commands.add_parser(
        "eval", help="accuracy on held-out prompts, or figures of a benchmark", epilog=OVERRIDES, allow_abbrev=False
    )
    command.add_argument("--config", metavar="FILE", help="default: that of the checkpoint's run")
    command.add_argument("--checkpoint", metavar="DIR", help="a run's folder or a step_N folder; default: the model")
    add_benchmark_options(command)
    command.set_defaults(run=_eval)

    command = commands.add_parser(
        "label",
        help="label the steps of responses by sampling completions (Math-Shepherd, OmegaPRM)",
        epilog=OVERRIDES,
        allow_abbrev=False,
    )
    command.add_argument("--config", metavar="FILE", help="data.train, policy.model, rollout, verifier, label")
    command.add_argument("--output", metavar="FILE", help="JSON lines; default: the file that data.steps names")
    command.add_argument("--method", choices=("math-shepherd", "omega"), help="the same as --label.method")
    command.add_argument("--resume", action="store_true", help="go on with the file; what is done is kept")
    command.set_defaults(run=_label)

    command = commands.add_parser(
        "sample", help="write rollouts and their outcomes, for data.trajectories", epilog=OVERRIDES, allow_abbrev=False
    )
    command.add_argument("--config", metavar="FILE", help="data.train, policy.model, rollout, verifier")
    command.add_argument("--output", metavar="FILE", required=True, help="JSON lines, one response each")
    command.add_argument("--checkpoint", metavar="DIR", help="a run's folder or a step_N folder; default: the model")
    command.add_argument("--prompts", type=int, metavar="N", help="the first N prompts; default: all")
    command.add_argument("--resume", action="store_true", help="go on with the file; what is done is kept")
    command.set_defaults(run=_sample)

    # Its options, --help too, are those of bench/run.py.
    command = commands.add_parser(
        "bench",
        help="the fused ops beside their peers, on this machine; bench compare A.json B.json: two such runs",
        allow_abbrev=False,
        add_help=False,
    )
    command.set_defaults(run=_bench)


def _names_configuration(options: argparse.Namespace, overrides: list[str]) -> bool:
    return options.config is not None or any(o.split("=")[0] == "--preset" for o in overrides)


def _load(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration that is given; where only a checkpoint is, the one that its run was made with."""
    checkpoint = getattr(options, "checkpoint", None)
    if _names_configuration(options, overrides):
        return load_config(options.config, overrides)
    if checkpoint is None:
        raise ConfigError(f"give --config FILE, or --preset NAME with one of {list_presets()}")
    from repirl.checkpoint.manifest import resolve_checkpoint

    return load_config(resolve_checkpoint(checkpoint) / "config.yaml", overrides)


# Imports of torch and transformers take seconds, so they wait until the configuration is known to be right.


def _load_for_training(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration; with --resume and none given, the one that the run was made with, with the overrides."""
    if options.changed is not None and options.resume is None:
        raise ConfigError(f"--changed {options.changed} is about a run that goes on: give --resume, too")
    if options.resume is None:
        return _load(options, overrides)
    is_given, folder = _names_configuration(options, overrides), parse_overrides(overrides).get("output_dir")
    if options.resume:
        if folder not in (None, options.resume):
            raise ConfigError(f"--resume {options.resume} and --output_dir {folder} are two folders: give one of them")
        folder, overrides = options.resume, [*overrides, "--output_dir", options.resume]
    if is_given and not options.resume:
        return _load(options, overrides)
    if folder is None:
        raise ConfigError("--resume needs the folder of a run (--resume DIR), or a configuration (--config FILE)")
    from repirl.checkpoint.identity import stored_configuration

    # Also beside a configuration: there has to be a run in a folder that is named.
    stored = stored_configuration(folder)
    return load_config(options.config if is_given else stored, overrides)


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    config = _load_for_training(options, overrides)
    if options.dry_run:
        check_folder(config.output_dir, option="output_dir")
        print(describe(config))
        print(batch_arithmetic(config))
        return 0
    from repirl.distributed.world import leave_world
    from repirl.loop import train

    changed = [name.strip() for name in (options.changed or "").split(",") if name.strip()]
    try:
        train(config, resume=options.resume is not None, changed=changed)
    except Interrupted as interruption:
        if interruption.is_complete:
            leave_world()
        raise
    if int(os.environ.get("RANK", 0)) == 0:
        print_summary(config)
    leave_world()
    return 0


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
    try:
        memories = list(dict.fromkeys(float(part) for part in options.memory.split(",")))
        if not all(0 < memory < math.inf for memory in memories):
            raise ValueError(options.memory)
    except ValueError as error:
        raise ConfigError(f"--memory is {options.memory!r}, expected GiB such as 24,48,80") from error
    if options.ranks < 1:
        raise ConfigError(f"--ranks is {options.ranks}, expected at least 1")
    config = _load(options, overrides)
    from repirl.models import quiet_transformers
    from repirl.plan.fit import print_plan

    quiet_transformers()
    print_plan(config, memories, options.ranks)
    return 0


def _demo(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    if options.threads < 1:
        raise ConfigError(f"--threads is {options.threads}, expected at least 1")
    from repirl.apps.demo import run

    folder = options.output_dir or {"arithmetic": "runs/demo", "code": "runs/demo-code"}[options.task]
    return run(folder, options.seed, options.threads, options.task)


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.benchmark is not None:
        return run_benchmark(options, overrides)
    refuse_benchmark_options(options)
    config = _load(options, overrides)
    from repirl.distributed.world import leave_world
    from repirl.evaluate import evaluate_checkpoint, evaluate_prm_checkpoint

    if config.data.eval_steps is not None:
        figures, count = evaluate_prm_checkpoint(config, options.checkpoint)
        leave_world()
        shown = ", ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in figures.items())
        print(f"{shown} on the labelled steps of {count} held-out responses")
        return 0
    accuracy, count = evaluate_checkpoint(config, options.checkpoint)
    leave_world()
    print(f"accuracy {accuracy:.4f} on {count} held-out prompts")
    return 0


def _label(options: argparse.Namespace, overrides: list[str]) -> int:
    chosen = ["--label.method", options.method] if options.method else []
    config = _load(options, [*overrides, *chosen])
    from repirl.apps.label import label, summary
    from repirl.distributed.world import leave_world

    counts, path = label(config, options.output, resume=options.resume)
    if int(os.environ.get("RANK", 0)) == 0:
        print(summary(counts, str(path)))
    leave_world()
    return 0


def _sample(options: argparse.Namespace, overrides: list[str]) -> int:
    if options.prompts is not None and options.prompts < 1:
        raise ConfigError(f"--prompts is {options.prompts}, expected at least 1")
    config = _load(options, overrides)
    from repirl.apps.sample import sample
    from repirl.distributed.world import leave_world

    counts = sample(
        config, options.output, checkpoint=options.checkpoint, num_prompts=options.prompts, resume=options.resume
    )
    if int(os.environ.get("RANK", 0)) == 0:
        right = f", {counts.right / counts.judged:.1%} of them right" if counts.judged else ", without outcomes"
        print(f"{options.output}: {counts.responses} responses to {counts.prompts} prompts{right}")
    leave_world()
    return 0


def _bench(options: argparse.Namespace, arguments: list[str]) -> int:
    from pathlib import Path

    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "run.py").exists():
        raise ConfigError(
            f"the benchmarks are part of the source checkout, not of the installed package, and {checkout} has no "
            "bench/run.py: clone the repository and run `make bench` there"
        )
    # The benchmarks beside this package, even where the caller's folder has others; relative paths count from there.
    paths = [str(checkout), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    module = ["bench.compare", *arguments[1:]] if arguments[:1] == ["compare"] else ["bench.run", *arguments]
    return subprocess.run([sys.executable, "-m", *module], env=environment).returncode


def print_summary(config: Config) -> None:
    """The final table: the first, best and last value of the run's key metrics, and where everything is."""
    from pathlib import Path

    from repirl.report.display import SHOWN, print_table
    from repirl.report.log import read_metrics

    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    rows = []
    for name, label, form in SHOWN:
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            rows.append([label, *(form.format(v) for v in (values[0], min(values), max(values), values[-1]))])
    print_table(f"{config.objective}, {lines[-1]['step']} steps", ["", "first", "lowest", "highest", "last"], rows)
    print(f"metrics, TensorBoard and checkpoints: {config.output_dir}")


def batch_arithmetic(config: Config) -> str:
    """What a step and the run come to; models' files and data are checked, no weights loaded."""
    from repirl.batch import deal_out
    from repirl.data.experts import Expert
    from repirl.data.preview import (
        preview,
        preview_experts,
        preview_pairs,
        preview_steps,
        preview_trajectories,
    )
    from repirl.data.prompts import Prompt, load_prompts
    from repirl.sources import check_sources

    tokenizer = check_sources(config)
    rollout, budget = config.rollout, config.batch.tokens_per_microbatch
    lines, rows, experts = list[str](), list[Prompt](), list[Expert]()
    if config.system.online:
        prompts = load_prompts(config.data, tokenizer, "train")
        rows += prompts.prompts
        longest = max(len(p.token_ids) for p in prompts.prompts)
        responses = rollout.prompts_per_step * rollout.samples_per_prompt
        lengths = [longest + rollout.max_response_tokens] * responses
        lines += [
            f"prompts: {len(prompts)} loaded, {prompts.num_dropped} dropped as overlong, longest {longest} tokens",
            f"step: {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {responses} responses, "
            f"at most {sum(lengths)} tokens in {len(deal_out(lengths, budget)[0])} micro-batches of {budget}",
            f"run: {config.steps} steps = {'at least ' * (rollout.filter is not None)}"
            f"{config.steps * rollout.prompts_per_step} prompts = "
            f"{config.steps * rollout.prompts_per_step / len(prompts):.2f} epochs",
        ]
    if config.uses("experts"):
        experts, expert_lines = preview_experts(config, tokenizer)
        lines += expert_lines
    shown = {"pairs": preview_pairs, "trajectories": preview_trajectories, "steps": preview_steps}
    for kind, describe_data in shown.items():
        if config.uses(kind):
            lines += describe_data(config, tokenizer)
    if config.data.eval:
        held_out = load_prompts(config.data, tokenizer, "eval")
        rows += held_out.prompts
        used = min(config.eval.num_prompts or len(held_out), len(held_out))
        lines.append(f"held out: {used} of {len(held_out)} prompts, every {config.eval.every} steps")
    lines += preview(config, tokenizer, rows, experts)
    lines += [f"warning: {warning}" for warning in config.warnings]
    sections = sorted(config.trained_sections.items(), key=lambda item: item[0] != "policy")
    updates = [f"{config.steps * side.updates_per_step} of the {LABELS.get(name, name)}" for name, side in sections]
    return "\n".join([*lines, f"optimiser updates: {', '.join(updates)}"])


if __name__ == "__main__":
    sys.exit(main())
