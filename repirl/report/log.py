"""What a run writes by turns: files of JSON lines, and TensorBoard's."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from repirl.config import RunError, first_line

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LogError(RunError):
    """A file of the run could not be written or read; the lines before are untouched."""


class RowFile:
    """A file of JSON lines that a run appends to. What was appended is on disk when `append` returns.

    Args:
        path: the file; it is made if there is none.
        what: the name of its content in messages, in the plural.

    Raises:
        LogError: here and in `append`, where it cannot be written. Nothing of what was to be appended is left in it.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        with explained(path, what):
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._file).st_size

    def append(self, content: bytes) -> None:
        """Add whole lines."""
        with explained(self.path, self.what):
            before = os.fstat(self._file)
            if not os.path.samestat(os.stat(self.path), before):
                raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")
            try:
                while content:
                    content = content[os.write(self._file, content) :]
                os.fsync(self._file)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, before.st_size)
                raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def as_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class MetricsLogger:
    """Appends one line for each step to OUTPUT_DIR/metrics.jsonl. The line is on disk when `log` returns.

    Values that are not finite are written as null, and their names under "nonfinite".

    Args:
        output_dir: the run's folder.
        tensorboard: write TensorBoard files, too. Where that fails, a warning says so, and the run goes on without.
        start_step: the number of finished steps of a resumed run; 0 for a new one. Lines of later steps, and an
            incomplete last line, are removed, so that no step is in the file twice. Lines that are no records are moved
            to metrics.damaged.jsonl.

    Raises:
        LogError: metrics.jsonl cannot be read or written.
    """

    def __init__(self, output_dir: str | os.PathLike, *, tensorboard: bool, start_step: int = 0) -> None:
        folder = Path(output_dir)
        path = folder / "metrics.jsonl"
        keep_until(path, start_step, "metrics", is_metrics)
        self._file = RowFile(path, "metrics")
        self._tensorboard = _open_tensorboard(folder / "tensorboard", start_step + 1) if tensorboard else None

    def log(self, step: int, metrics: dict[str, float], texts: Mapping[str, str] | None = None) -> None:
        """Write one step; `step` counts finished steps. texts: by name, for TensorBoard alone.

        Raises:
            LogError: the disk is full, or the file was removed. Nothing of the line is left in the file.
        """
        nonfinite = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        line: dict[str, Any] = {"step": step} | {n: None if n in nonfinite else v for n, v in metrics.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.append(as_lines([line]))
        if self._tensorboard:
            try:
                self._tensorboard.write(step, metrics, texts or {})
            except OSError as error:
                _warn_of_tensorboard(error)
                self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer:
            with suppress(OSError):
                writer.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._close_tensorboard()


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    from repirl.report.tensorboard import TensorBoardFile

    try:
        return TensorBoardFile(folder, first_step)
    except OSError as error:
        _warn_of_tensorboard(error)
        return None


def _warn_of_tensorboard(error: OSError) -> None:
    logger.warning("TensorBoard's files cannot be written (%s): the run goes on without, metrics.jsonl has all", error)


@contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Raise LogError for an OSError inside: where `what`, which is in `path`, could not be written."""
    try:
        yield
    except OSError as error:
        raise _explained(path, what, error) from error


def _explained(path: Path, what: str, error: OSError) -> LogError:
    if error.errno == errno.ENOENT:
        return LogError(
            f"{str(path)!r} is gone ({first_line(error)}): its folder was removed or renamed while the run used it. If "
            "it was renamed, give it its name back and go on with --resume"
        )
    mend = "make room on that disk" if error.errno in _FULL else "mend that"
    return LogError(
        f"{what} cannot be written to {str(path)!r}: {error.strerror or first_line(error)}; {mend}, and go on from "
        "the newest checkpoint with --resume"
    )


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one a step: see `read_rows`."""
    return read_rows(path, "metrics", is_metrics)


def read_rows(path: str | os.PathLike, what: str, is_row: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The rows of a `RowFile`, without an incomplete last line, which a killed run may leave.

    Other lines that are no rows are left out, and a warning says which.

    Args:
        path: the file.
        what: the name of its content in messages, in the plural.
        is_row: whether an object with a `step`, a count, is a row.

    Raises:
        LogError: the file cannot be read.
    """
    try:
        rows, bad = _read(Path(path), is_row)
    except OSError as error:
        raise LogError(f"{what} cannot be read from {os.fspath(path)!r}: {error.strerror}") from error
    if bad:
        logger.warning("%s: %s; left out", os.fspath(path), _described(bad, what))
    return rows


def _described(bad: dict[int, bytes], what: str) -> str:
    numbers = list(bad)
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"line{'s' * (len(numbers) > 1)} {shown} cannot be read as {what}"


def keep_until(path: Path, start_step: int, what: str, is_row: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the rows of steps up to `start_step`, none if it is 0, and set aside what is no row; make the file's folder.

    Arguments as of `read_rows`. LogError where the file cannot be read or written.
    """
    with explained(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, start_step, what, is_row)


def _keep_until(path: Path, start_step: int, what: str, is_row: Callable[[dict[str, Any]], bool]) -> None:
    rows, bad = _read(path, is_row) if start_step > 0 else ([], {})
    if bad:
        aside = path.with_suffix(".damaged.jsonl")
        with open(aside, "ab") as file:
            file.writelines(line + b"\n" for line in bad.values())
        logger.warning("%s: %s; moved to %s", path, _described(bad, what), aside.name)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as new:
            new.write(as_lines([row for row in rows if row["step"] <= start_step]))
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path, is_row: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The rows, and other lines by number from 1; an incomplete last line is neither."""
    *lines, last = path.read_bytes().split(b"\n")
    rows, bad = [], {}
    for number, line in enumerate(lines, 1):
        if (row := _row(line, is_row)) is not None:
            rows.append(row)
        else:
            bad[number] = line
    if (row := _row(last, is_row)) is not None:
        rows.append(row)
    return rows, bad


def _row(line: bytes, is_row: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and is_count(content.get("step")) and is_row(content) else None


def is_count(value: Any) -> bool:
    """Whether a value is a whole number, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_metrics(content: dict[str, Any]) -> bool:
    """Whether an object has nothing but numbers and, under "nonfinite", names."""
    values = (value for name, value in content.items() if name != "nonfinite")
    return all(value is None or isinstance(value, int | float) for value in values) and isinstance(
        content.get("nonfinite", []), list
    )
