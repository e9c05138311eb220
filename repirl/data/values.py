"""What the columns of a row may hold: text, messages of a chat, answers, solutions; anything else is refused by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeAlias

from repirl.data.errors import DataError

# As the chat template takes them: role and content.
Messages: TypeAlias = list[dict[str, str]]

_MISSING = object()


@dataclass(frozen=True)
class Place:
    """Where a row stands, for messages: a file or data set, and "row 3" or "line 4"."""

    source: str
    row: str

    def error(self, text: str) -> DataError:
        """The error that tells what is wrong there."""
        return DataError(f"{self.source}, {self.row}: {text}")

    def value(self, row: dict[str, Any], column: str, option: str) -> Any:
        """What a column holds. "a.b" is the column of that name, or else the part b of column a; a number is a place
        in a list. DataError where the row has no such column."""
        if column in row:
            return row[column]
        found: Any = row
        for part in column.split("."):
            found = _part(found, part)
            if found is _MISSING:
                raise DataError(
                    f"{self.source}, {self.row} has no column {column!r} ({option}); it has {_columns(row)}"
                )
        return found

    def text(self, found: Any, column: str) -> str:
        """Text that is neither blank nor impossible to encode."""
        if not isinstance(found, str):
            raise self.error(f"{column!r} holds {shown(found)}, expected text{_hint(column, found)}")
        if not found.strip():
            raise self.error(f"{column!r} holds an empty text ({found[:20]!r})")
        try:
            found.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                f"{column!r} holds half a character ({found[error.start]!r} at {error.start}): a surrogate without "
                "its other half, which no text may have; correct the file"
            ) from error
        return found

    def prompt(self, found: Any, column: str) -> str | Messages:
        """Text, or the messages of a chat that the user had the last word in."""
        if not isinstance(found, list):
            if isinstance(found, str):
                return self.text(found, column)
            raise self.error(
                f"{column!r} holds {shown(found)}, expected text or a list of messages{_hint(column, found)}"
            )
        messages = self.messages(found, column)
        if messages[-1]["role"] == "assistant":
            raise self.error(
                f"{column!r} holds messages that end with the assistant's: expected those that it is to answer. Its "
                "answer belongs to a column of its own (data.solution_column)"
            )
        return messages

    def messages(self, found: list[Any], column: str) -> Messages:
        """Messages of a chat, each with a role and a text."""
        if not found:
            raise self.error(f"{column!r} holds an empty list, expected text or messages")
        messages = []
        for number, message in enumerate(found):
            name = f"{column}.{number}"
            if not isinstance(message, dict):
                raise self.error(f"{name!r} holds {shown(message)}, expected a message with role and content")
            # Tables have a column for every key that any of their rows has.
            given = {key: value for key, value in message.items() if value is not None}
            if set(given) != {"role", "content"}:
                raise self.error(f"{name!r} is a message with {sorted(map(str, given))}, expected role and content")
            role, content = (self.text(given[key], f"{name}.{key}") for key in ("role", "content"))
            messages.append({"role": role, "content": content})
        return messages

    def solutions(self, found: Any, column: str) -> list[str]:
        """One solution or a list of them, each a text or a list with the assistant's message."""
        if found == []:
            raise self.error(f"{column!r} is an empty list, expected solutions")
        if not isinstance(found, list) or any(isinstance(part, dict) for part in found):
            return [self._solution(found, column)]
        return [self._solution(part, f"{column}.{number}") for number, part in enumerate(found)]

    def _solution(self, found: Any, column: str) -> str:
        if not isinstance(found, list):
            return self.text(found, column)
        messages = self.messages(found, column)
        roles = [message["role"] for message in messages]
        if roles != ["assistant"]:
            raise self.error(f"{column!r} holds messages of {roles}, expected one, the assistant's")
        return messages[0]["content"]

    def answer(self, found: Any, column: str) -> str:
        """The text of a right answer; numbers are written out."""
        if isinstance(found, bool) or not isinstance(found, int | float | Decimal | str):
            what = "null" if found is None else shown(found)
            raise self.error(f"{column!r} is {what}, expected an answer: text or a number{_hint(column, found)}")
        if isinstance(found, str):
            return self.text(found, column)
        if not math.isfinite(found):
            raise self.error(f"{column!r} is {found}, expected an answer: text or a finite number")
        # Without an exponent: 1e-07 is for programs.
        return str(found) if isinstance(found, int) else format(Decimal(str(found)), "f")


def _part(found: Any, part: str) -> Any:
    if isinstance(found, dict):
        return found.get(part, _MISSING)
    if isinstance(found, list) and part.isdecimal() and len(part) < 10 and int(part) < len(found):
        return found[int(part)]
    return _MISSING


def _columns(row: dict[str, Any]) -> list[str]:
    """The columns of a row, those inside of others by their dotted names."""
    names = []
    for key, value in row.items():
        inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) else []
        names += inner or [str(key)]
    return sorted(names)


def _hint(column: str, found: Any) -> str:
    """The way into a value that has parts."""
    if not isinstance(found, dict) or not found:
        return ""
    return f"; name one of its parts: {', '.join(sorted(f'{column}.{key}' for key in found))}"


def shown(found: Any) -> str:
    """A value for a message, shortened."""
    if found is None:
        return "null"
    if isinstance(found, int) and found.bit_length() > 200:
        return "a very long number"
    text = repr(found)
    return text if len(text) <= 60 else text[:57] + "..."
