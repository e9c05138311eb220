"""A file of JSON lines that a command writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repirl.config import RunError
from repirl.output_path import LINES, check_file


class LinesFile:
    """A file of JSON lines that has another name until it is complete (`finish`)."""

    def __init__(self, output: str | os.PathLike) -> None:
        """ConfigError where the file exists or cannot be made, RunError where it cannot be written."""
        self._path = check_file(output, LINES)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        with self._explained():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.write_text("")

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. RunError where they cannot be written."""
        # Half a character becomes its escape, as JSON has it. Dates of tables become text.
        with self._explained(), open(self._partial, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def finish(self) -> None:
        """Give the file its name."""
        with self._explained():
            self._partial.rename(self._path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"--output {str(self._path)!r} cannot be written: {error.strerror}") from error


def write_json(output: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON, in place of what is there. RunError where it cannot be written."""
    path = Path(output)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(
            json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
        )
        partial.replace(path)
    except OSError as error:
        raise RunError(f"--output {str(path)!r} cannot be written: {error.strerror}") from error
