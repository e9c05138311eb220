r"""What the text of a final answer says: its normal form, its numbers, and how it divides into parts."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

# A plain number as people dress it: $1,234.50, 7., -3. Lists and percentages are for math-verify. Blanks can be matched
# in one way only: with two, a long run of them would take the square of its length.
_PLAIN = re.compile(r"([-+]?)\s*(?:\$\s*)?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)\s*")

_CHARACTERS = {
    **{
        "\u2212": "-",
        "\u2013": "-",
        "—": "-",
        "\u00d7": r"\times ",
        "÷": "/",
        "·": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
    },
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\neq ",
        "≈": r"\approx ",
        "\u222a": r"\cup ",
        "\u2228": r"\lor ",
        "±": r"\pm ",
    },
    **{
        "∧": r"\land ",
        "→": r"\to ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "\u211d": r"\mathbb{R}",
        "°": r"^\circ ",
        "θ": r"\theta ",
    },
    **{
        "\u2061": "",
        "\u200b": "",
        "\ufeff": "",
        "€": r"\$",
        "£": r"\$",
        "¥": r"\$",
        "₹": r"\$",
        "\u2044": "/",
        "\u2032": "'",
    },
    **{"\u2009": r"\,", "\u202f": r"\,", "\u00a0": "~", "\u2008": r"\,", "\u200a": r"\,"},
    **{"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8"},
    **{"⅞": " 7/8", "⅕": " 1/5", "⅖": " 2/5", "⅗": " 3/5", "⅘": " 4/5", "⅙": " 1/6", "⅚": " 5/6"},
}
# Raised and lowered characters: the sign that LaTeX writes before them, and what they are on the line.
_SCRIPTS = {raised: ("^", plain) for raised, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True)}
_SCRIPTS |= {lowered: ("_", plain) for lowered, plain in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)}

# Commands that change how an argument looks, and no more.
_FONTS = (
    "text|textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|mathcal|boldsymbol|"
    "bm|emph|underline|operatorname|boxed|fbox|rm|bf|it|displaystyle|textstyle|limits|bfseries|rmfamily"
)
_LINE_END = "\ue000"
_BLANK = r"(?:\\[,:;! ]|~|\s)"
_STEPS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\\s*$", ""),
        (rf"\\(?:{_FONTS})(?![a-zA-Z])\s*\{{([^{{}}]*)\}}", r" \1 "),
        (
            r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?\s*[)}]?",
            r"\\\1{\\frac{\2\\pi}{180}}",
        ),
        (r"\\(?:left|right|big|Big|bigg|Bigg|bigl|bigr|Bigl|Bigr|middle)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:textcolor|color|colorbox)\s*\{[a-zA-Z]*\}", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:leq|leqslant|leqq|l(?=t(?![a-zA-Z])))(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])", r"\\ge"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:ne|not\s*=)(?![a-zA-Z])", r"\\neq "),
        (r"\\(?:dots|cdots|dotsc|hdots)(?![a-zA-Z])|\.\.\.|…", r"\\ldots "),
        (r"\\(?:varnothing)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\lbrack(?![a-zA-Z])", "["),
        (r"\\rbrack(?![a-zA-Z])", "]"),
        (r"\\mathbb\s*\{?R\}?|\\R(?![a-zA-Z])", r"(-\\infty,\\infty)"),
        (r"\\(?:colon)(?![a-zA-Z])", ":"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:degree|textdegree)(?![a-zA-Z])", " "),
        (r"\\[$€£]|\\(?:euro|pounds|textdollar)(?![a-zA-Z])", " "),
        (r"\\\(|\\\)|\\\[(?!\d)|\$", " "),
        (r"\\%|\uff05", "%"),
        (r"\{,\}", ","),
        (r"\\#|\\_(?=\W|$)", " "),
        # 10\,000, 10 000 and 10,\!000 are one number.
        (rf"(?<![\d.])(\d{{1,3}})((?:,?{_BLANK}{{1,2}}\d{{3}}(?!\d))+)(?![\d.,]*\d)", r"\1<<\2>>"),
        (r"\\!", ""),
        (r"\\(?:quad|qquad|newline|hspace\s*\*?\s*\{[^{}]*\}|hfill)(?![a-zA-Z])", " ; "),
        (r"\\[,:;> ]|~", " "),
        (rf"\\(?:{_FONTS})(?![a-zA-Z])", " "),
    )
]
_GROUPED = re.compile(r"<<([^<>]*)>>")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_OPENING = re.compile(r"\\begin\{[a-zA-Z]+\*?\}|\\end\{[a-zA-Z]+\*?\}|\\[{}]|\\langle|\\rangle|[()\[\]{}]|\\[\s\S]")
_LIST = r"\\\\|[,;&]|\\(?:lor|vee|land|wedge|cup|bigcup)(?![a-zA-Z])|(?<![\\a-zA-Z])(?:or|and)(?![a-zA-Z])"
LIST = re.compile(_LIST, re.IGNORECASE)
RELATION = re.compile(
    r"\\(?:le|ge|neq|approx|simeq|sim|cong|equiv|to|rightarrow|longrightarrow|mapsto|Rightarrow|implies|iff|propto|in|"
    r"subset|subseteq|leftrightarrow|Leftrightarrow|mid|parallel|nless|ngtr|ll|gg|notin|ni|not|neg|lnot)(?![a-zA-Z])|"
    r"<=|>=|!=|==|[<>=→]|(?<![\\a-zA-Z])(?:to|versus|vs|but|not)(?![a-zA-Z])"
)
RATIO = re.compile(":")


def plain_number(text: str) -> Decimal | None:
    """The value of a plain number, None for anything else. Its time grows linearly with the text."""
    match = _PLAIN.fullmatch(text.strip())
    return Decimal(match[1] + match[2].replace(",", "").removesuffix(".")) if match else None


def normal_form(text: str) -> str:
    """An answer without what only changes how it looks; text commands become words between blanks."""
    # A line's end is one character meanwhile: its second backslash starts no command.
    text = _as_latex(text.replace(_LINE_END, "").replace("\\\\", _LINE_END))
    for pattern, by in _STEPS:
        text = pattern.sub(by, text)
        if "<<" in text:
            text = _GROUPED.sub(lambda match: re.sub(r"\D", "", match[1]), text)
    text = _REPEATING.sub(_repeating, text).replace(_LINE_END, r" \\ ")
    return tidy(" ".join(text.split()))


def _as_latex(text: str) -> str:
    """Characters that have a LaTeX or ASCII way to be written are written so."""
    written: list[str] = []
    previous = ""
    for character in text:
        if character in _SCRIPTS:
            sign, plain = _SCRIPTS[character]
            # A run of raised digits is one exponent, and one of lowered digits one index.
            if previous == sign:
                written[-1] = written[-1][:-1] + plain + "}"
            else:
                written.append(f"{sign}{{{plain}}}")
            previous = sign
            continue
        previous = ""
        if character in _CHARACTERS:
            written.append(_CHARACTERS[character])
        elif character.isdecimal():
            written.append(str(unicodedata.decimal(character)))
        else:
            written.append(unicodedata.normalize("NFKC", character) if character > "\u2fff" else character)
    joined = "".join(written)
    return re.sub(r"√\s*(\d+|[a-z]|\([^()]*\)|\{[^{}]*\})", lambda match: rf"\sqrt{{{match[1].strip('(){}')}}}", joined)


def _repeating(match: re.Match[str]) -> str:
    """A fraction, for a decimal with a repeating end."""
    whole, fixed, period = match[1] or "0", match[2], match[3]
    value = int(whole + fixed + period) - int(whole + fixed)
    divisor = 10 ** len(fixed) * (10 ** len(period) - 1)
    return f"({value}/{divisor})"


def tidy(text: str) -> str:
    """A part of an answer without blanks, braces around it all and punctuation at its end."""
    while True:
        shorter = text.strip()
        if not shorter.endswith((r"\.", r"\ldots")):
            shorter = shorter.rstrip(".,;! " if shorter[-2:-1] in (" ", ".") else ".,; ")
        shorter = shorter.lstrip(";, ").strip("*").removeprefix(r"\ ").strip()
        inner = enclosed(shorter, "{", "}")
        if inner is not None:
            shorter = inner
        if shorter == text:
            return text
        text = shorter


def enclosed(text: str, opening: str, closing: str) -> str | None:
    """What stands between brackets that enclose the whole text; None where they do not."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
        return None
    depth = 0
    for token, end, change in brackets(text):
        depth += change
        if depth <= 0:
            return text[len(opening) : -len(closing)] if end == len(text) and token == closing else None
    return None


