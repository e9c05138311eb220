"""One form for answers that say the same, so that responses can be counted by their answers."""

from __future__ import annotations

from collections.abc import Hashable

from repirl.verify.answers import exact_number, normal_form
from repirl.verify.extract import extract_answer
from repirl.verify.math import MAX_PARSED
from repirl.verify.words import choice, drop_unit, number_word, without_lead


def canonical_answer(response: str) -> Hashable | None:
    r"""What a response's final answer says. Quick, whatever the text is: nothing is parsed as an expression, so that
    0.5 and \frac{1}{2} are one answer, but \sqrt{8} and 2\sqrt{2} are two.

    Args:
        response: a model's text.

    Returns:
        The value of a number, without its unit; the letter of a choice; else the normal form of the text. None for a
        response that marks no final answer (repirl.verify.extract).
    """
    final = extract_answer(response)
    if not final or len(final) > MAX_PARSED:
        return final or None
    text = without_lead(normal_form(final))
    letter = choice(text)
    if letter is not None:
        return letter[0]
    value = exact_number(number_word(drop_unit(text)))
    return "".join(text.split()) if value is None else value
