"""A file of JSON lines that is written part by part, and goes on after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from repirl.config import ConfigError, RunError, first_line
from repirl.data.values import shown
from repirl.interrupt import Interrupted
from repirl.output_path import LINES, check_file

logger = logging.getLogger(__name__)


class ResumableOutput:
    """The output, and beside it OUTPUT.meta.json, which says how far it got and how it was made.

    It is locked until `close`. After a kill, lines that OUTPUT.meta.json does not know of are cut off.

    Args:
        path: of the output.
        command: the name of the command that writes it, for messages.
        resume: go on with the file that is there.
        inputs: files and folders that are read (output_path.check_file).
        unit: what `num_rows` counts, in the plural.

    Raises:
        ConfigError: the file is there and `resume` is false, another call writes it, it was not made so, or its name
            cannot be that of an output.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        command: str,
        *,
        resume: bool,
        inputs: Iterable[str | os.PathLike] = (),
        unit: str = "rows",
    ) -> None:
        self.path, self.command, self.unit = check_file(path, LINES, inputs, replaces=True), command, unit
        self.meta = self.path.with_name(self.path.name + ".meta.json")
        self.num_rows, self.counts = 0, dict[str, Any]()
        self._size, self._made_with, self._before = 0, dict[str, Any](), dict[str, Any]()
        self._file = self._open()
        try:
            # An empty file without the other one is what is left of a call that was killed at once.
            if self.path.stat().st_size or self.meta.exists():
                self._read(resume)
        except ConfigError:
            self._file.close()
            raise

    def __enter__(self) -> ResumableOutput:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Interrupted) and not error.message and self._made_with and self.num_rows:
            count = f"{self.num_rows} of {self._total} {self.unit}"
            error.message = f"stopped; {count} are in {str(self.path)!r}, go on with it by --resume"
        self.close()

    def close(self) -> None:
        """Let others write the output. Where nothing was begun, nothing stays."""
        if not self._made_with and not self._before and not self.path.stat().st_size:
            self.path.unlink()
        self._file.close()

    def _open(self) -> Any:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.path, "ab")  # noqa: SIM115 (it stays open, and locked, until `close`)
        except OSError as error:
            raise ConfigError(f"--output {str(self.path)!r} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ConfigError(f"another `{self.command}` writes {str(self.path)!r}: choose another --output") from error
        except OSError:
            logger.warning("%s is on a file system without locks: let only one %s write it", self.path, self.command)
        return file

    def _read(self, resume: bool) -> None:
        try:
            before = json.loads(self.meta.read_text(encoding="utf-8"))
            done, total, size = int(before["rows"]), before["total"], int(before["bytes"])
            made_with, counts = dict(before["made_with"]), dict(before["counts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{str(self.path)!r} exists, and {str(self.meta)!r} does not say that `{self.command}` made it "
                f"({first_line(error)}): choose another --output"
            ) from error
        if done == 0:
            return
        if not resume:
            raise ConfigError(
                f"{str(self.path)!r} holds {done} of {total} {self.unit}; go on with it by --resume, or choose "
                "another --output"
            )
        if self.path.stat().st_size < size:
            raise ConfigError(
                f"{str(self.path)!r} is shorter than `{self.command}` left it: begin anew, with another --output"
            )
        self.num_rows, self.counts, self._size, self._before = done, counts, size, made_with

    def begin(self, made_with: Mapping[str, Any], total: int) -> None:
        """Begin to write, or go on.

        Args:
            made_with: what the rows depend on, by name; values as JSON gives them back.
            total: how many rows there will be.

        Raises:
            ConfigError: the rows that are there were made in another way.
        """
        if self.num_rows:
            for name in sorted(self._before.keys() | made_with.keys()):
                old, new = self._before.get(name), made_with.get(name)
                if old != new:
                    raise ConfigError(
                        f"{str(self.path)!r} was made with {name} {shown(old)}, now it is {shown(new)}: the rows of "
                        "one file are made in one way; set it back, or choose another --output"
                    )
        self._made_with, self._total = dict(made_with), total
        try:
            self._file.truncate(self._size)
            self._save()
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, lines: Sequence[str], counts: Mapping[str, float], num_rows: int | None = None) -> None:
        """Add the next lines.

        Args:
            lines: each as text without a line break.
            counts: what was counted so far.
            num_rows: of the input that these lines are of; None for as many as there are lines.

        Raises:
            RunError: the file cannot be written.
        """
        content = encoded("".join(line + "\n" for line in lines))
        try:
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._size += len(content)
            self.num_rows += len(lines) if num_rows is None else num_rows
            self.counts = dict(counts)
            self._save()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{str(self.path)!r} cannot be written: {error.strerror}")

    def _save(self) -> None:
        state = {
            "made_with": self._made_with,
            "rows": self.num_rows,
            "total": self._total,
            "bytes": self._size,
            "counts": self.counts,
        }
        temporary = self.meta.with_name(self.meta.name + ".tmp")
        temporary.write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.meta)


def encoded(text: str) -> bytes:
    """JSON as UTF-8. Half a character, which no UTF-8 can hold, becomes its escape."""
    return text.encode("utf-8", errors="backslashreplace")
