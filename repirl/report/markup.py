"""Texts and numbers as HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

MINUS = "\u2212"
# Marks that turn the direction of all text behind them, until a mark that may be missing: shown as a sign.
_TURNS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def escape(value: object) -> str:
    """Escape a text for HTML, also inside quotes. Control characters become visible symbols, lone surrogates "?"."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    text = text.replace("\x7f", "\u2421").translate(_TURNS)
    text = "".join(_control(c) for c in text)
    return html.escape(text, quote=True)


def _control(character: str) -> str:
    code = ord(character)
    if code < 32 and character not in "\n\t":
        return chr(0x2400 + code)
    # The browser may not show these, and parsers of HTML may refuse them.
    return "\ufffd" if 0x80 <= code < 0xA0 or code & 0xFFFE == 0xFFFE or 0xFDD0 <= code < 0xFDF0 else character


def visible(token: str) -> str:
    """Escape a token, and add pale signs for white space. Text that a reader copies does not contain these signs."""
    if token == "":
        return '<i class="w none"></i>'
    signs = {" ": '<i class="w"> </i>', "\n": '<i class="w nl">\n</i>', "\t": '<i class="w tab">\t</i>'}
    return "".join(signs.get(part) or escape(part) for part in re.split(r"([ \n\t])", token))


def number(value: float | None, percent: bool = False, digits: int = 4) -> str:
    """Significant digits, or percent with one decimal; a real minus sign. "n/a" for None."""
    if value is None or not math.isfinite(value):
        return "n/a" if value is None else str(float(value)).replace("-", MINUS)
    if percent:
        return f"{100 * value:.1f}%".replace("-", MINUS)
    text = f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.{digits}g}"
    return ("0" if float(text) == 0 else text).replace("-", MINUS)


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of numbers in their order, with linear interpolation between two of them."""
    position = share * (len(ordered) - 1)
    index = math.floor(position)
    following = ordered[min(index + 1, len(ordered) - 1)]
    return ordered[index] + (position - index) * (following - ordered[index])
