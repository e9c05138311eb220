"""docs/reference.md: commands, options, presets, training systems and Python names, from what the program itself says.

python -m repirl.apps.reference_page --write docs/reference.md    # the same: make reference
"""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import repirl
from repirl.cli import make_parser
from repirl.configfile import list_presets
from repirl.reference import Option, first_sentence, option_groups, preset_summary
from repirl.systems import SYSTEMS

_WIDTH = 120


def reference_page() -> str:
    """The page as Markdown."""
    parts = [
        "# Reference",
        _paragraph(
            "Commands, options, presets, training systems and Python names. This page is written by `make reference`; "
            "`repirl help`, `repirl presets` and `repirl COMMAND --help` say the same in a terminal."
        ),
        *_commands(),
        *_options(),
        "## Presets",
        _paragraph("For `--preset NAME`, or the key `preset` of a file; `repirl config --preset NAME` writes one out."),
        _list(f"`{name}`: {preset_summary(name)}" for name in list_presets()),
        "## Training systems",
        _paragraph("For `objective`. A system of your own is named as `module:name`."),
        _list(f"`{name}`: {system.summary}; learns from {', '.join(system.data)}" for name, system in SYSTEMS.items()),
        "## Python",
        _paragraph("What `from repirl import ...` gives; each docstring says more (`help(repirl.train)`)."),
        _list(f"`{name}`: {_summary(name)}" for name in repirl.__all__),
    ]
    return "\n\n".join(parts) + "\n"


def _commands() -> list[str]:
    [subparsers] = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    parts = ["## Commands"]
    for pseudo in subparsers._choices_actions:
        parser = subparsers.choices[pseudo.dest]
        parts += [
            f"### repirl {pseudo.dest}",
            _paragraph(f"{_sentence(pseudo.help)} {_sentence(parser.epilog)}".strip()),
        ]
        rows = [_argument(action) for action in parser._actions if "--help" not in action.option_strings]
        parts += [_list(rows)] if rows else []
    return parts


def _sentence(text: str | None) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _argument(action: argparse.Action) -> str:
    name = " ".join(action.option_strings) or str(action.metavar or action.dest)
    shown = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 else ""
    if action.choices and not action.metavar:
        shown = f" {'|'.join(map(str, action.choices))}"
    required = " (required)" if action.required and action.option_strings else ""
    return f"`{name}{shown}`{required}: {action.help or ''}".removesuffix(": ")


def _options() -> list[str]:
    parts = [
        "## Options",
        _paragraph("As `--NAME VALUE` after a command that takes a configuration, or as keys of its YAML file."),
    ]
    for group in option_groups():
        parts.append(f"### {group.name or 'run'}")
        parts.append(_paragraph(f"{group.title}."))
        if group.same_as is not None:
            parts[-1] = _paragraph(f"{group.title}: the options of `{group.same_as}`.")
        elif group.options:
            parts.append(_list(_option(option) for option in group.options))
    return parts


def _option(option: Option) -> str:
    default = "required" if option.default is None else f"default `{option.default}`"
    return f"`{option.name}` ({option.kind.replace(' | ', ' or ')}; {default}): {option.description}"


def _summary(name: str) -> str:
    value = getattr(repirl, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return {"SYSTEMS": "The table of training systems, by name.", "__version__": "The version of repirl."}[name]
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0]
    return first_sentence(" ".join(paragraph.split()))


def _paragraph(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False))


def _list(rows: Iterable[str]) -> str:
    lines: list[str] = []
    for row in rows:
        lines += textwrap.wrap(
            f"- {row}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Write the reference page of the documentation.")
    arguments.add_argument("--write", metavar="FILE", help="default: print it")
    target = arguments.parse_args().write
    if target is None:
        sys.stdout.write(reference_page())
    else:
        Path(target).write_text(reference_page(), encoding="utf-8")
