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
        value: Any = row
        for part in column.split("."):
            value = _part(value, part)
            if value is _MISSING:
                raise DataError(
                    f"{self.source}, {self.row} has no column {column!r} ({option}); it has {_columns(row)}"
                )
        return value

    def text(self, value: Any, column: str) -> str:
        """Text that is neither blank nor impossible to encode."""
        if not isinstance(value, str):
            raise self.error(f"{column!r} holds {shown(value)}, expected text{_hint(column, value)}")
        if not value.strip():
            raise self.error(f"{column!r} holds an empty text ({value[:20]!r})")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                f"{column!r} holds half a character ({value[error.start]!r} at {error.start}): a surrogate without "
                "its other half, which no text may have; correct the file"
            ) from error
        return value

    def prompt(self, value: Any, column: str) -> str | Messages:
        """Text, or the messages of a chat that the user had the last word in."""
        if not isinstance(value, list):
            if isinstance(value, str):
                return self.text(value, column)
            raise self.error(
                f"{column!r} holds {shown(value)}, expected text or a list of messages{_hint(column, value)}"
            )
        messages = self.messages(value, column)
        if messages[-1]["role"] == "assistant":
            raise self.error(
                f"{column!r} holds messages that end with the assistant's: expected those that it is to answer. Its "
                "answer belongs to a column of its own (data.solution_column)"
            )
        return messages

    def messages(self, entries: list[Any], column: str) -> Messages:
        """Messages of a chat, each with a role and a text."""
        if not entries:
            raise self.error(f"{column!r} holds an empty list, expected text or messages")
        messages = []
        for number, message in enumerate(entries):
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

    def solutions(self, value: Any, column: str) -> list[str]:
        """One solution or a list of them, each a text or a list with the assistant's message."""
        if value == []:
            raise self.error(f"{column!r} is an empty list, expected solutions")
        if not isinstance(value, list) or any(isinstance(part, dict) for part in value):
            return [self._solution(value, column)]
        return [self._solution(part, f"{column}.{number}") for number, part in enumerate(value)]

    def _solution(self, value: Any, column: str) -> str:
        if not isinstance(value, list):
            return self.text(value, column)
        messages = self.messages(value, column)
        roles = [message["role"] for message in messages]
        if roles != ["assistant"]:
            raise self.error(f"{column!r} holds messages of {roles}, expected one, the assistant's")
        return messages[0]["content"]

    def answer(self, value: Any, column: str) -> str:
        """The text of a right answer; numbers are written out."""
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
            what = "null" if value is None else shown(value)
            raise self.error(f"{column!r} is {what}, expected an answer: text or a number{_hint(column, value)}")
        if isinstance(value, str):
            return self.text(value, column)
        if not math.isfinite(value):
            raise self.error(f"{column!r} is {value}, expected an answer: text or a finite number")
        # Without an exponent: 1e-07 is for programs.
        return str(value) if isinstance(value, int) else format(Decimal(str(value)), "f")


def _part(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part, _MISSING)
    if isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
        return value[int(part)]
    return _MISSING


def _columns(row: dict[str, Any]) -> list[str]:
    """The columns of a row, those inside of others by their dotted names."""
    names = []
    for key, value in row.items():
        inner = [f"{key}.{name}" for name in value] if isinstance(value, dict) else []
        names += inner or [str(key)]
    return sorted(names)


def _hint(column: str, value: Any) -> str:
    """The way into a value that has parts."""
    if not isinstance(value, dict) or not value:
        return ""
    return f"; name one of its parts: {', '.join(sorted(f'{column}.{key}' for key in value))}"


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    if value is None:
        return "null"
    if isinstance(value, int) and value.bit_length() > 200:
        return "a very long number"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
