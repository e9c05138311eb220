"""Plain data as bytes: what crosses between the trainer and programs that nobody trusts.

None, bool, int, float, complex, str, bytes, list, tuple, dict, set and frozenset, of exactly these types. Decoding
makes nothing else, runs no code of the data's, and takes a time proportional to the length.
"""

from __future__ import annotations

import collections
import struct
from typing import Any

MAX_DEPTH = 100
# Elements of one set or keys of one dict that may share a hash: numbers can be chosen so that all do, and such a set
# takes quadratic time to build.
MAX_EQUAL_HASHES = 32
_SEQUENCES = {b"L": list, b"U": tuple, b"E": set, b"Z": frozenset}
_TAGS: dict[Any, bytes] = {kind: tag for tag, kind in _SEQUENCES.items()}
# They compare equal to plain dicts of the same content.
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)


class PlainError(ValueError):
    """A value that is no plain data, or bytes that do not encode any."""


def encode(value: Any) -> bytes:
    """The bytes of a value. Dicts of `collections` become dicts, named tuples become tuples.

    Raises:
        PlainError: it is, or holds, something else, or is nested more than MAX_DEPTH deep.
    """
    parts: list[bytes] = []
    _write(value, parts, 0)
    return b"".join(parts)


def _write(value: Any, parts: list[bytes], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise PlainError(f"nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None:
        parts.append(b"N")
    elif kind is bool:
        parts.append(b"T" if value else b"F")
    elif kind is int:
        # Hexadecimal: the time of decimal digits is quadratic.
        _write_text(b"I", format(value, "x").encode("ascii"), parts)
    elif kind is float:
        parts.append(b"D" + struct.pack("<d", value))
    elif kind is complex:
        parts.append(b"C" + struct.pack("<dd", value.real, value.imag))
    elif kind is str:
        _write_text(b"S", value.encode("utf-8", "surrogatepass"), parts)
    elif kind is bytes:
        _write_text(b"B", value, parts)
    elif kind in _DICTS:
        parts.append(b"M" + struct.pack("<Q", len(value)))
        for key, item in dict.items(value):
            _write(key, parts, depth + 1)
            _write(item, parts, depth + 1)
    elif kind in _TAGS or (isinstance(value, tuple) and hasattr(kind, "_fields")):
        parts.append(_TAGS.get(kind, b"U") + struct.pack("<Q", len(value)))
        for item in value:
            _write(item, parts, depth + 1)
    else:
        raise PlainError(f"a value of type {kind.__name__} is no plain data")


def _write_text(tag: bytes, text: bytes, parts: list[bytes]) -> None:
    parts += [tag + struct.pack("<Q", len(text)), text]


def decode(data: bytes) -> Any:
    """The value that `encode` wrote.

    Raises:
        PlainError: these bytes are not what `encode` writes.
    """
    value, end = _read(data, 0, 0)
    if end != len(data):
        raise PlainError(f"{len(data) - end} bytes after the value")
    return value


def _read(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends."""
    if depth > MAX_DEPTH:
        raise PlainError(f"nested more than {MAX_DEPTH} deep")
    tag, at = data[at : at + 1], at + 1
    if tag in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[tag], at
    if tag == b"D":
        return struct.unpack("<d", _slice(data, at, 8))[0], at + 8
    if tag == b"C":
        return complex(*struct.unpack("<dd", _slice(data, at, 16))), at + 16
    if tag not in (b"I", b"S", b"B", b"M", *_SEQUENCES):
        raise PlainError(f"no tag of plain data: {tag!r}")
    (length,) = struct.unpack("<Q", _slice(data, at, 8))
    at += 8
    if tag in (b"I", b"S", b"B"):
        return _text(tag, _slice(data, at, length)), at + length
    # An element has a byte at least.
    if length > len(data) - at:
        raise PlainError("more elements than there are bytes")
    items = []
    for _ in range(2 * length if tag == b"M" else length):
        item, at = _read(data, at, depth + 1)
        items.append(item)
    return _container(tag, items), at


def _slice(data: bytes, at: int, length: int) -> bytes:
    part = data[at : at + length]
    if len(part) != length:
        raise PlainError("the data ends in the midst of a value")
    return part


def _text(tag: bytes, text: bytes) -> Any:
    if tag == b"B":
        return text
    try:
        if tag == b"S":
            return text.decode("utf-8", "surrogatepass")
        if not text or text.removeprefix(b"-").strip(b"0123456789abcdef"):
            raise PlainError("no hexadecimal number")
        return int(text, 16)
    except ValueError as error:
        raise PlainError(str(error)) from None


def _container(tag: bytes, items: list[Any]) -> Any:
    if tag in (b"L", b"U"):
        return _SEQUENCES[tag](items)
    keys = items[::2] if tag == b"M" else items
    try:
        # Equal hashes of hashes need equal numbers: this count takes linear time whatever the keys are.
        hashes = collections.Counter(hash(key) for key in keys)
    except TypeError as error:
        raise PlainError(str(error)) from None
    if hashes and max(hashes.values()) > MAX_EQUAL_HASHES:
        raise PlainError(f"more than {MAX_EQUAL_HASHES} keys with one hash")
    value = dict(zip(keys, items[1::2], strict=True)) if tag == b"M" else _SEQUENCES[tag](keys)
    if len(value) != len(keys):
        raise PlainError("a key stands there twice")
    return value
