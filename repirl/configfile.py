"""Reads a configuration from a preset, a YAML file and overrides, and explains what is wrong with it.

A configuration is an optional preset, then a YAML file, then overrides `--a.b value`; later ones win. Relative paths
start at the working directory. Every mistake in a configuration raises `ConfigError` with one clear message.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from repirl.config import Config, ConfigError
from repirl.strict_yaml import YAMLProblem, dump_yaml, load_yaml


def list_presets() -> list[str]:
    """The names of the presets that come with repirl."""
    folder = resources.files("repirl") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_text(name: str) -> str:
    """The file of a preset that comes with repirl; errors as of `load_preset`."""
    if name not in list_presets():
        raise ConfigError(
            f"there is no preset {name!r}{_nearest(str(name), list_presets())}; shipped: {list_presets()}"
        )
    return (resources.files("repirl") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def load_preset(name: str) -> dict[str, Any]:
    """The values of a preset that comes with repirl.

    A preset with the key `extends: NAME` has the values of preset NAME, except where it gives its own.

    Raises:
        ConfigError: no preset has this name. The message lists all names.
    """
    values = load_yaml(preset_text(name))
    base = values.pop("extends", None)
    return values if base is None else merge(load_preset(base), values)


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Load a configuration: the preset, then the file, then the overrides; later ones win.

    Args:
        path: the YAML file, or None. Its key `preset` names the preset; an override `--preset` wins over it.
        overrides: ["--a.b", "value", "--c=value", ...]; see `parse_overrides`.

    Raises:
        ConfigError: the file cannot be read, or an option is unknown or wrong.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"configuration file {str(path)!r} does not exist")
        try:
            values = load_yaml(Path(path).read_text(encoding="utf-8-sig")) or {}
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except YAMLProblem as problem:
            raise ConfigError(f"{path} is not valid YAML: {problem}") from problem
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold options by name, got a {type(values).__name__}")
    changes = parse_overrides(overrides or [])
    preset = changes.pop("preset", values.pop("preset", None))
    return build_config(merge(merge(load_preset(preset) if preset is not None else {}, values), changes))


def build_config(values: dict[str, Any]) -> Config:
    """Make a configuration from plain values.

    Raises:
        ConfigError: a value is wrong. The message explains the first such value and counts the others.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn ["--a.b", "1"] or ["--a.b=1"] into {"a": {"b": 1}}.

    Values are read as YAML. But if an option takes a string, the value is used as it is; only `null` and `~` mean None
    if the option allows None.

    Raises:
        ConfigError: an argument is not an option, an option has no value, or a value is not valid YAML.
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or name == "--":
            raise ConfigError(f"unexpected argument {name!r}; options of the configuration are given as --a.b value")
        name, equals, text = name[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"option --{name} has no value; give --{name} VALUE")
            text = rest.pop(0)
        value = _read_value(name, text)
        *parents, last = name.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--{name} goes into {parent!r}, which another option sets to {place!r}")
        place[last] = value
    return values


def _read_value(name: str, text: str) -> Any:
    *parents, last = name.split(".")
    section = _section_at(tuple(parents))
    field = section.model_fields.get(last) if section else None
    annotation = field.annotation if field else None
    kinds = set(get_args(annotation)) or {annotation}
    if kinds - {type(None)} == {str}:
        return None if type(None) in kinds and text in ("null", "~") else text
    try:
        return load_yaml(text)
    except YAMLProblem as problem:
        raise ConfigError(f"the value {text!r} of --{name} is not valid YAML: {problem}") from problem


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` with the values of `changes`; sections are merged, other values are replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def describe(config: Config) -> str:
    """The resolved configuration as YAML."""
    return dump_yaml(config.model_dump(mode="json"))


def _nearest(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _section_at(location: tuple[Any, ...]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Config
    for key in location:
        field = section.model_fields.get(key) if section else None
        if field is None:
            return None
        candidates = [field.annotation, *get_args(field.annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return section


def _explain(error: ValidationError) -> str:
    first, more = error.errors()[0], error.error_count() - 1
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        section = _section_at(first["loc"][:-1])
        names = list(section.model_fields) if section else []
        parents = ".".join(map(str, first["loc"][:-1]))
        full = [f"{parents}.{name}" if parents else name for name in names]
        message = f"unknown option {path!r}{_nearest(path, full)}"
    elif first["type"] == "missing":
        message = f"option {path!r} is required"
    elif not path:
        message = first["msg"].removeprefix("Value error, ")
    else:
        message = f"option {path!r} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return message + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")
