"""Every option of a configuration as text: for `--help`, for the files of `repirl config`, for docs/reference.md.

All of it is read from the sections themselves (`repirl.config.Config`): types, limits, defaults and descriptions.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from repirl.config import Config, ConfigError
from repirl.configfile import preset_text
from repirl.dataconfig import SourceConfig
from repirl.strict_yaml import dump_yaml
from repirl.systems import SYSTEMS

# What sections are about. One that may be null has a description as an option.
TITLES = {
    "": "the run",
    "policy": "the model that answers",
    "policy.optimizer": "how the policy is updated",
    "prm": "the process reward model",
    "prm.optimizer": "how the PRM is updated",
    "critic": "the value model of dqo and online-dqo",
    "critic.optimizer": "how the critic is updated",
    "data": "what is read",
    "verifier": "what judges responses",
    "rollout": "how responses are sampled",
    "rollout.vllm": "of the engines vllm and vllm_server",
    "irl": "how the PRM learns by inverse reinforcement learning",
    "prime": "of objective prime",
    "discriminator": "of objective airl",
    "iq": "of objective iq-learn",
    "dpo": "of objectives dpo and online-dpo",
    "dqo": "of objectives dqo and online-dqo",
    "step_prm": "of objective math-shepherd",
    "label": "of `repirl label`",
    "loss": "the policy's loss",
    "batch": "how a batch is cut",
    "parallel": "several processes",
    "eval": "evaluation on held-out data",
    "checkpoint": "what is saved, and when",
    "log": "what is reported, and where",
}


@dataclass(frozen=True)
class Option:
    """One option. name: as in `--name VALUE`. kind: its type, in words. default: as it is written in YAML; None where
    the option is required. choices: its values, where they can be counted."""

    name: str
    kind: str
    default: str | None
    description: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """A section of the configuration, by its name with dots, "" for the run's own options. same_as: the section that
    was listed before and has the same options; `options` is empty then."""

    name: str
    title: str
    options: tuple[Option, ...]
    same_as: str | None = None


def option_groups() -> list[Group]:
    """All options by section, in the configuration's order."""
    groups: list[Group] = []
    seen: dict[tuple[type, str], str] = {}

    def add(section: type[BaseModel], values: BaseModel | None, name: str, title: str) -> None:
        prefix = f"{name}." if name else ""
        options, parts = [], []
        for key, field in section.model_fields.items():
            default = getattr(values, key) if values is not None else field.default
            inner = section_of(field)
            if inner is not None:
                parts.append((inner, default, prefix + key, field.description))
            if inner is None or (field.description is not None and not isinstance(default, BaseModel)):
                options.append(_option(prefix + key, field, default))
        # Equal types with equal defaults are listed once.
        mark = (section, repr(values))
        if mark in seen:
            groups.append(Group(name, title, (), same_as=seen[mark]))
            return
        seen[mark] = name
        groups.append(Group(name, title, tuple(options)))
        for inner, default, full, description in parts:
            add(inner, default if isinstance(default, BaseModel) else None, full, TITLES.get(full) or description or "")

    add(Config, None, "", TITLES[""])
    return groups


