"""Final answers that are numbers, with an error that is allowed for."""

from __future__ import annotations

from fractions import Fraction

from repirl.verify.answers import exact_number, normal_form
from repirl.verify.math import MAX_PARSED, extract_answer, gold_answer
from repirl.verify.words import drop_unit


def is_close(response: str, answer: str, *, relative: str | None = None, absolute: str | None = None) -> bool:
    """Whether the final answer of a response is a number near the right one, or as many numbers that are near the right
    ones when both are put in order. Quick, whatever the texts are.

    Args:
        response: a model's text; its final answer is what repirl.verify.extract finds.
        answer: the right one, with commas between several.
        relative: the allowed difference, as a share of the right number.
        absolute: the allowed difference; see `allowed_errors`.
    """
    given, right = _numbers(extract_answer(response) or ""), _numbers(gold_answer(answer))
    if not given or not right or len(given) != len(right):
        return False
    share = Fraction(relative) if relative is not None else Fraction(0)
    allowed = allowed_errors(absolute or "")
    if len(allowed) != len(right):
        allowed = allowed[:1] * len(right)
    pairs = sorted(zip(right, allowed, strict=True))
    return all(abs(a - b) <= max(error, share * abs(b)) for a, (b, error) in zip(sorted(given), pairs, strict=True))


def allowed_errors(text: str) -> list[Fraction]:
    """The numbers of a list with commas: the errors of one right answer each, or one for all of them; none is 0.
    ValueError for what is no such list."""
    return [Fraction(part.strip() or 0) for part in text.split(",")]


def _numbers(text: str) -> list[Fraction] | None:
    """The numbers of a list with commas; None where one is none."""
    if len(text) > MAX_PARSED:
        return None
    whole = exact_number(drop_unit(normal_form(text)))
    # 1,000 is one number.
    values = [whole] if whole is not None else [exact_number(drop_unit(normal_form(part))) for part in text.split(",")]
    return (
        None if any(value is None for value in values) else [Fraction(value) for value in values if value is not None]
    )
