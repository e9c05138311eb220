"""Whether a program's output, or what a function returned, is the right one. Values are plain data of the sandbox."""

from __future__ import annotations

import math
import re
from typing import Any

_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?")
_WHOLE = re.compile(r"[-+]?[0-9]+")
# Longer numbers are compared as texts.
_MAX_NUMBER = 300


def same_output(actual: str, expected: str, tolerance: float) -> bool:
    """Whether a program wrote what is expected.

    Lines have to be the same, but for blanks between, before and behind their words, and for empty lines at the end.
    Two words are the same if they are equal or numbers that are: 3 and 3.0; and, where a fraction or an exponent is
    expected, numbers that differ by no more than `tolerance`, or by that share of the expected one.
    """
    lines, expected_lines = (text.rstrip().split("\n") for text in (actual, expected))
    if len(lines) != len(expected_lines):
        return False
    for line, expected_line in zip(lines, expected_lines, strict=True):
        words, expected_words = line.split(), expected_line.split()
        if words == expected_words:
            continue
        if len(words) != len(expected_words):
            return False
        if not all(_same_word(*pair, tolerance) for pair in zip(words, expected_words, strict=True)):
            return False
    return True


def _same_word(actual: str, expected: str, tolerance: float) -> bool:
    if actual == expected:
        return True
    if max(len(actual), len(expected)) > _MAX_NUMBER:
        return False
    if not (_NUMBER.fullmatch(actual) and _NUMBER.fullmatch(expected)):
        return False
    if _WHOLE.fullmatch(expected):
        # Exact, also beyond 2^53.
        whole, _, fraction = actual.partition(".")
        return bool(_WHOLE.fullmatch(whole)) and int(whole) == int(expected) and not fraction.strip("0")
    return _close(float(actual), float(expected), tolerance)


def same_value(actual: Any, expected: Any, tolerance: float) -> bool:
    """Whether a function returned what is expected, a value of JSON.

    By Python's ==, as the graders of LiveCodeBench and APPS do, and the assertions of HumanEval and MBPP: so 1, 1.0 and
    True are the same. Besides, tuples are lists, as JSON has none (those graders take the outermost one for a list);
    floats are compared with the tolerance, where a float is expected; and a number as a key is the text of it, as JSON
    has no others.
    """
    if isinstance(expected, float) and isinstance(actual, int | float):
        return _close(_as_float(actual), expected, tolerance)
    if isinstance(expected, list | tuple):
        return (
            isinstance(actual, list | tuple)
            and len(actual) == len(expected)
            and all(same_value(*pair, tolerance) for pair in zip(actual, expected, strict=True))
        )
    if isinstance(expected, dict):
        if not isinstance(actual, dict) or len(actual) != len(expected):
            return False
        named, expected_named = ({str(key): part for key, part in value.items()} for value in (actual, expected))
        return named.keys() == expected_named.keys() and all(
            same_value(part, expected_named[key], tolerance) for key, part in named.items()
        )
    return bool(actual == expected)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _close(actual: float, expected: float, tolerance: float) -> bool:
    if math.isnan(expected) or math.isinf(expected):
        return actual == expected or (math.isnan(actual) and math.isnan(expected))
    return abs(actual - expected) <= tolerance * max(1.0, abs(expected))
