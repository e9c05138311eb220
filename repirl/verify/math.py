"""Outcome reward of a mathematical answer: 1 if it is right, else 0."""

from __future__ import annotations

import logging
import re
from decimal import Decimal

from math_verify import parse, verify

# GSM8K writes its answers behind four number signs.
_MARKED = re.compile(r"####[ \t]*([^\n]+)")
# A plain number as people dress it: $1,234.50, 7., -3. Lists and percentages are for math-verify.
_PLAIN = re.compile(r"([-+]?)\s*\$?\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)\s*")

# math-verify reports every answer that it cannot read as an error; here that is an ordinary wrong answer.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def extract_answer(text: str) -> str | None:
    r"""The text of the last `\boxed{...}`, or else what stands behind the last `####`; None without either."""
    start = text.rfind(r"\boxed{")
    if start >= 0:
        depth, begin = 1, start + len(r"\boxed{")
        for position in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position].strip()
    marked = _MARKED.findall(text)
    return marked[-1].strip() if marked else None


def _number(text: str) -> Decimal | None:
    """The value of a plain number, None for anything else."""
    found = _PLAIN.fullmatch(text.strip())
    return Decimal(found[1] + found[2].replace(",", "").removesuffix(".")) if found else None


def plain_reward(response: str, answer: str) -> float | None:
    """The reward where both final answers are plain numbers, or the same text; None where it takes more to tell.
    Quick, whatever the texts are."""
    gold, found = extract_answer(answer), extract_answer(response)
    gold = answer.strip() if gold is None else gold
    if not found:
        return None
    if found == gold:
        return 1.0
    left, right = _number(found), _number(gold)
    return None if left is None or right is None else float(left == right)


def math_reward(response: str, answer: str) -> float:
    r"""1.0 where the response's final answer equals `answer`, else 0.0; whatever a model wrote, it raises nothing but
    MemoryError.

    The final answer is the last `\boxed{...}`, or what follows the last `####`; a response that marks none
    gets math-verify's extraction, which takes the last expression. `answer` may itself be a worked solution
    in GSM8K's form. Plain numbers are compared exactly, everything else by math-verify.

    For some answers it takes any time and memory. verifier.Verifier bounds both.
    """
    decided = plain_reward(response, answer)
    if decided is not None:
        return decided
    gold = extract_answer(answer)
    gold = answer.strip() if gold is None else gold
    found = extract_answer(response)
    if found is not None:
        response = rf"$\boxed{{{found}}}$"
    try:
        # Without math-verify's own time-outs: they work in the main thread only, not within one long operation, and
        # would make a wrong answer of what was never judged, uncounted.
        parsed = [parse(text, parsing_timeout=None) for text in (rf"$\boxed{{{gold}}}$", response)]
        return float(verify(*parsed, timeout_seconds=None))
    except MemoryError:
        raise
    except Exception:
        # Whatever else a parser does on arbitrary text (recursion, overflow) makes the answer a wrong one.
        logging.getLogger(__name__).debug("math-verify failed on %r", response[-200:], exc_info=True)
        return 0.0