def all_options() -> list[Option]:
    """Every option, those of equal sections under each of their names."""
    groups = {group.name: group for group in option_groups()}
    options: list[Option] = []
    for name, group in groups.items():
        if group.same_as is None:
            options += group.options
            continue
        for other in groups.values():
            if other.name == group.same_as or other.name.startswith(f"{group.same_as}."):
                for option in other.options:
                    options.append(Option(**{**vars(option), "name": name + option.name[len(group.same_as) :]}))
    return options


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that an option is or may be; None where it is a plain value."""
    for part in _parts(field.annotation):
        for candidate in (part, *get_args(part)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                return candidate
    return None


def _option(name: str, field: FieldInfo, default: Any) -> Option:
    shown = None if default is PydanticUndefined else write_value(default)
    choices = [c for part in _parts(field.annotation) for c in _choices(part)]
    return Option(name, _kind(field.annotation, field.metadata), shown, _described(name, field), tuple(choices))


def _described(name: str, field: FieldInfo) -> str:
    if field.description is None:
        raise ValueError(f"option {name} has no description")
    return field.description


def write_value(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    text = dump_yaml(value).removesuffix("...\n").strip()
    return text if "\n" not in text else json.dumps(value)


def _parts(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(part for inner in get_args(annotation) for part in _parts(inner))
    return (annotation,)


def _choices(part: Any) -> tuple[str, ...]:
    if get_origin(part) is Literal:
        return tuple(map(str, get_args(part)))
    return {bool: ("true", "false"), NoneType: ("null",)}.get(part, ())


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with its limits: `int >= 1`, `float > 0 | null`, `clip | cispo`."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [m for part in more for m in (part.metadata if isinstance(part, FieldInfo) else [part])])
    if get_origin(annotation) in (Union, UnionType):
        # Limits of the whole hold for its numbers.
        return " | ".join(_kind(part, metadata) for part in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0], [])}"
    if get_origin(annotation) is tuple:
        return f"[{', '.join(_kind(part, []) for part in get_args(annotation))}]"
    if get_origin(annotation) is dict:
        return "mapping"
    if choices := _choices(annotation):
        return " | ".join(choices)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "path | section" if issubclass(annotation, SourceConfig) else "section"
    name = {str: "text", int: "int", float: "float"}.get(annotation, "any")
    return name + _limits(metadata) if annotation in (int, float) else name


def _limits(metadata: list[Any]) -> str:
    shown = []
    for sign, key in ((">=", "ge"), (">", "gt"), ("<=", "le"), ("<", "lt")):
        values = [getattr(m, key) for m in metadata if getattr(m, key, None) is not None]
        shown += [f" {sign} {value:,}".replace(",", "") for value in values]
    return ",".join(shown)


def help_text(names: list[str] | None = None, width: int = 100) -> str:
    """What `repirl help` prints.

    Args:
        names: sections, options or parts of options' names; empty for everything.
        width: of a line, in characters.

    Raises:
        ConfigError: nothing has a name like that.
    """
    if not names:
        groups = option_groups()
        sections = ", ".join(group.name for group in groups if group.name and "." not in group.name)
        return "\n".join(
            [
                *textwrap.wrap(
                    "Options of the configuration: --NAME VALUE on the command line, or a key of the YAML file. "
                    f"Sections: {sections}. One of them alone: repirl help SECTION",
                    width,
                ),
                "",
                *(_group_text(group, width) for group in groups),
                "One section: repirl help SECTION; options whose name has a word in it: repirl help WORD",
            ]
        )
    return "\n".join(_one_help(name.strip().removeprefix("--"), width) for name in names)


def _one_help(name: str, width: int) -> str:
    groups, options = option_groups(), all_options()
    of_section = [g for g in groups if g.name and (g.name == name or g.name.startswith(f"{name}."))]
    if of_section:
        own = [o for o in options if o.name == name]
        head = "\n".join(_option_text(o, width) for o in own)
        # A section that is listed elsewhere is shown here all the same.
        groups_text = []
        for group in of_section:
            if group.same_as is not None:
                inside = tuple(o for o in options if o.name.startswith(f"{group.name}."))
                group = Group(group.name, group.title, inside)
            groups_text.append(_group_text(group, width))
        return "\n".join(filter(None, [head, *groups_text]))
    matching = [o for o in options if o.name == name] or [o for o in options if name and name in o.name]
    if not matching:
        known = [o.name for o in options] + [g.name for g in groups if g.name]
        last = {o.name.rpartition(".")[2] for o in options}
        close = difflib.get_close_matches(name, [*known, *sorted(last)], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"no section or option of the configuration is called {name!r}{hint}; see repirl help")
    text = "\n".join(_option_text(option, width) for option in matching)
    if name == "objective":
        text += "\n" + "\n".join(_row(key, system.summary, width) for key, system in SYSTEMS.items()) + "\n"
    return text


def _group_text(group: Group, width: int) -> str:
    title = f"{group.name}: {group.title}" if group.name else group.title
    lines = textwrap.wrap(title, width)
    if group.same_as is not None:
        return "\n".join([*lines, f"  as {group.same_as}", ""])
    return "\n".join([*lines, *(_option_text(option, width) for option in group.options), ""])


def _option_text(option: Option, width: int) -> str:
    default = "required" if option.default is None else f"default: {option.default}"
    head = textwrap.wrap(
        f"--{option.name}  {option.kind}  ({default})",
        width,
        initial_indent="  ",
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )
    return "\n".join([*head, *_indented(option.description, 6, width)])


def _row(name: str, text: str, width: int, column: int = 24) -> str:
    first, *rest = textwrap.wrap(text, max(width - column - 2, 30), break_on_hyphens=False)
    return "\n".join([f"  {name:<{column - 2}}  {first}", *(" " * (column + 2) + line for line in rest)])


def _indented(text: str, indent: int, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def presets_text(names: list[str], width: int = 100) -> str:
    """What `repirl presets` prints: each preset's name, and what it is."""
    column = max(map(len, names)) + 4
    return "\n".join(_row(name, preset_summary(name), width, column) for name in names)


