"""Plain data as bytes."""

import collections
import contextlib
import math
import random
import struct

import pytest

from repirl.verify.jail.plain import MAX_DEPTH, MAX_EQUAL_HASHES, PlainError, decode, encode


def made(generator, depth=3):
    """Some plain value."""
    kinds = ["none", "bool", "int", "float", "complex", "str", "bytes", "tuple", "frozenset"]
    kind = generator.choice([*kinds, *(["list", "dict", "set"] if depth == 3 else [])] if depth else kinds[:7])
    many = range(generator.randrange(4))
    return {
        "none": lambda: None,
        "bool": lambda: generator.random() < 0.5,
        "int": lambda: generator.randrange(-(10**30), 10**30),
        "float": lambda: generator.uniform(-1e9, 1e9),
        "complex": lambda: complex(generator.random(), generator.random()),
        "str": lambda: "".join(map(chr, generator.sample(range(0xD7FF), 3))),
        "bytes": lambda: generator.randbytes(5),
        "tuple": lambda: tuple(made(generator, depth - 1) for _ in many),
        "frozenset": lambda: frozenset(made(generator, depth - 1) for _ in many),
        "list": lambda: [made(generator, depth) for _ in many],
        "dict": lambda: {made(generator, depth - 1): made(generator, depth) for _ in many},
        "set": lambda: {made(generator, depth - 1) for _ in many},
    }[kind]()


def test_values_come_back():
    generator = random.Random(0)
    for _ in range(500):
        value = made(generator)
        back = decode(encode(value))
        assert back == value
        assert repr(type(back)) == repr(type(value))
    assert math.isnan(decode(encode(math.nan)))
    assert math.copysign(1, decode(encode(-0.0))) == -1


def test_bytes_that_are_no_value():
    """Whatever they are, it is PlainError, and soon."""
    generator = random.Random(1)
    good = encode([1, "a", (2.5, {"b": {3}}), b"c"])
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(len(data))] = generator.choice(b"NTFIDCSBLUEZM\0\1\xff")
        del data[generator.choice([len(data), generator.randrange(len(data))]) :]
        with contextlib.suppress(PlainError):
            decode(bytes(data))


def test_numbers_are_exact():
    assert decode(b"I" + struct.pack("<Q", 2) + b"ff") == 255
    for text in (b"0_1", b" 1", b"+1", b"0x1", b"", b"--1"):
        with pytest.raises(PlainError):
            decode(b"I" + struct.pack("<Q", len(text)) + text)


def test_depth():
    value = []
    for _ in range(MAX_DEPTH):
        value = [value]
    assert decode(encode(value)) == value
    with pytest.raises(PlainError, match="deep"):
        encode([value])
    with pytest.raises(PlainError, match="deep"):
        decode((b"L" + struct.pack("<Q", 1)) * 100_000 + b"N")


def test_keys_of_one_hash():
    keys = [number * (2**61 - 1) for number in range(1, MAX_EQUAL_HASHES + 2)]
    assert decode(encode(set(keys[1:]))) == set(keys[1:])
    for value in (set(keys), frozenset(keys), dict.fromkeys(keys)):
        with pytest.raises(PlainError, match="one hash"):
            decode(encode(value))


def test_types_that_are_not_plain():
    class Number(int):
        pass

    for value in (object(), Number(1), range(3), iter([]), collections.deque(), bytearray(b"a"), {1: [Number(1)]}):
        with pytest.raises(PlainError, match="no plain data"):
            encode(value)
    assert decode(encode(collections.OrderedDict(a=1))) == {"a": 1}
