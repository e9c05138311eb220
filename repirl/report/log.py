"""Step metrics as JSON lines and TensorBoard."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from repirl.config import RunError, first_line

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LogError(RunError):
    """Metrics could not be written or read; the lines before are untouched."""


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
        self._path = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _keep_until(self._path, start_step)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise _explained(self._path, error) from error
        self._tensorboard = _open_tensorboard(folder / "tensorboard", start_step + 1) if tensorboard else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one step; `step` counts finished steps.

        Raises:
            LogError: the disk is full, or the file was removed. Nothing of the line is left in the file.
        """
        nonfinite = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        line: dict[str, Any] = {"step": step} | {n: None if n in nonfinite else v for n, v in metrics.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        try:
            self._append((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise _explained(self._path, error) from error
        if self._tensorboard:
            try:
                self._tensorboard.write(step, metrics)
            except OSError as error:
                _warn_of_tensorboard(error)
                self._close_tensorboard()

    def _append(self, line: bytes) -> None:
        """OSError where it cannot be written, or would go into a file that has no name any more."""
        before = os.fstat(self._file)
        if not os.path.samestat(os.stat(self._path), before):
            raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, before.st_size)
            raise

    def _close_tensorboard(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer:
            with suppress(OSError):
                writer.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
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


def _explained(path: Path, error: OSError) -> LogError:
    if error.errno == errno.ENOENT:
        return LogError(
            f"{str(path)!r} is gone ({first_line(error)}): its folder was removed or renamed while the run used it. If "
            "it was renamed, give it its name back and go on with --resume"
        )
    what = "make room on that disk" if error.errno in _FULL else "mend that"
    return LogError(
        f"metrics cannot be written to {str(path)!r}: {error.strerror or first_line(error)}; {what}, and go on from "
        "the newest checkpoint with --resume"
    )


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one a step, without an incomplete last line, which a killed run may leave.

    Other lines that are no records are left out, and a warning says which.

    Raises:
        LogError: the file cannot be read.
    """
    try:
        records, bad = _read(Path(path))
    except OSError as error:
        raise LogError(f"metrics cannot be read from {os.fspath(path)!r}: {error.strerror}") from error
    if bad:
        logger.warning("%s: %s; left out", os.fspath(path), _described(bad))
    return records


def _described(bad: dict[int, bytes]) -> str:
    numbers = list(bad)
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"line {shown} is no record of a step" if len(numbers) == 1 else f"lines {shown} are no records of a step"


def _keep_until(path: Path, start_step: int) -> None:
    """Keep the records of steps up to `start_step`, none if it is 0, and set aside what is no record."""
    records, bad = _read(path) if start_step > 0 else ([], {})
    if bad:
        aside = path.with_suffix(".damaged.jsonl")
        with open(aside, "ab") as file:
            file.writelines(line + b"\n" for line in bad.values())
        logger.warning("%s: %s; moved to %s", path, _described(bad), aside.name)
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as new:
            new.writelines(json.dumps(record) + "\n" for record in records if record["step"] <= start_step)
            new.flush()
            os.fsync(new.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The records, and other lines by number from 1; an incomplete last line is neither."""
    *lines, last = path.read_bytes().split(b"\n")
    records, bad = [], {}
    for number, line in enumerate(lines, 1):
        if (record := _record(line)) is not None:
            records.append(record)
        else:
            bad[number] = line
    if (record := _record(last)) is not None:
        records.append(record)
    return records, bad


def _record(line: bytes) -> dict[str, Any] | None:
    """The metrics of a step: an object with `step`, a count, and numbers; None for anything else."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    step = content.get("step")
    values = (value for name, value in content.items() if name != "nonfinite")
    is_record = (
        isinstance(step, int)
        and not isinstance(step, bool)
        and step >= 0
        and all(value is None or isinstance(value, int | float) for value in values)
        and isinstance(content.get("nonfinite", []), list)
    )
    return content if is_record else None
