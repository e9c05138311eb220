"""Outcome reward of a mathematical answer: 1 if it is right, else 0."""

from __future__ import annotations

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

from repirl.verify.answers import plain_number
from repirl.verify.compare import is_same
from repirl.verify.extract import clean, extract_answer, without_headings

__all__ = [
    "MAX_PARSED",
    "extract_answer",
    "final_answer",
    "gold_answer",
    "is_overlong",
    "math_reward",
    "plain_reward",
]

# Characters that are parsed at most. math-verify's time grows with the square of the length or worse: 10,000 characters
# can take any time, and a policy that has gone wrong writes hundreds of such answers a turn. The longest answers of
# GSM8K, Minerva, OlympiadBench and Gaokao have 9 to 210 characters, which leaves room for twice as clumsy a form.
MAX_PARSED = 500

# What makes of the last expression in a sentence one of several, or none.
_HEDGE = re.compile(
    r"(?:\b(?:or|not|either|neither|nor)(?:\s+[a-z]+){0,3}|\b(?:and|to|than|versus|except)|[,;/<>≠≈&|]|"
    r"(?:^|\s)[\d.,]+\s*=|\\\w+)\s*(?:\$|\\\()?\s*$",
    re.IGNORECASE,
)
# math-verify reports every answer that it cannot read as an error; here that is an ordinary wrong answer.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def gold_answer(answer: str) -> str:
    """The final answer of a column that holds it alone, or a worked solution."""
    marked = extract_answer(answer)
    return answer.strip() if marked is None else marked


def _tail(response: str) -> str:
    """The last MAX_PARSED characters of a response that marks no answer."""
    # Nothing is kept of a formula that would be cut in two: its closing `$` would pass for an opening one.
    head, tail = response[:-MAX_PARSED], response[-MAX_PARSED:]
    is_cut = head.rpartition("\n")[2].count("$") % 2 == 1
    formula, dollar, rest = tail.partition("$")
    return rest if is_cut and dollar and "\n" not in formula else tail


def plain_reward(response: str, answer: str) -> float | None:
    """The reward where both final answers are plain numbers, or the same text. Quick, whatever the texts are.

    Args:
        response: a model's text.
        answer: the right answer, alone or at the end of a worked solution.

    Returns:
        1.0 or 0.0; None where it takes more to tell.
    """
    gold, final = gold_answer(answer), extract_answer(response)
    if not final:
        return None
    if final == gold:
        return 1.0
    left, right = plain_number(final), plain_number(gold)
    return None if left is None or right is None else float(left == right)


def is_overlong(response: str, answer: str) -> bool:
    """Whether one of both final answers is too long to be parsed. Quick, whatever the texts are.

    Args:
        response: a model's text. Where it marks no answer its length does not matter: only its end is parsed.
        answer: the right answer, alone or at the end of a worked solution.

    Returns:
        True where math_reward is 0.0 without a look, unless plain_reward tells.
    """
    return max(len(gold_answer(answer)), len(extract_answer(response) or "")) > MAX_PARSED


def math_reward(response: str, answer: str) -> float:
    r"""Whether a response gives the right answer. Plain numbers are compared exactly, everything else with math-verify.

    Even for short answers that can take any time and memory (towers of powers). `process.Verifier` bounds both.

    Args:
        response: a model's text. Its final answer is what extract_answer finds; where it marks none, the last
            expression that math-verify finds in its last MAX_PARSED characters.
        answer: the right answer, alone or at the end of a worked solution.

    Returns:
        1.0 where both final answers are equal, else 0.0: also for what cannot be read, and for what is_overlong.

    Raises:
        MemoryError: and nothing else, whatever a model wrote.
    """
    decided = plain_reward(response, answer)
    if decided is not None:
        return decided
    if is_overlong(response, answer):
        return 0.0
    try:
        final = final_answer(response)
        return float(is_same(gold_answer(answer), final)) if final else 0.0
    except MemoryError:
        raise
    except Exception:
        # Whatever else a parser does on arbitrary text (recursion, overflow) makes the answer a wrong one.
        logging.getLogger(__name__).debug("no verdict on %r", response[-200:], exc_info=True)
        return 0.0


def final_answer(response: str) -> str | None:
    """The final answer that a response marks, or else the last expression at its end; None where it has neither. It may
    take any time, and raise whatever a parser does."""
    marked = extract_answer(response)
    return _last_expression(_tail(without_headings(response))) if marked is None else marked


def _last_expression(text: str) -> str | None:
    """The last expression in a text that marks no answer; None where the words before it make it no answer."""
    # Without math-verify's own time-outs: they work in the main thread only, not within one long operation, and would
    # make a wrong answer of what was never judged, uncounted.
    parsed = parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)
    written = parsed[-1] if parsed and isinstance(parsed[-1], str) else None
    if not written:
        return None
    before, matched, _ = text.rpartition(written)
    if matched and _HEDGE.search(before[-30:].rpartition("\n")[2]):
        return None
    return clean(written)
