"""Whether two final answers say the same. Both are divided into lists, brackets and relations first, which have to
agree; math-verify reads single expressions only, where it does not choose what to look at."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from repirl.verify.answers import RATIO, RELATION, enclosed, exact_number, items, normal_form, split, tidy
from repirl.verify.expressions import is_expression, is_multiple, is_same_expression, is_same_number
from repirl.verify.words import choice, drop_unit, number_word, unit, without_lead, words

_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[clr| ]*\})?([\s\S]*)\\end\{\1\}")
_SYMBOL = r"(?:[A-Za-z]|\\[a-zA-Z]+)(?:\s*_\s*(?:\{[^{}]*\}|\w))?\s*'*"
_NAME = re.compile(
    # x, x_1, f(x), P(A or B), y'
    rf"{_SYMBOL}\s*(?:\([^()]*\))?|"
    # AB, triangle ABC, |AB|, [ABC]
    r"(?:m\s*)?(?:\\(?:angle|triangle|overline)\s*)?\{?\s*[A-Z]{1,4}\s*\}?|\|\s*[A-Z]{2}\s*\||\[[A-Z]{3,5}\]|"
    r"\\triangle|\\(?:sin|cos|tan)\s*\(?\s*(?:[A-Za-z]|\\[a-z]+)\s*\)?|"
    # (x, y); words
    r"\(\s*[a-z]\s*(?:,\s*[a-z]\s*)+\)|[A-Za-z][a-z]{2,}(?:\s+[A-Za-z]+)*"
)
_NO_NAME = re.compile(
    r"(?:not|no|never|less|more|than|least|most|over|under|above|below|between|except|minus|about|half|twice|double)\b|"
    r"\\(?:neg|lnot|pi|infty|pm|mp|frac|sqrt|in|to|cdot|times|emptyset)\b|[ei]$|pi$",
    re.IGNORECASE,
)
# Each inequality, as it reads from the other side.
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\neq": r"\neq"}
_SIGNS = {"<=": r"\le", ">=": r"\ge", "!=": r"\neq", "==": "=", "→": r"\to"}
_CENTS = re.compile(r"\bcents?\b|¢|\\cent\b|\bpence\b", re.IGNORECASE)
_DOLLARS = re.compile(r"\\[$€£]|^\s*[$€£]\s*[\d.]|\bdollars?\b|\beuros?\b|\bpounds?\b", re.IGNORECASE)
_MAX_ITEMS = 40


def is_same(gold: str, answer: str) -> bool:
    """Whether two final answers say the same.

    Args:
        gold: the right answer.
        answer: a model's.
    """
    # The currency is no part of a number, but its hundredth is.
    for one, other in ((gold, answer), (answer, gold)):
        if _CENTS.search(one) and _DOLLARS.search(other) and not _CENTS.search(other):
            return False
    return _same(without_lead(normal_form(gold)), without_lead(normal_form(answer)))


def is_readable(answer: str) -> bool:
    """Whether all parts of a final answer are numbers, expressions or words; others are equal to the same text only."""
    return _is_readable(without_lead(normal_form(answer)))


def _is_readable(text: str) -> bool:
    text = _bare(text)
    if not text or choice(text) is not None:
        return bool(text)
    matrix, bracket = _MATRIX.fullmatch(text), _bracket(text)
    parts = [entry for row in _rows(matrix[2]) for entry in row.split("&")] if matrix else _members(text)
    if parts is None and bracket is not None:
        parts = bracket[1]
    for separator in (RELATION, RATIO):
        if parts is None and split(text, separator)[1]:
            parts = [part for part in split(text, separator)[0] if part.strip()]
    if parts is not None:
        return bool(parts) and all(map(_is_readable, parts))
    text = number_word(text)
    return words(text) is not None or _is_name(text) or is_expression(drop_unit(text).rstrip("% "))


def _same(gold: str, answer: str) -> bool:
    gold, answer = _bare(gold), _bare(answer)
    if not gold or not answer:
        return False
    if _squeezed(gold) == _squeezed(answer):
        return True
    letters = _same_choice(gold, answer)
    if letters is not None:
        return letters
    for kind in (_same_matrix, _same_list, _same_relation, _same_bracket, _same_ratio):
        verdict = kind(gold, answer)
        if verdict is not None:
            return verdict
    return _same_leaf(gold, answer)


def _bare(text: str) -> str:
    """Without parentheses around one thing."""
    text = tidy(text)
    inner = enclosed(text, "(", ")")
    while inner is not None and len(items(inner)) == 1 and "," not in inner:
        text = tidy(inner)
        inner = enclosed(text, "(", ")")
    return text


def _squeezed(text: str) -> str:
    return re.sub(r"\s+(?![a-zA-Z0-9])|(?<![a-zA-Z0-9])\s+", "", text)


def _same_choice(gold: str, answer: str) -> bool | None:
    """For the options of a multiple choice: (C), or C with its value."""
    of_gold, of_answer = choice(gold), choice(answer)
    if of_gold is None and of_answer is None:
        return None
    if of_gold is not None and of_answer is not None:
        if of_gold[0] != of_answer[0]:
            return False
        return not (of_gold[1] and of_answer[1]) or _same(of_gold[1], of_answer[1])
    if of_gold is not None:
        return _same(of_gold[1], answer) if of_gold[1] else None
    assert of_answer is not None
    return _same(gold, of_answer[1]) if of_answer[1] else None


def _same_matrix(gold: str, answer: str) -> bool | None:
    of_gold, of_answer = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(answer)
    if of_gold is None and of_answer is None:
        return None
    if of_gold is None or of_answer is None:
        # `M = \begin{pmatrix} ...` is a relation, which comes later.
        return None if r"=" in gold + answer else False
    rows = [[row.split("&") for row in _rows(matrix[2])] for matrix in (of_gold, of_answer)]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    return _in_order(*([tidy(entry) for row in matrix for entry in row] for matrix in rows))


def _rows(matrix: str) -> list[str]:
    return [row for row in re.split(r"\\\\", matrix) if row.strip()]


def _members(text: str) -> list[str] | None:
    r"""The members of a list or set; None for one thing."""
    inner = enclosed(text, r"\{", r"\}")
    members = items(text if inner is None else inner)
    return members if len(members) != 1 or inner is not None else None


def _same_list(gold: str, answer: str) -> bool | None:
    of_gold, of_answer = _members(gold), _members(answer)
    if of_gold is None and of_answer is None:
        return None
    if enclosed(gold, "(", ")") is not None and of_gold is None and of_answer is not None:
        # Coordinates without their parentheses, in order.
        inside = items(gold[1:-1])
        if answer.startswith(r"\{") or r"\cup" in answer:
            return False
        return len(inside) == len(of_answer) and _in_order(inside, _values(of_answer))
    of_gold, of_answer = of_gold or [gold], of_answer or [answer]
    if len(of_gold) != len(of_answer) or len(of_gold) > _MAX_ITEMS:
        return False
    if any(r"\ldots" in part for part in (gold, answer)):
        return _in_order(of_gold, of_answer)
    return _in_any_order(of_gold, of_answer) or (
        all(_is_assignment(part) for part in of_answer)
        and not any(split(part, RELATION)[1] for part in of_gold)
        and len({_name(part) for part in of_answer}) == 1
        and _in_any_order(of_gold, _values(of_answer))
    )


def _in_order(gold: Sequence[str], answer: Sequence[str]) -> bool:
    return len(gold) == len(answer) and all(_same(g, f) for g, f in zip(gold, answer, strict=True))


def _in_any_order(gold: Sequence[str], answer: Sequence[str]) -> bool:
    left = list(answer)
    for one in gold:
        match = next((index for index, other in enumerate(left) if _same(one, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _is_assignment(text: str) -> bool:
    parts, signs = split(text, RELATION)
    return signs == ["="] and _is_name(parts[0])


def _name(text: str) -> str:
    """The name of an assignment, without an index: x_1 and x_2 are solutions for x."""
    return re.sub(r"_.*", "", split(text, RELATION)[0][0].strip())


def _values(parts: list[str]) -> list[str]:
    """What is assigned, where each part is an assignment."""
    return [tidy(split(part, RELATION)[0][1]) for part in parts] if all(map(_is_assignment, parts)) else parts


def _is_name(text: str) -> bool:
    text = text.strip()
    return _NAME.fullmatch(text) is not None and _NO_NAME.match(text) is None


def _chain(text: str) -> tuple[list[str], list[str]]:
    """The parts of a relation and its signs."""
    parts, signs = split(text, RELATION)
    return [tidy(part) for part in parts], [_SIGNS.get(sign, sign) for sign in signs]


def _same_relation(gold: str, answer: str) -> bool | None:
    of_gold, of_answer = _chain(gold), _chain(answer)
    if not of_gold[1] and not of_answer[1]:
        return None
    if of_gold[1] and of_answer[1]:
        return _same_relations(of_gold, of_answer)
    if of_gold[1]:
        return _is_stated(answer, *of_gold, _same)
    return _is_stated(gold, *of_answer, _same)


def _is_stated(value: str, parts: list[str], signs: list[str], same: Callable[[str, str], bool]) -> bool:
    """Whether a relation says no more than that something has this value."""
    if parts[0] == "" and signs[0] in ("=", r"\approx"):
        parts, signs = parts[1:], signs[1:]
    if not all(parts):
        return False
    if signs == [r"\in"] and _is_name(parts[0]):
        return same(value, parts[1])
    if all(sign in ("<", ">", r"\le", r"\ge") for sign in signs):
        interval = _interval(parts, signs)
        return interval is not None and value[:1] in "([" and same(value, interval)
    if any(sign not in ("=", r"\approx", r"\equiv") for sign in signs) or r"\equiv" in signs:
        return False
    values = [part for part in parts if not _is_name(part)]
    if len(values) < len(parts) - 1 or not values:
        # y = x says that the value is x, but Bob = Tom names two; x = y = 5 is no answer.
        is_named = not re.match("[A-Z]", parts[0]) or words(value) is None
        return len(parts) == 2 and signs == ["="] and is_named and same(value, parts[1])
    if r"\approx" in signs:
        return any(same(value, one) for one in values) and all(
            same(one, other) or is_same_number(one, other, rounded=2) for one, other in itertools.pairwise(values)
        )
    return all(same(value, one) for one in values)


def _interval(parts: list[str], signs: list[str]) -> str | None:
    r"""An inequality for one name as an interval."""
    if len(parts) == 2 and _is_name(parts[1]):
        parts, signs = parts[::-1], [_FLIPPED[signs[0]]]
    if len(parts) == 2 and _is_name(parts[0]):
        if signs[0] in (">", r"\ge"):
            return f"{'(' if signs[0] == '>' else '['}{parts[1]},\\infty)"
        return f"(-\\infty,{parts[1]}{')' if signs[0] == '<' else ']'}"
    if len(parts) != 3 or not _is_name(parts[1]):
        return None
    if signs[0] in (">", r"\ge"):
        parts, signs = parts[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    if any(sign not in ("<", r"\le") for sign in signs):
        return None
    return f"{'(' if signs[0] == '<' else '['}{parts[0]},{parts[2]}{')' if signs[1] == '<' else ']'}"


def _same_relations(gold: tuple[list[str], list[str]], answer: tuple[list[str], list[str]]) -> bool:
    (left, signs), (right, others) = gold, answer
    if not all(left) or not all(right):
        return False
    flipped = [_FLIPPED.get(sign, "") for sign in others[::-1]]
    if signs == others and _in_order(left, right):
        return True
    if signs == flipped and _in_order(left, right[::-1]):
        return True
    if signs == [r"\in"] or others == [r"\in"]:
        # x in (1, 2), and 1 < x < 2.
        interval = _interval(*(answer if signs == [r"\in"] else gold))
        return interval is not None and _same(left[1], interval) if signs == [r"\in"] else False
    if len(left) != 2 or len(right) != 2:
        # y = 2x + 1 = 1 + 2x.
        last = ([right[0], right[-1]], ["="])
        is_named = set(others) == {"="} == set(signs) and len(left) == 2 and _is_name(right[0])
        return is_named and _same_relations(gold, last) and all(_same(right[-1], part) for part in right[1:])
    if any(split(part, re.compile(r"[,;]"))[1] or part.startswith(("[", r"\{")) for part in left + right):
        return False
    return (signs == others and signs[0] in _FLIPPED and is_multiple(left, right, signs[0] in ("=", r"\neq"))) or (
        signs == flipped and is_multiple(left, right[::-1], False)
    )


def _same_bracket(gold: str, answer: str) -> bool | None:
    """Points and intervals."""
    of_gold, of_answer = _bracket(gold), _bracket(answer)
    if of_gold is None and of_answer is None:
        return None
    if of_gold is None or of_answer is None:
        return False
    return of_gold[0] == of_answer[0] and _in_order(of_gold[1], of_answer[1])


def _bracket(text: str) -> tuple[str, list[str]] | None:
    for opening, closing in (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), (r"\langle", r"\rangle")):
        inner = enclosed(text, opening, closing)
        if inner is not None and len(split(inner, re.compile(","))[0]) > 1:
            return opening + closing, [tidy(part) for part in split(inner, re.compile(","))[0]]
    return None


def _same_ratio(gold: str, answer: str) -> bool | None:
    of_gold, of_answer = split(gold, RATIO)[0], split(answer, RATIO)[0]
    if len(of_gold) == 1 and len(of_answer) == 1:
        return None
    if len(of_gold) != len(of_answer):
        return False
    if _in_order(of_gold, of_answer):
        return True
    # Times of day are no ratios.
    if any(re.fullmatch(r"\d\d(?: *[ap]\.?m\.?)?", part.strip()) for part in of_gold[1:]):
        return False
    numbers = [[exact_number(part) for part in parts] for parts in (of_gold, of_answer)]
    if any(not number for parts in numbers for number in parts):
        return False
    return len({g / f for g, f in zip(*numbers, strict=True) if g and f}) == 1


def _same_leaf(gold: str, answer: str) -> bool:
    """For two single expressions, numbers with a unit, or texts."""
    of_gold, of_answer = number_word(gold), number_word(answer)
    as_gold, as_answer = words(of_gold), words(of_answer)
    if as_gold is not None and as_answer is not None:
        # Letters in another order are a product; words are not.
        return as_gold == as_answer or (
            max(len(as_gold), len(as_answer)) <= 2 and as_gold.isalpha() and is_same_expression(gold, answer)
        )
    units = unit(of_gold), unit(of_answer)
    if units[0] and units[1] and units[0] != units[1]:
        return False
    return _same_amount(drop_unit(of_gold), drop_unit(of_answer))


def _same_amount(gold: str, answer: str) -> bool:
    """For two expressions that may be percentages."""
    is_percent = [text.endswith("%") for text in (gold, answer)]
    if not any(is_percent):
        return is_same_expression(gold, answer)
    left, right = gold.rstrip("% "), answer.rstrip("% ")
    # 80 is 80%, but 0.5 is 50% rather than 0.5%.
    number = exact_number(left if is_percent[1] else right)
    is_below_one = not all(is_percent) and number is not None and 0 < abs(number) < 1
    if not is_below_one and is_same_expression(left, right):
        return True
    if all(is_percent):
        return False
    whole, part = (left, right) if is_percent[0] else (right, left)
    return is_same_expression(f"\\frac{{{whole}}}{{100}}", part)