def brackets(text: str) -> list[tuple[str, int, int]]:
    """Each bracket with its end, and by how much it changes the depth."""
    places = []
    for token in _OPENING.finditer(text):
        what = token[0]
        if what in ("(", "[", "{", r"\{", r"\langle") or what.startswith(r"\begin{"):
            places.append((what, token.end(), 1))
        elif what in (")", "]", "}", r"\}", r"\rangle") or what.startswith(r"\end{"):
            places.append((what, token.end(), -1))
    return places


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Divide where a separator stands outside all brackets.

    Returns:
        The parts, and the separators between them.
    """
    depths: list[tuple[int, int]] = []
    depth = 0
    for _, end, change in brackets(text):
        depth += change
        depths.append((end, depth))
    parts, between, begin, index, depth = [], [], 0, 0, 0
    for match in separator.finditer(text):
        while index < len(depths) and depths[index][0] <= match.start():
            depth = depths[index][1]
            index += 1
        if depth == 0:
            parts.append(text[begin : match.start()])
            between.append(match[0])
            begin = match.end()
    return [*parts, text[begin:]], between


def items(text: str) -> list[str]:
    r"""The members of a list at the top level; one that says `\pm` stands for two."""
    if split(text, re.compile(r"[(\[{]"))[1] or not text.startswith(("(", "[", r"\{")):
        text = _without_commas(text)
    parts = [tidy(part) for part in split(text, LIST)[0]]
    parts = [part for part in parts if part]
    members: list[str] = []
    for part in parts:
        if part.count(r"\pm") == 1 and r"\mp" not in part:
            members += [tidy(re.sub(r"\\pm(?![a-zA-Z])", sign, part)) for sign in "+-"]
        else:
            members.append(part)
    return members


def _without_commas(text: str) -> str:
    """Numbers outside brackets without the commas between thousands."""
    depth_ends = brackets(text)

    def bare(match: re.Match[str]) -> str:
        depth = sum(change for _, end, change in depth_ends if end <= match.start())
        return match[0].replace(",", "") if depth == 0 else match[0]

    return _COMMAS.sub(bare, text)


_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SCIENTIFIC = re.compile(
    rf"([-+]?\s*{_NUMBER})\s*(?:[eE]\s*([-+]?\d{{1,6}})|(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{\s*([-+]?\s*\d{{1,6}})\s*\}}|(\d)))"
)
_MIXED = re.compile(
    r"([-+]?)\s*(?:(\d{1,40})\s*(?:(?<=\s)|(?=\\)))??"
    r"(?:\\frac\s*(?:\{\s*(-?\d{1,40})\s*\}|(\d)(?=\s*\{|\d|\s))\s*(?:\{\s*(\d{1,40})\s*\}|(\d))|(\d{1,40})\s*/\s*(\d{1,40}))"
)


def exact_number(text: str) -> Fraction | None:
    """The value of a decimal, a fraction, a mixed number or a number with a power of ten; None for anything else."""
    text = text.strip()
    plain = plain_number(text)
    if plain is not None:
        return Fraction(plain)
    match = _SCIENTIFIC.fullmatch(text)
    if match:
        exponent = int((match[2] or match[3] or match[4]).replace(" ", ""))
        if abs(exponent) > 5000:
            return None
        return Fraction(match[1].replace(" ", "")) * Fraction(10) ** exponent
    match = _MIXED.fullmatch(text)
    if not match:
        return None
    above, below = int(match[3] or match[4] or match[7]), int(match[5] or match[6] or match[8])
    if below == 0 or (match[2] and above < 0):
        return None
    value = int(match[2] or 0) + Fraction(above, below)
    return -value if match[1] == "-" else value
