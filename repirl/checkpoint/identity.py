"""Whether a run that is resumed is still the same experiment: its options and fingerprints beside the checkpoint's.

An option that changes what is learned has to be named by `--changed`, and so has other content of models and data. What
is free to change is printed. A new option is not free until it stands in one of the lists here.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic_core import to_jsonable_python

from repirl.checkpoint.manifest import check_format, list_checkpoints, newest_with
from repirl.checkpoint.save import Checkpointer
from repirl.config import Config, ConfigError
from repirl.configfile import load_config
from repirl.section import Section

_LEARNERS = ("policy", "prm", "critic")
# Where and how fast a run computes, what it writes and what it reports. What it learns stays the same, but for rounding
# and, with another engine, for the random numbers of the sampling. A section stands for all of its options.
FREE = [
    *("output_dir", "device", "num_threads", "offload_idle", "batch", "parallel", "eval", "checkpoint", "log"),
    *("verifier.processes", "verifier.code.judge_twice", "verifier.code.allow_unsandboxed"),
    *("rollout.engine", "rollout.max_sequences", "rollout.vllm"),
    # Of `repirl label`.
    "label",
    *(
        f"{learner}.{option}"
        for learner in _LEARNERS
        for option in ("gradient_checkpointing", "activation_offload", "compile", "optimizer.max_skipped_updates")
    ),
]
# What leads to content that has a fingerprint. A path may change, the content may not.
BY_CONTENT = [
    *(f"{learner}.{option}" for learner in _LEARNERS for option in ("model", "gguf_file")),
    *(f"data.{source}" for source in ("train", "eval", "experts", "pairs", "trajectories", "steps", "eval_steps")),
    *(f"data.{column}_column" for column in ("prompt", "answer", "solution", "verifier")),
    *("data.step_separator", "data.solution_remove", "data.verify_experts", "data.max_experts_per_prompt"),
    *("data.answers", "data.max_prompt_tokens", "data.max_expert_tokens", "data.overlong"),
]
# Longest value that a message shows.
_MAX_SHOWN = 120


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on. path: the checkpoint. changed: options and fingerprints that are not the checkpoint's."""

    path: Path
    changed: frozenset[str] = frozenset()

    def begins_anew(self, option: str) -> bool:
        """Whether there is no place to go on from in the data that an option leads to."""
        return not self.changed.isdisjoint({option, "seed"})


@dataclass(frozen=True)
class Change:
    """One difference. name: of the option, or of the option that leads to the content. needs_name: whether it is
    refused unless named."""

    name: str
    text: str
    needs_name: bool


def choose_checkpoint(
    checkpointer: Checkpointer, config: Config, fingerprints: dict[str, str], changed: Sequence[str]
) -> Resumption:
    """The newest sound checkpoint, after a look at whether this is still the run that wrote it. All processes call
    this; the main one prints what has changed.

    Args:
        checkpointer: the run's.
        config: as the run is to go on.
        fingerprints: of its models and data, as they are now.
        changed: what may be different; see `is_named`.

    Raises:
        ConfigError: something else is different, or a name in `changed` is none. Also as `Checkpointer.choose`.
    """
    path, world = checkpointer.choose(), checkpointer.world
    changes, problem = list[Change](), None
    if world.is_main:
        try:
            changes = find_changes(path, config, fingerprints)
            for line in judge(changes, changed, path, fingerprints):
                print(line, flush=True)
        except ConfigError as error:
            problem = str(error)
    # All processes go on, or none.
    [problem] = world.gather([problem] if world.is_main else [])
    if problem is not None:
        raise ConfigError(problem)
    return Resumption(path, frozenset(world.gather([change.name for change in changes])))


def stored_configuration(folder: str | Path) -> Path:
    """The configuration file of the newest checkpoint in which it is as it was written, in a run's folder.

    Raises:
        ConfigError: there is none, or the checkpoint is of another format.
    """
    if Path(folder).is_file():
        raise ConfigError(
            f"--resume {str(folder)!r} is a file, expected the folder of a run; a configuration is given by --config"
        )
    checkpoints = Path(folder) / "checkpoints"
    if not list_checkpoints(checkpoints):
        raise ConfigError(f"there is no run to resume in {str(folder)!r}: expected its output_dir, with checkpoints")
    path = newest_with(checkpoints, "config.yaml", "trainer.json")
    check_format(path)
    return path / "config.yaml"


