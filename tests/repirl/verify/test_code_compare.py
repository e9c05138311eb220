"""Which outputs and values are the right ones."""

import math

import pytest

from repirl.verify.code_compare import same_output, same_value


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n", "1 2", True),
        ("1  2 \n\n", "1 2\n", True),
        ("1\r\n2\r\n", "1\n2", True),
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("", "", True),
        ("", "0", False),
        ("yes", "YES", False),
        ("3.0", "3", True),
        ("3.5", "3", False),
        ("3", "3.0000001", True),
        ("0.33333333", "0.3333333333", True),
        ("0.3334", "0.3333333333", False),
        ("1e3", "1000.0", True),
        ("9007199254740993", "9007199254740992", False),
        ("123456789012345678901", "123456789012345678901.0", True),
        ("nan", "1.0", False),
        ("\u0663", "3", False),
        ("\u0663.0", "3.0", False),
        ("1_000", "1000", False),
        ("3\x00", "3", False),
        ("\ufffd3", "3", False),
        ("1" * 5000, "1" * 4999 + "2", False),
    ],
)
def test_outputs(actual, expected, same):
    assert same_output(actual, expected, 1e-6) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (3, 3, True),
        (3.0, 3, True),
        # As == takes them, by which the benchmarks' own graders judge.
        (True, 1, True),
        (1, True, True),
        (0, False, True),
        (2, True, False),
        (True, 1.0, True),
        (1.0, 1, True),
        (1.0000000001, 1, False),
        ([True, 0], [1, False], True),
        ("1", 1, False),
        ("True", True, False),
        (None, None, True),
        (0, None, False),
        (False, None, False),
        (None, False, False),
        ([], None, False),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (10**400, 0.3, False),
        (math.nan, 0.3, False),
        ("a", "a", True),
        ((1, 2), [1, 2], True),
        ([(1, (2,))], [[1, [2]]], True),
        (({"a": (1,)},), [{"a": [1]}], True),
        ([1, [2.0000000001]], [1, [2.0]], True),
        ([1, 2], [2, 1], False),
        ({1: [2]}, {"1": [2]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({1, 2}, [1, 2], False),
        ("ab", ["a", "b"], False),
        (10**30, 10**30 + 1, False),
    ],
)
def test_values(actual, expected, same):
    assert same_value(actual, expected, 1e-6) is same