def preset_summary(name: str) -> str:
    """The first sentence of a preset's file."""
    comment = []
    for line in preset_text(name).splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        comment.append(line.removeprefix("#").strip())
    return first_sentence(" ".join(comment))


def first_sentence(text: str) -> str:
    """The first sentence of a text of one line, with a full stop."""
    # Not behind "et al." or "Dr.".
    return re.split(r"(?<!al)(?<!Dr)\.(?=\s+[A-Z]|$)", text)[0].removesuffix(":") + "."


def commented_yaml(config: Config, width: int = 110) -> str:
    """A configuration as YAML with every option that it reads, each under its description.

    Sections that only other training systems read are left out; they are at their defaults. `load_yaml` and
    `build_config` make the same configuration of it.
    """
    readers: dict[str, list[str]] = {}
    for name, system in SYSTEMS.items():
        for section in system.sections:
            readers.setdefault(section, []).append(name)
    left_out = [section for section in readers if section not in config.system.sections]
    lines = [
        "# Every option that this run reads. What is deleted here takes its default, which a comment gives where it is",
        "# another value. `repirl help NAME` explains an option or a section.",
    ]
    for key, field in type(config).model_fields.items():
        if key not in left_out:
            lines += _commented(key, field, getattr(config, key), "", width)
    if left_out:
        lines += ["", *_comment("Not read by this objective, and left out: " + ", ".join(left_out), "", width)]
    return "\n".join(lines) + "\n"


def _commented(key: str, field: FieldInfo, value: Any, indent: str, width: int) -> Iterator[str]:
    if isinstance(value, BaseModel):
        if not indent:
            yield ""
        if field.description is not None:
            yield from _comment(field.description, indent, width)
        elif title := TITLES.get(key):
            yield from _comment(title, indent, width)
        yield f"{indent}{key}:"
        for name, part in type(value).model_fields.items():
            yield from _commented(name, part, getattr(value, name), indent + "  ", width)
        return
    default = field.default
    changed = default is not PydanticUndefined and default != value
    note = f" (default: {write_value(default)})" if changed else ""
    yield from _comment(_described(key, field) + note, indent, width)
    if isinstance(value, list | tuple):
        value = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in value]
    if isinstance(value, list) and all(isinstance(part, int | float) for part in value):
        yield f"{indent}{key}: {write_value(value)}"
        return
    yield from (indent + line if line else line for line in dump_yaml({key: value}).splitlines())


def _comment(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
        break_long_words=False,
    )