def find_changes(path: Path, config: Config, fingerprints: dict[str, str]) -> list[Change]:
    """How a configuration, with the fingerprints of what it names, differs from a checkpoint's.

    Raises:
        ConfigError: the checkpoint is of another format, or its configuration cannot be read.
    """
    before = check_format(path)["fingerprints"]
    try:
        stored = load_config(path / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"the configuration of checkpoint {str(path)!r} cannot be used: {error}") from error
    sections = (*stored.trained_sections.values(), *config.trained_sections.values())
    free = [*FREE, *BY_CONTENT]
    if all(section.optimizer.schedule == "constant" for section in sections):
        # No learning rate depends on how long the run will be.
        free.append("steps")
    changes = [
        Change(name, f"{name} {_shown(old)} -> {_shown(new)}", not is_within(name, free))
        for name, old, new in differing_options(stored, config)
    ]
    for name in sorted({*before, *fingerprints}):
        old_print, new_print = (prints.get(name, "nothing") for prints in (before, fingerprints))
        if old_print != new_print:
            changes.append(Change(name, f"content of {name} ({old_print} -> {new_print})", True))
    return changes


def differing_options(before: Section, now: Section, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value before, value now) of each option that differs; of a section that only one of both has, its name."""
    for field in type(now).model_fields:
        name, old, new = f"{prefix}{field}", getattr(before, field), getattr(now, field)
        if isinstance(old, Section) and isinstance(new, Section):
            yield from differing_options(old, new, f"{name}.")
        elif old != new:
            yield name, old, new


def option_names(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """The names of all options. One whose value may be a section or null counts itself, too."""
    for field, info in section.model_fields.items():
        kinds = get_args(info.annotation) if get_origin(info.annotation) in (Union, types.UnionType) else ()
        inner = next((k for k in (*kinds, info.annotation) if isinstance(k, type) and issubclass(k, Section)), None)
        if inner is None or kinds:
            yield f"{prefix}{field}"
        if inner is not None:
            yield from option_names(inner, f"{prefix}{field}.")


def is_named(name: str, changed: Sequence[str]) -> bool:
    """Whether one of `changed` means an option: by its whole name, by its last parts (`lr` is the learning rate of
    both sides), or by that of a section that it is in (`data.train`)."""
    return is_within(name, changed) or any(name.endswith(f".{last}") for last in changed)


def is_within(name: str, names: Sequence[str]) -> bool:
    """Whether an option or its section is one of `names`."""
    return any(name == other or name.startswith(f"{other}.") for other in names)


def judge(changes: list[Change], changed: Sequence[str], path: Path, fingerprints: dict[str, str]) -> list[str]:
    """Lines to print of changes that are allowed.

    Args:
        changes: what is different.
        changed: what may be; see `is_named`.
        path: the checkpoint.
        fingerprints: they have names, too.

    Raises:
        ConfigError: a change is not allowed, or a name in `changed` means nothing.
    """
    known = [*dict.fromkeys([*option_names(), *fingerprints, *(change.name for change in changes)])]
    for name in changed:
        if not any(is_named(option, [name]) for option in known):
            near = difflib.get_close_matches(name, [*known, *(option.rpartition(".")[2] for option in known)], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"--changed names {name!r}, and there is no such option{hint}")
    if refused := [change for change in changes if change.needs_name and not is_named(change.name, changed)]:
        names = ",".join(dict.fromkeys([*changed, *(change.name for change in refused)]))
        folder = path.parent.parent
        raise ConfigError(
            f"this is not the run that wrote checkpoint {str(path)!r}: {'; '.join(c.text for c in refused)}. Go on "
            f"with the run as it was (repirl train --resume {folder} takes its own configuration), or say that the "
            f"change is meant: --resume --changed {names}"
        )
    unchanged = [name for name in changed if not any(is_named(change.name, [name]) for change in changes)]
    return [
        *(f"changed: {change.text}" for change in changes),
        *(f"--changed names {name!r}, which is as it was" for name in unchanged),
    ]


def _shown(value: Any) -> str:
    text = json.dumps(to_jsonable_python(value), ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
