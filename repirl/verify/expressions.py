"""Whether two single expressions are equal: exactly where they are numbers that can be read here, else as math-verify
reads them, with guards on what it takes for equal."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, parse, verify

from repirl.verify.answers import exact_number

# Decimals need that many significant digits to pass for what they are rounded from.
_MIN_DIGITS = 6
_BASED = re.compile(r"\(?\s*([0-9A-Fa-f]+)\s*\)?\s*_\s*(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))")
_DECIMAL = re.compile(r"[-+]?\s*(\d*)\.(\d+)")
# What math-verify reads; it leaves out some of what it does not.
_COMMANDS = re.compile(
    r"frac|sqrt|pi|binom|dbinom|tbinom|log|ln|lg|exp|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|sum|prod|"
    r"int|lim|infty|cdot|times|div|alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|"
    r"nu|xi|rho|sigma|tau|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|lfloor|rfloor|lceil|"
    r"rceil|overline|bar|emptyset|to|max|min|gcd|lcm|det|mid|lvert|rvert|imath|ast"
)
# Two numbers side by side, and characters that no single expression has.
_SUSPECT = re.compile(r"\d\s+[\d.]|[?#@&`\"~;]|\.\.|\}\s*\{\s*\}|\d\.\d+\.|['\u2019]|\\\\|\d!\d|[<>=]|\\ldots|:")
_MAX_POWER = 5000


def is_same_expression(gold: str, answer: str) -> bool:
    """Whether two expressions without relations and lists are equal."""
    gold, answer = gold.strip(), answer.strip()
    if not gold or not answer:
        return False
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return not re.search(r"\d\s+\d", gold + "|" + answer)
    based = _same_in_bases(gold, answer)
    if based is not None:
        return based
    left, right = exact_number(gold), exact_number(answer)
    if left is not None and right is not None:
        return left == right or _is_rounded(gold, answer, left, right)
    parsed = _parsed(gold), _parsed(answer)
    return parsed[0] is not None and parsed[1] is not None and _equal(parsed[0], parsed[1], gold, answer)


def is_expression(text: str) -> bool:
    """Whether a text is a number or a single expression."""
    text = text.strip()
    return bool(_BASED.fullmatch(text)) or exact_number(text) is not None or _parsed(text) is not None


def is_same_number(one: str, other: str, rounded: int) -> bool:
    """Whether two numbers are equal, where a decimal counts as what it is rounded from.

    Args:
        one, other: their texts.
        rounded: significant digits that it takes for that.
    """
    values = [_value(text) for text in (one, other)]
    if values[0] is None or values[1] is None:
        return False
    return bool(values[0] == values[1]) or _is_rounded(one, other, values[0], values[1], rounded)


def is_multiple(gold: list[str], answer: list[str], may_be_negative: bool) -> bool:
    """Whether both relations compare the same: the difference of one's sides is a constant times the other's."""
    sides = [_parsed(text) for text in gold + answer]
    if any(side is None for side in sides):
        return False
    # Unknown functions and infinite sums: nothing to compare but their text.
    if any(side.has(sympy.Sum, sympy.Integral, sympy.Limit) for side in sides):
        return False
    left, right = sides[0] - sides[1], sides[2] - sides[3]
    if not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    ratio = sympy.simplify(left / right)
    return bool(ratio.is_number and ratio.is_finite and not ratio.is_zero and (may_be_negative or ratio.is_positive))


def _same_in_bases(gold: str, answer: str) -> bool | None:
    """For numerals with a base: the same value. None where neither has one."""
    numerals = [_BASED.fullmatch(text) for text in (gold, answer)]
    if not any(numerals):
        return None
    values = []
    for text, numeral in zip((gold, answer), numerals, strict=True):
        if numeral is None:
            # 5_6 for 5 may be two answers.
            if any(other is not None and len(other[1]) == 1 for other in numerals):
                return False
            values.append(exact_number(text))
            continue
        base = int(numeral[2] or numeral[3])
        try:
            values.append(Fraction(int(numeral[1], base)) if base >= 2 else None)
        except ValueError:
            values.append(None)
    return values[0] is not None and values[0] == values[1]


def _is_rounded(gold: str, answer: str, left: Any, right: Any, digits: int = _MIN_DIGITS) -> bool:
    """Whether one of both is a decimal that the other is rounded or cut to. Both of them decimals are no such pair."""
    decimals = [_DECIMAL.fullmatch(text.strip()) for text in (gold, answer)]
    if (decimals[0] is None) == (decimals[1] is None):
        # 71.6 for 72 is written as a rounding where it says so.
        whole = [re.fullmatch(r"[-+]?\d+", text.strip()) for text in (gold, answer)]
        if digits >= _MIN_DIGITS or not decimals[0] or not decimals[1] or whole[0]:
            return False
    places = []
    for decimal in decimals:
        if decimal is not None and len((decimal[1] + decimal[2]).lstrip("0")) >= digits:
            places.append(len(decimal[2]))
    if not places:
        return False
    # A whole number, or a terminating decimal, says exactly what it says.
    if digits >= _MIN_DIGITS and any(isinstance(x, Fraction) and _terminates(x, max(places)) for x in (left, right)):
        both = [x for x in (left, right) if isinstance(x, Fraction) and _terminates(x, max(places))]
        if len(both) == 2:
            return False
    step = sympy.Rational(1, 10 ** min(places))
    decimal, value = (left, right) if decimals[0] is not None else (right, left)
    decimal, value = sympy.sympify(decimal), sympy.sympify(value)
    is_cut = (decimal > 0) == (value > 0) and bool(0 <= abs(value) - abs(decimal) < step)
    return is_cut or bool(abs(decimal - value) <= step / 2)


def _terminates(value: Fraction, places: int) -> bool:
    return (value * 10**places).denominator == 1


def _value(text: str) -> Any:
    exact = exact_number(text)
    if exact is not None:
        return sympy.sympify(exact)
    parsed = _parsed(text)
    return parsed.evalf(40) if parsed is not None and not parsed.free_symbols and parsed.is_number else None


def _parsed(text: str) -> Any:
    """The expression that a text is, with exact numbers; None where it is no single one."""
    text = re.sub(r"_\s*(\w)(?=\s)", r"_{\1}", text)
    if not all(map(_COMMANDS.fullmatch, re.findall(r"\\([a-zA-Z]+|.)", text))):
        return None
    # Limits of a sum have an equals sign, and of a limit an arrow.
    if _SUSPECT.search(re.sub(r"_\s*\{[^{}]*\}", "_", text)) or not _is_small(text):
        return None
    exact = exact_number(text)
    if exact is not None:
        return sympy.Rational(exact.numerator, exact.denominator)
    text = re.sub(r"\\(?:dbinom|tbinom)", r"\\binom", text)
    text = re.sub(r"(?<=\d)\s*!", "!", re.sub(r"\\binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}", text))
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    # Without math-verify's own time-outs: they work in the main thread only, not within one long operation, and would
    # make a wrong answer of what was never judged, uncounted.
    parsed = parse(rf"$\boxed{{{text}}}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    if len(parsed) != 1 or not isinstance(parsed[0], sympy.Expr):
        return None
    expression = parsed[0].doit()
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.nan, sympy.zoo):
        return None
    names = {symbol: sympy.Symbol(symbol.name, real=True) for symbol in expression.free_symbols if symbol.name != "i"}
    names |= {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    return expression.subs(names).doit().replace(lambda part: part.is_Float, lambda part: sympy.Rational(str(part)))


def _is_small(text: str) -> bool:
    """Whether no power or factorial can take for ever; those that can are rarely the answer."""
    towers = re.search(r"\^\s*[{(][^{})]*\^|\^\s*\w\s*\^|\*\*", text)
    sizes = [int(size) for size in re.findall(r"\^\s*\{?\s*-?(\d+)|(\d+)\s*!", text) for size in size if size]
    return not towers and all(size <= _MAX_POWER for size in sizes)


def _equal(gold: Any, answer: Any, of_gold: str, of_answer: str) -> bool:
    """Numbers are compared relative to their size, others by math-verify and again at a few points."""
    if not gold.free_symbols and not answer.free_symbols:
        if gold.is_Rational and answer.is_Rational:
            left, right = Fraction(gold.p, gold.q), Fraction(answer.p, answer.q)
            return left == right or _is_rounded(of_gold, of_answer, left, right)
        return _is_near(gold, answer) or (
            _is_real(gold) and _is_real(answer) and _is_rounded(of_gold, of_answer, gold.evalf(40), answer.evalf(40))
        )
    if gold.free_symbols != answer.free_symbols:
        gold, answer = sympy.simplify(gold), sympy.simplify(answer)
        if gold.free_symbols != answer.free_symbols:
            return False
    return _agree_at_points(gold, answer) and (
        bool(verify(gold, answer, timeout_seconds=None)) or sympy.simplify(gold - answer) == 0
    )


def _is_real(value: Any) -> bool:
    return bool(value.evalf(20).is_real)


def _is_near(one: Any, other: Any) -> bool:
    """Whether two numbers are equal, to 30 digits of theirs."""
    if one.is_infinite or other.is_infinite:
        return bool(one == other)
    values = [sympy.N(one, 60), sympy.N(other, 60)]
    if not all(value.is_number and value.is_finite for value in values):
        return False
    size = max(abs(value) for value in values)
    difference = abs(values[0] - values[1])
    if difference == 0 or difference < size * sympy.Float(10, 60) ** -30:
        return True
    # Exact zeros that are not seen to be such.
    return (one.is_zero or other.is_zero or size < 1e-30) and sympy.simplify(one - other) == 0


def _agree_at_points(one: Any, other: Any) -> bool:
    """Whether both have the same value at a few points, where either has one."""
    symbols = sorted(one.free_symbols, key=str)
    for point in range(3):
        values = {name: sympy.Rational(7 + 4 * point + 3 * index, 5 + index) for index, name in enumerate(symbols)}
        left, right = one.subs(values), other.subs(values)
        if left.is_number and right.is_number and left.is_finite and right.is_finite and not _is_near(left, right):
            return False
    return True
