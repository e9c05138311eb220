"""What a checkpoint is on disk: which there are, and whether their files are as they were written."""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from repirl.config import ConfigError
from repirl.distributed.world import World

logger = logging.getLogger(__name__)

# Of what this package writes and reads; it changes with the names and the meaning of what is in there.
FORMAT = 3
# A file's name in the checkpoint -> its size and checksum.
Manifest = dict[str, tuple[int, int]]


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Complete checkpoints in a run's `checkpoints` folder, oldest first."""
    numbered = [(int(m.group(1)), p) for p in Path(folder).glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(numbered)]


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint folder itself, or the newest sound one of a run's folder. ConfigError where there is none, or it is
    of another format."""
    path = Path(path)
    if any((path / name).is_file() for name in ("manifest.json", "trainer.json")):
        if (problem := find_damage(path)) is not None:
            raise ConfigError(f"checkpoint {str(path)!r} is damaged: {problem}")
        check_format(path)
        return path
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            check_format(newest := newest_sound(folder))
            return newest
    raise ConfigError(f"no checkpoint at {str(path)!r}: expected a step_N folder, or a run's folder that holds some")


def check_format(path: Path) -> dict[str, Any]:
    """What trainer.json holds; ConfigError where the checkpoint is not of the format that is read here."""
    content = json.loads((path / "trainer.json").read_text())
    if (version := content.get("format", 1)) != FORMAT:
        written = f"repirl {content['repirl']}" if "repirl" in content else "a repirl before 0.2"
        raise ConfigError(
            f"checkpoint {str(path)!r} has format {version}, written by {written}; this repirl reads format {FORMAT}: "
            "finish or export the run with the version that wrote it"
        )
    return content


def newest_sound(folder: str | os.PathLike, world: World | None = None) -> Path:
    """The newest checkpoint whose files are all as they were written; says which newer ones are not. Where a world is
    given, its processes look at a share of the files each, and all get the same answer.

    ConfigError where there is none: starting anew by itself would hide that a run was lost.
    """
    world = world or World(torch.device("cpu"))
    [checkpoints] = world.gather([list_checkpoints(folder)] if world.is_main else [])
    damaged: dict[str, str] = {}
    for path in reversed(checkpoints):
        problems = [p for p in world.gather([find_damage(path, world.rank, world.size)]) if p is not None]
        if not problems:
            if world.is_main:
                for name, problem in damaged.items():
                    logger.warning("checkpoint %s in %s is damaged (%s); using %s", name, folder, problem, path.name)
            return path
        damaged[path.name] = problems[0]
    told = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
    raise ConfigError(f"none of the checkpoints in {str(folder)!r} is sound ({told})")


def newest_with(folder: str | os.PathLike, *names: str) -> Path:
    """The newest checkpoint in which the files `names` are as they were written; the other files are not looked at.

    ConfigError where there is none.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        if (problem := find_damage(path, names=names)) is None:
            return path
        problems.append(f"{path.name}: {problem}")
    raise ConfigError(
        f"none of the checkpoints in {str(folder)!r} has a sound {' and '.join(names)} ({'; '.join(problems)})"
    )


def find_damage(path: Path, share: int = 0, num_shares: int = 1, names: Iterable[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files, None if they are as they were written; of every `num_shares`-th file
    only, from number `share` on, where several processes look; of the files `names` only, where these are given."""
    try:
        content = json.loads((path / "manifest.json").read_text())
        wanted = content.items() if names is None else [(name, content[name]) for name in names]
        files = [(path / name, int(size), int(expected)) for name, (size, expected) in wanted]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    if not files:
        return "manifest.json names no files"
    for file, size, expected in files[share::num_shares]:
        name = file.relative_to(path)
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if checksum(file) != expected:
                return f"{name} has other content than was written"
        except OSError as error:
            # A disk that fails gives back errors, not other bytes.
            return f"{name} cannot be read: {error}"
    return None


def checksum(file: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def make_manifest(folder: Path, files: Iterable[Path]) -> Manifest:
    """What the manifest says of files in `folder`."""
    return {str(p.relative_to(folder)): (p.stat().st_size, checksum(p)) for p in sorted(files)}
