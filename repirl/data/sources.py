"""Rows of data sets: files of JSON lines, CSV or Parquet, folders of them, and the hub's."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from repirl.config import first_line
from repirl.data.errors import DataError
from repirl.data.values import Place
from repirl.dataconfig import SourceConfig

# What files may begin with that are not what their names say, and what to do.
_STARTS = {
    b"\xff\xfe": "UTF-16 text, expected UTF-8: convert it (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16 text, expected UTF-8: convert it (iconv -f utf-16 -t utf-8)",
    b"\x1f\x8b": "compressed: give it a name that ends with .gz",
    b"PK\x03\x04": "a ZIP file: unpack it",
    b"PAR1": "a Parquet file: give it a name that ends with .parquet",
    b"version https://git-lfs": "a pointer of Git LFS, not the data itself: run git lfs pull",
}
# Characters of one field of a CSV file; Python's own limit is 131072.
_MAX_FIELD = 1 << 27


def read_rows(source: SourceConfig, split: str) -> Iterator[tuple[int, Place, dict[str, Any]]]:
    """(row number from 0, its place, row) of a data set.

    Args:
        source: where it is.
        split: of a folder or a hub's data set, where `source` names none.

    Raises:
        DataError: which names the line or row, for all that cannot be read.
    """
    number = -1
    for place, row in _rows(source, source.split or split):
        number += 1
        yield number, place, row
    if number < 0:
        raise DataError(f"data file {source.path!r} is empty: expected one JSON object a line, or rows of a table")


def _rows(source: SourceConfig, split: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    path = Path(source.path)
    try:
        is_file, is_folder, is_there = path.is_file(), path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"data file {source.path!r} cannot be read: {first_line(error)}") from error
    if is_file:
        for option in ("name", "split", "revision"):
            if (value := getattr(source, option)) is not None:
                raise DataError(f"{source.path!r} is a file, which has no {option} ({value!r}): leave it out")
        yield from _read_file(source.path, path)
    elif is_folder and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        yield from _saved(source, split)
    elif is_folder or (not is_there and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)", source.path)):
        for label, file in _files(source, split):
            yield from _read_file(label, file)
    elif is_there:
        raise DataError(f"data file {source.path!r} is neither a file nor a folder: it has to be read more than once")
    else:
        raise DataError(f"data file {source.path!r} does not exist (a data set of the hub is called owner/name)")


def _read_file(label: str, path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    """label: name of the file, for messages and for its kind; `path` may be a download's."""
    name = label.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet(label, path)
    if name.endswith((".csv", ".tsv")):
        return _csv(label, path, "\t" if name.endswith(".tsv") else ",")
    return _json_lines(label, path)


def _lines(label: str, path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line."""
    try:
        with gzip.open(path) if label.lower().endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    for start, what in _STARTS.items():
                        if line.startswith(start):
                            raise DataError(f"{label} is {what}")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{label}, line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at {error.start}): "
                        "convert the file, such as by iconv -f latin1 -t utf-8"
                    ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{label} cannot be read: {first_line(error)}") from error


def _json_lines(label: str, path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, line in _lines(label, path):
        if not line.strip():
            continue
        place = Place(label, f"line {number}")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{label}, line {number} is not valid JSON: {error}") from error
        except RecursionError as error:
            raise place.error(
                "lists or objects are nested too deeply to be read; expected columns with text"
            ) from error
        except ValueError as error:
            raise place.error(f"a number is too long to be read ({first_line(error).split(';')[0]})") from error
        if not isinstance(row, dict):
            what = "; one JSON list over the whole file has to become one object a line" if number == 1 else ""
            raise DataError(f"{label}, line {number} is a {type(row).__name__}, expected a JSON object{what}")
        yield place, row


def _csv(label: str, path: Path, delimiter: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    csv.field_size_limit(_MAX_FIELD)
    # Every value is text: 007 and NA stay what they are.
    reader = csv.reader((line for _, line in _lines(label, path)), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise DataError(f"{label} has two columns {twice[0]!r}: rename one")
        for values in reader:
            place = Place(label, f"line {reader.line_num}")
            if not values:
                continue
            if len(values) != len(header):
                raise place.error(f"{len(values)} fields, but the header has {len(header)}")
            yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{label}, line {reader.line_num} is not valid CSV: {error}") from error


def _parquet(label: str, path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield Place(label, f"row {number}"), row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{label} cannot be read as Parquet after row {number} (from 0): {first_line(error)}"
        ) from error


def _files(source: SourceConfig, split: str) -> list[tuple[str, Path]]:
    """(name, local path) of the files of a folder's or hub data set's split, downloaded where need be."""
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(source.path, name=source.name, revision=source.revision)
        files_of: dict[str, list[str]] = {
            str(key): list(files) for key, files in (builder.config.data_files or {}).items()
        }
        _check_split(source, split, files_of)
        local = datasets.DownloadManager().download(files_of[split])
    except DataError:
        raise
    except Exception as error:
        # Of the hub, the network, a file system, or a data set's own description.
        where = "the folder" if Path(source.path).is_dir() else "no file or folder here, and from the hub the data set"
        raise DataError(f"{where} {source.path!r} cannot be loaded: {first_line(error)}") from error
    return [(name, Path(file)) for name, file in zip(files_of[split], local, strict=True)]


def _check_split(source: SourceConfig, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise DataError(f"{source.path!r} has no split {split!r}, it has {sorted(splits)}: set the split beside path")


def _saved(source: SourceConfig, split: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Rows of a folder that `save_to_disk` of datasets wrote."""
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(source.path)
    except Exception as error:
        raise DataError(f"the folder {source.path!r} cannot be loaded: {first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        _check_split(source, split, loaded)
        loaded = loaded[split]
    rows: Iterable[dict[str, Any]] = loaded
    for number, row in enumerate(rows):
        yield Place(source.path, f"row {number}"), row
