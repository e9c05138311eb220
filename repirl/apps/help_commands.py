"""`repirl help`, `presets`, `config` and `completion`, and the options --help of train and --version."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from functools import partial
from typing import Any

from repirl.apps.commands import refuse_overrides
from repirl.completion import SHELLS, completion_script, list_commands
from repirl.config import Config, ConfigError, RunError
from repirl.configfile import build_config, list_presets, load_config, merge, parse_overrides
from repirl.output_path import YAML, check_file
from repirl.reference import all_options, commented_yaml, help_text, option_groups, presets_text

# What has no default, for a configuration of one's own.
STARTER: dict[str, Any] = {
    "output_dir": "runs/mine",
    "steps": 200,
    "policy": {"model": "path/or/hub-id"},
    "data": {
        "train": "train.jsonl",
        "eval": "test.jsonl",
        "prompt_column": "question",
        "answer_column": "answer",
        "solution_column": "answer",
    },
}


class ShowVersions(argparse.Action):
    """--version. Not argparse's own, whose text would cost an import of torch at every start."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="versions that a bug report needs, and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from repirl.version import environment_text

        show(environment_text())
        parser.exit()


class ShowOptions(argparse.Action):
    """--help of a command that takes a configuration: its own options, and those of the configuration."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs="?",
            metavar="NAME",
            help="show this and every option of the configuration, or those of a section or with a name, and exit",
        )

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        try:
            text = help_text([values] if values else None, line_width())
        except ConfigError as error:
            parser.exit(2, f"repirl: {error}\n")
        show(text if values else f"{parser.format_help()}\n{text}")
        parser.exit()


def show(text: str) -> None:
    """Print a text, also for whoever reads its beginning only, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What Python would still write at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def line_width() -> int:
    """Characters of a line of help."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))


def add_help_commands(commands: Any) -> None:
    """commands: the parser's subparsers, with all other commands."""
    command = commands.add_parser(
        "config", help="a commented configuration to start from, with every option", allow_abbrev=False
    )
    command.add_argument("--config", metavar="FILE", help="write out this one")
    command.add_argument("--preset", metavar="NAME", help="write out this one; see repirl presets")
    command.add_argument("--output", metavar="FILE", help="a new YAML file; default: print it")
    command.set_defaults(run=_config)

    command = commands.add_parser("presets", help="the configurations that come with repirl", allow_abbrev=False)
    command.set_defaults(run=_presets)

    command = commands.add_parser("help", help="every option of the configuration, or some", allow_abbrev=False)
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="a section (data), an option (prm.reward) or a part of names (lr)"
    )
    command.set_defaults(run=_help)

    command = commands.add_parser("completion", help="a script that completes commands and options in a shell")
    command.add_argument("shell", metavar="SHELL", help=" | ".join(SHELLS))
    command.set_defaults(run=partial(_completion, commands))


def starter_config(config: str | None, preset: str | None, overrides: list[str]) -> Config:
    """The configuration of a file, a preset or both; without either one with every default. `overrides` win."""
    if config is None and preset is None:
        return build_config(merge(STARTER, parse_overrides(overrides)))
    return load_config(config, [*(["--preset", preset] if preset else []), *overrides])


def _config(options: argparse.Namespace, overrides: list[str]) -> int:
    text = commented_yaml(starter_config(options.config, options.preset, overrides))
    if options.output is None:
        show(text.rstrip("\n"))
        return 0
    path = check_file(options.output, YAML)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"--output {options.output!r} cannot be written: {error.strerror}") from error
    print(f"{options.output}: set the model and the data, then: repirl train --config {options.output} --dry-run")
    return 0


def _presets(options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    hint = "repirl config --preset NAME shows one in full; repirl train --preset NAME runs it, with any --a.b VALUE"
    show(f"{presets_text(list_presets(), line_width())}\n\n{hint}")
    return 0


def _help(options: argparse.Namespace, overrides: list[str]) -> int:
    # `repirl help --prm.reward` is understood, too.
    show(help_text([*options.names, *overrides], line_width()))
    return 0


def _completion(commands: Any, options: argparse.Namespace, overrides: list[str]) -> int:
    refuse_overrides(overrides)
    sections = [group.name for group in option_groups() if group.name]
    values = {"--preset": list_presets(), "help": sections, "completion": SHELLS, "--help": sections}
    show(completion_script(options.shell, list_commands(commands), all_options(), values).rstrip("\n"))
    return 0
