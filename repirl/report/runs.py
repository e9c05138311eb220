"""What the folder of a run holds for its report."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repirl.checkpoint.identity import stored_configuration
from repirl.config import ConfigError
from repirl.report.log import read_metrics
from repirl.report.record import read_starts
from repirl.strict_yaml import YAMLProblem, load_yaml


@dataclass
class RunRecord:
    """A run as its folder tells it.

    Args:
        name: by which it is called on the page; no other run has it.
        folder: its output_dir.
        lines: metrics, one a turn.
        starts: entries of run.json; none for a run of before there was one.
        configuration: options by dotted name, of the newest start; empty where it is not known.
    """

    name: str
    folder: Path
    lines: list[dict[str, Any]]
    starts: list[dict[str, Any]] = field(default_factory=list)
    configuration: dict[str, Any] = field(default_factory=dict)

    def option(self, name: str) -> Any:
        """None where it is not known."""
        return self.configuration.get(name)

    def values(self, metric: str) -> tuple[list[float], list[float | None]]:
        """Turns, and the metric there: None where it was not finite. Turns without it are left out."""
        lines = [line for line in self.lines if metric in line]
        return [line["step"] for line in lines], [line[metric] for line in lines]


def read_runs(folders: Sequence[str | os.PathLike]) -> list[RunRecord]:
    """Runs, each with a name of its own.

    Raises:
        ConfigError: a folder is given twice, or is not that of a run.
        LogError: metrics cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise ConfigError(f"--run {str(path)!r} is given twice: name each run once")
    return [_read(path, name) for path, name in zip(paths, run_names(paths), strict=True)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    most = max(map(len, parts), default=0)
    for count in range(1, most + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(folder: Path, name: str) -> RunRecord:
    if not folder.is_dir():
        raise ConfigError(f"--run {str(folder)!r} is no folder: expected the output_dir of a run")
    if not (folder / "metrics.jsonl").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
        hint = f"; there are runs in it: {', '.join(inside[:8])}" if inside else ""
        raise ConfigError(f"--run {str(folder)!r} has no metrics.jsonl: expected the output_dir of a run{hint}")
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ConfigError(f"{str(folder / 'metrics.jsonl')!r} has no records yet: wait for the first turn of the run")
    starts = read_starts(folder)
    configuration = starts[-1].get("configuration") if starts else _checkpoint_configuration(folder)
    flat = dict(flattened(configuration)) if isinstance(configuration, Mapping) else {}
    return RunRecord(name, folder, lines, starts, flat)


def _checkpoint_configuration(folder: Path) -> Any:
    try:
        return load_yaml(stored_configuration(folder).read_text(encoding="utf-8"))
    except (ConfigError, YAMLProblem, OSError, UnicodeDecodeError):
        # It saved nothing, or an older version of repirl wrote it.
        return None


def flattened(options: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each option; sections are opened, other values stay."""
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(option, its value in each run) of the options that are not the same in all runs whose configuration is known,
    apart from output_dir."""
    known = [run for run in runs if run.configuration]
    names = dict.fromkeys(name for run in known for name in run.configuration)
    rows = []
    for name in names:
        values = [option_text(run, name) for run in runs]
        if name != "output_dir" and len({v for run, v in zip(runs, values, strict=True) if run in known}) > 1:
            rows.append((name, values))
    return rows


def option_text(run: RunRecord, name: str) -> str:
    """The value of an option as text."""
    if not run.configuration:
        return "not recorded"
    if name not in run.configuration:
        return "-"
    value = run.configuration[name]
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def pick(run: RunRecord, path: str, *, start: int = -1) -> Any:
    """Part of an entry of run.json by dotted path; None where it is not there."""
    value: Any = run.starts[start] if run.starts else None
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
