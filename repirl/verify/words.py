"""Words in final answers: units, options of a multiple choice, and answers that are words."""

from __future__ import annotations

import re

_NUMBERS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
)
# Words behind a number that change it, or deny it.
_CHANGES = re.compile(
    r"\b(?:hundreds?|thousands?|millions?|billions?|trillions?|dozens?|score|k|not|no|nor|or|and|but|less|fewer|more|than|"
    r"at|least|most|over|under|minus|plus|times|squared|cubed|to|mod|modulo|choose|factorial|half|halves|thirds?|"
    r"quarters?|fourths?|fifths?|tenths?|hundredths?|thousandths?|remainder|base|if|unless|except|wrong|incorrect|"
    r"approximately|sin|cos|tan|log|ln|pi|sqrt|without|never|false|isn|doesn|point|divided|by)\b",
    re.IGNORECASE,
)
_SHORT = re.compile(
    r"[mcdk]?m|in|ft|yd|mi|[km]?g|lbs?|oz|s|sec|min|hr?|hrs|ms|(?:[ck]?m|ft|mi)/(?:s|h|hr|min)|[mk]?[lL]|k?[JWN]|V|A|Hz|K|C|F|k?Pa|sq|ct|c"
)
_UNIT = r"(?:[A-Za-z]+\.?(?:\s*/\s*[A-Za-z]+)?(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?)"
_AMOUNT = re.compile(
    r"(?P<number>[\s\S]*?[\d)}%]|[\s\S]*?\\(?:pi|infty))(?P<gap>\s*)(?P<unit>" + _UNIT + r"(?:[\s,'-]+" + _UNIT + r")*)"
)
_WORDS = re.compile(r"[^\W\d_][\w\s.,'\u2019!/()-]*")
_CHOICE = re.compile(r"(?:option|choice)?\s*(?:\(\s*([A-Ja-j])\s*\)|([A-Ja-j])\s*[.:)])\s*([\s\S]*)", re.IGNORECASE)
_MORE = re.compile(r"\s*(?:or|and|not|to)\b|\s*[,;&/|]|[\s\S]*\(\s*[A-J]\s*\)")
_OPTION = re.compile(r"(?:option|choice)\s*([A-J])", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:(?:the|my|our|final|correct|total)\s+)*(?:answer|result|total|value|sum)"
    r"\s*(?:is\b|:)\s*|(?:rs|us|usd|eur)\b\.?\s*(?=[\d.])",
    re.IGNORECASE,
)


def choice(text: str) -> tuple[str, str] | None:
    """The letter of an option, and what stands behind it; None for anything else."""
    match = _CHOICE.fullmatch(text)
    if match:
        # (A) or (B), (A)(B): more than one.
        if _MORE.match(match[3]):
            return None
        return (match[1] or match[2]).upper(), match[3].strip()
    named = _OPTION.fullmatch(text)
    if named:
        return named[1].upper(), ""
    return (text.upper(), "") if re.fullmatch("[A-Ja-j]", text) else None


def words(text: str) -> str | None:
    """An answer that is words, in lower case and with single blanks; None for anything else."""
    if not _WORDS.fullmatch(text) or re.search(r"[a-zA-Z]\s*[-/]\s*[a-zA-Z]\b(?![a-zA-Z])|\d\s*[-/]|\([^a-zA-Z]", text):
        return None
    if re.fullmatch(r"[a-zA-Z]\s*(?:\d+|\([^()]*\))?", text) and not text.isalpha():
        return None
    plain = re.sub(r"[.,'\u2019!()-]", " ", text).lower().split()
    return " ".join(word.removesuffix("s") if len(word) > 4 else word for word in plain)


def without_lead(text: str) -> str:
    """An answer without the words that introduce it."""
    lead = _LEAD.match(text)
    return text[lead.end() :].strip() if lead else text


def number_word(text: str) -> str:
    """The digits of a number that is written as a word, anything else as it is."""
    return str(_NUMBERS.index(text.lower())) if text.lower() in _NUMBERS else text


def _amount(text: str) -> tuple[str, str] | None:
    match = _AMOUNT.fullmatch(text)
    if not match or not re.search(r"\d", match["number"]) or _CHANGES.search(match["unit"]):
        return None
    first = re.match(r"[A-Za-z]+", match["unit"])
    assert first is not None
    is_short = len(first[0]) <= 2
    short = re.split(r"[\s^]", match["unit"])[0].rstrip(".")
    if is_short and not (match["gap"] and _SHORT.fullmatch(short)):
        return None
    # A command, an exponent or an opening bracket may end the number only where it is complete.
    number = match["number"].strip()
    end = re.sub(r"\\(?:pi|infty)$", "", number)
    if number.count("{") != number.count("}") or re.search(r"\\[a-zA-Z]*$|[A-Za-z]\s*\d*$", end):
        return None
    return number, match["unit"]


def drop_unit(text: str) -> str:
    """An amount without its unit, anything else as it is."""
    amount = _amount(text)
    if amount is None:
        return text
    is_percent = re.match(r"(?:percent|per cent|pct)", amount[1], re.IGNORECASE)
    return amount[0] + "%" * bool(is_percent and not amount[0].endswith("%"))


def unit(text: str) -> str:
    """The unit of an amount, so that two of one kind are equal texts; empty without one."""
    amount = _amount(text)
    if amount is None:
        return ""
    name = re.sub(r"[\s{}.'-]", "", amount[1]).lower()
    if re.match(r"dollar|euro|pound|usd|eur|rupee|percent|degree|deg$|unit|sq", name):
        return ""
    return _ABBREVIATED.get(name.rstrip("s") if len(name) > 2 else name, name.rstrip("s") if len(name) > 2 else name)


_ABBREVIATED = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "mile": "mi",
    "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s", "gram": "g", "kilogram": "kg", "pound": "lb",
    "yard": "yd", "liter": "l", "litre": "l",
}  # fmt: skip
