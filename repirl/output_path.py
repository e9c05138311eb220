"""Where commands write: what is asked of an output's name, by the same rule for all of them, before anything is done.

A folder that is not there is made. What is there stays: an input is never an output, and a file is only replaced where
the command says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from repirl.config import ConfigError, first_line

# What an output may hold. Readers go by the endings of names; another ending than these may stand for anything.
LINES, JSON, PAGE, YAML = "JSON lines", "JSON", "an HTML page", "YAML"
ENDINGS = {LINES: (".jsonl", ".ndjson", ".json"), JSON: (".json",), PAGE: (".html", ".htm"), YAML: (".yaml", ".yml")}
_OTHERS = ".csv .tsv .parquet .arrow .feather .xlsx .md .pdf .gz .bz2 .xz .zst .zip .tar .pt .bin .safetensors .gguf"
_KNOWN = {*_OTHERS.split(), *(ending for some in ENDINGS.values() for ending in some)}
# Of files that are written beside an output.
_BESIDE = (".partial", ".tmp", ".meta.json", ".meta.json.tmp")


def check_file(
    output: str | os.PathLike,
    holds: str,
    inputs: Iterable[str | os.PathLike] = (),
    *,
    replaces: bool = False,
    option: str = "--output",
) -> Path:
    """The path of an output that is a file, which can be written as far as that can be seen.

    Args:
        output: its name.
        holds: what will be in it, a key of ENDINGS.
        inputs: files and folders that are read, "folder:split" included. Names of the hub do no harm.
        replaces: whether a file that is there may be replaced, or gone on with.
        option: that gives it, for messages.

    Raises:
        ConfigError: it is a folder, an input, there already, named as what it will not be, or cannot be written.
    """
    name, path = os.fspath(output), Path(output)
    if not name:
        raise ConfigError(f"{option} is empty, expected the name of a file")
    with _explained(option, name):
        if path.is_dir() or name.endswith(os.sep):
            raise ConfigError(f"{option} {name!r} is a folder, expected the name of a file")
        for source in _places(inputs):
            _refuse_input(option, name, path, source)
            if source.is_dir() and source.resolve() in path.resolve().parents:
                raise ConfigError(
                    f"{option} {name!r} is in the folder {str(source)!r}, whose files are the input: choose another "
                    "folder"
                )
        _check_ending(option, name, path, holds)
        if path.exists() and not path.is_file():
            raise ConfigError(f"{option} {name!r} is a device or the like, expected the name of a file")
        if path.exists() and not replaces:
            raise ConfigError(f"{option} {name!r} exists already: choose another file")
        _check_parent(option, name, path)
    return path


def check_folder(
    output: str | os.PathLike,
    names: Sequence[str] = (),
    inputs: Iterable[str | os.PathLike] = (),
    *,
    is_new: bool = False,
    option: str = "--output",
) -> Path:
    """The path of an output that is a folder, which is there or can be made.

    Args:
        output: its name.
        names: of the files and folders that it gets.
        inputs: as of `check_file`; models, too.
        is_new: whether it may hold none of `names` yet.
        option: that gives it, for messages.

    Raises:
        ConfigError: it is a file, would replace an input, holds a result already, or cannot be written.
    """
    name, path = os.fspath(output), Path(output)
    if not name:
        raise ConfigError(f"{option} is empty, expected the name of a folder")
    with _explained(option, name):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{option} {name!r} is a file, expected a folder: choose another name")
        for source in _places(inputs):
            for part in names:
                if is_same(path / part, source):
                    raise ConfigError(
                        f"{option} {name!r} would get a {part!r} of its own, but {str(source)!r} is an input: choose "
                        "another folder"
                    )
        if is_new and (there := [part for part in names if (path / part).exists()]):
            raise ConfigError(f"{option} {name!r} holds {there[0]!r} already: choose another folder")
        _check_parent(option, name, path / "any")
    return path


def _places(inputs: Iterable[str | os.PathLike]) -> Iterator[Path]:
    """The inputs that are on this machine."""
    for given in inputs:
        for name in (os.fspath(given), os.fspath(given).rpartition(":")[0]):
            if name and Path(name).exists():
                yield Path(name)
                break


def _refuse_input(option: str, name: str, path: Path, source: Path) -> None:
    if is_same(path, source):
        raise ConfigError(f"{option} {name!r} is an input, which would be lost: choose another file")
    for ending in _BESIDE:
        if is_same(path.with_name(path.name + ending), source):
            raise ConfigError(
                f"{option} {name!r} is written with the help of {str(source)!r}, which is an input: choose another file"
            )


def is_same(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two names are of one file, folder or data set, however they are written."""
    are_there = os.path.exists(one) and os.path.exists(other)
    return Path(one) == Path(other) or (are_there and os.path.samefile(one, other))


def _check_ending(option: str, name: str, path: Path, holds: str) -> None:
    endings, base = ENDINGS[holds], path
    if path.suffix.lower() not in _KNOWN or path.suffix.lower() in endings:
        return
    while base.suffix.lower() in _KNOWN:
        base = base.with_suffix("")
    raise ConfigError(
        f"{option} {name!r} would hold {holds}, and its name says something else: call it "
        f"{str(base.with_name(base.name + endings[0]))!r}"
    )


def _check_parent(option: str, name: str, path: Path) -> None:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {name!r} cannot be written: {str(folder)!r} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {name!r} cannot be written: the folder {str(folder)!r} is not yours to write in")


@contextmanager
def _explained(option: str, name: str) -> Iterator[None]:
    """Names that no file can have, and folders that may not be looked into."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {name!r:.200} cannot be written: {first_line(error)}") from error
