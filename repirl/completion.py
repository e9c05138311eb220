"""Completion of the command line in bash, zsh and fish: one script for each, with all words in it.

The scripts start no Python, so that a press of the tab key takes no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repirl.config import ConfigError
from repirl.reference import Option

SHELLS = ("bash", "zsh", "fish")

# The words that may come next. It is the same text in both shells.
_WORDS = """\
    case $command:$previous in
{values}
    *)
        case $command in
{own}
        esac
        case $command in
        {configured}) words+=" {options}" ;;
        esac ;;
    esac
"""

_BASH = """\
# Completion of repirl in bash: source <(repirl completion bash)
_repirl() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=
    # --name=value is three words.
    [[ $current == = ]] && current=
    [[ $previous == = ]] && previous=${{COMP_WORDS[COMP_CWORD-2]}}
    (( COMP_CWORD == 1 )) && command= previous=
{words}
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
# Files, where no word fits.
complete -o default -F _repirl repirl
"""

_ZSH = """\
#compdef repirl
# Completion of repirl in zsh, after compinit: source <(repirl completion zsh)
_repirl() {{
    local current=${{words[CURRENT]}} previous=${{words[CURRENT-1]}} command=${{words[2]}}
    local -a typed=("${{words[@]}}")
    (( CURRENT == 2 )) && command= previous=
    if [[ $current == --*=* ]]; then
        previous=${{current%%=*}}
        compset -P '*='
    fi
    local words=
{words}
    # Files, where no word fits.
    compadd -- ${{=words}} || _files
}}
compdef _repirl repirl
"""


@dataclass(frozen=True)
class Command:
    """A command. options: its own, by name with the values that they take. configured: whether every option of the
    configuration can be given."""

    name: str
    help: str
    options: dict[str, tuple[str, ...]]
    configured: bool


def list_commands(subparsers: argparse._SubParsersAction) -> list[Command]:
    """The commands of a parser. A command takes overrides where it has an option `--config`."""
    commands = []
    for pseudo in subparsers._choices_actions:
        parser: argparse.ArgumentParser = subparsers.choices[pseudo.dest]
        options = {
            name: tuple(map(str, action.choices or ()))
            for action in parser._actions
            for name in action.option_strings
            if name.startswith("--")
        }
        commands.append(Command(pseudo.dest, pseudo.help or "", options, "--config" in options))
    return commands


def completion_script(
    shell: str, commands: Sequence[Command], options: Sequence[Option], values: Mapping[str, Sequence[str]]
) -> str:
    """The script of a shell.

    Args:
        shell: one of `SHELLS`.
        commands: of the command line.
        options: of the configuration, for the commands that take one.
        values: of further options, by name, such as the names of presets; a name without -- is a command, with the
            words that follow it.

    Raises:
        ConfigError: no script is made for the shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"there is no completion for {shell!r}, expected one of {', '.join(SHELLS)}")
    if shell == "fish":
        return _fish(commands, options, values)
    by_values: dict[str, list[str]] = {}
    for command in commands:
        for name, choices in command.options.items():
            by_values.setdefault(" ".join(choices), []).append(f"{command.name}:{name}")
    for option in options:
        by_values.setdefault(" ".join(option.choices), []).append(f"*:--{option.name}")
    for name, more in values.items():
        by_values.setdefault(" ".join(more), []).append(f"*:{name}" if name.startswith("--") else f"{name}:{name}")
    by_values.pop("", None)
    own = {"": " ".join(command.name for command in commands)}
    own |= {command.name: " ".join(command.options) for command in commands}
    text = _WORDS.format(
        values="\n".join(f'    {"|".join(names)}) words="{words}" ;;' for words, names in by_values.items()),
        own="\n".join(f'        "{name}") words="{words}" ;;' for name, words in own.items()),
        configured="|".join(command.name for command in commands if command.configured),
        options=" ".join(["--preset", *(f"--{option.name}" for option in options)]),
    )
    return (_BASH if shell == "bash" else _ZSH).format(words=text.rstrip())


def _fish(commands: Sequence[Command], options: Sequence[Option], values: Mapping[str, Sequence[str]]) -> str:
    lines = ["# Completion of repirl in fish: repirl completion fish | source", "complete -c repirl -e"]

    def add(condition: str, name: str, words: Sequence[str], text: str) -> None:
        line = f"complete -c repirl -n '{condition}' -l {name.removeprefix('--')} -d {_quoted(text)}"
        lines.append(line + (f" -x -a {_quoted(' '.join(words))}" if words else ""))

    for command in commands:
        lines.append(
            f"complete -c repirl -f -n __fish_use_subcommand -a {command.name} -d {_quoted(_first(command.help))}"
        )
        for name, choices in command.options.items():
            add(f"__fish_seen_subcommand_from {command.name}", name, choices, "")
        if command.name in values:
            more = _quoted(" ".join(values[command.name]))
            lines.append(f"complete -c repirl -f -n '__fish_seen_subcommand_from {command.name}' -a {more}")
    configured = "__fish_seen_subcommand_from " + " ".join(c.name for c in commands if c.configured)
    for name, words in values.items():
        if name.startswith("--"):
            add(configured, name, words, "")
    for option in options:
        add(configured, option.name, option.choices, _first(option.description))
    return "\n".join(lines) + "\n"


def _first(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
