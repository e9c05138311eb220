r"""Where a text gives its final answer. Everything here takes time that grows linearly with the text."""

from __future__ import annotations

import re

# What a scan for boxes stops at. An escaped character is passed over as one, so that `\{` counts as no brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)(?![a-zA-Z])|\\[\s\S]|[{}]")
# A box without braces: `\boxed 72`.
_BARE = re.compile(r"[ \t]*([-+]?[\d.,]*\d|[A-Za-z](?![A-Za-z]))")
# Between two boxes that are given as alternatives, or together.
_LINK = re.compile(r"(?:[\s$,;.&\\()\[\]{}]|or|and|text|i\.e)*")
_MAX_LINK = 40
# Titles of a markdown section, not answers behind a GSM8K marker.
_HEADING = re.compile(
    r"(?:step|part|case|problem|question|solution|section|phase|stage|task|example|exercise|equation|method|approach|"
    r"day|week|chapter|calculation|calculate|compute|find|determine|let|first|second|third|next|then)\b|"
    r"\(?\d{1,3}[.)](?:[ \t]|$)[ \t]*[^\W\d]|\d{1,3}[ \t]*:[ \t]*[^\W\d]",
    re.IGNORECASE,
)
_PHRASE = re.compile(r"\b(?:answer|ans)\b[ \t*_]{0,8}(?:is\b|:|=)[ \t*_]{0,8}(?:is\b|:)?", re.IGNORECASE)
_BOLD = "*_ \t\r"
_TITLE = re.compile(r"(?:the |my )?(?:final |correct )?(?:answer|result|solution|conclusion)[\s.:]{0,8}", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    r"""The final answer that a text marks, None where it marks none.

    That is what stands in the last `<answer>` tags; else in the last `\boxed{...}`; else behind the last `####` that is
    no heading; else behind the last "answer is" or "answer:". Reasoning in `<think>` counts only where nothing follows.
    """
    _, tag, rest = text.rpartition("<answer>")
    if tag:
        inner = rest.partition("</answer>")[0]
        answer = _marked(inner)
        return clean(inner) if answer is None else answer
    _, tag, rest = text.rpartition("</think>")
    answer = _marked(rest) if tag else None
    return _marked(text) if answer is None else answer


def without_headings(text: str) -> str:
    """The text without the lines that are titles of sections."""
    if "#" not in text:
        return text
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))


def clean(text: str) -> str:
    """An answer without what markdown puts around it."""
    return text.strip().strip(_BOLD).strip()


def _marked(text: str) -> str | None:
    answer = _boxed(text)
    if answer is None:
        answer = _hashed(text)
    return _phrased(text) if answer is None else answer


def _boxed(text: str) -> str | None:
    """What the last outermost box holds; boxes that are joined by "or" and the like are one list."""
    boxes: list[tuple[int, int, str]] = []
    depth, opened, begin = 0, -1, 0
    for token in _BRACES.finditer(text):
        what = token[0]
        if what.endswith("{") and not what.startswith("\\{"):
            if len(what) > 1 and opened < 0:
                depth, opened, begin = 0, token.start(), token.end()
            depth += 1
        elif what == "}":
            depth -= 1
            if depth == 0 and opened >= 0:
                boxes.append((opened, token.end(), text[begin : token.start()].strip()))
                opened = -1
            depth = max(depth, 0)
        elif opened < 0 and what in (r"\boxed", r"\fbox"):
            bare = _BARE.match(text, token.end())
            if bare:
                boxes.append((token.start(), bare.end(), bare[1]))
    # One that was never closed was to replace those before it.
    if not boxes or opened >= 0:
        return None
    return _joined(text, boxes)


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """The last box, with those just before it that are linked to it."""
    # "Put it into \\boxed{}" is no answer.
    while len(boxes) > 1 and not boxes[-1][2] and boxes[-1][0] - boxes[-2][1] > 1:
        boxes.pop()
    start, end, last = boxes[-1]
    if not last:
        return ""
    parts = [last]
    # `\boxed{71}{72}` shows two answers.
    while text.startswith("{", end):
        close = text.find("}", end)
        if close < 0 or close - end > _MAX_LINK:
            break
        parts.append(text[end + 1 : close].strip())
        end = close + 1
    for before, stop, content in reversed(boxes[:-1]):
        if start - stop > _MAX_LINK or not _LINK.fullmatch(text, stop, start):
            break
        if "\n\n" in text[stop:start]:
            break
        parts.insert(0, content)
        start = before
        if len(parts) > _MAX_LINK:
            break
    return parts[0] if len(set(parts)) == 1 else "; ".join(parts)


def _hashed(text: str) -> str | None:
    """What stands behind the last `####`, or on the next line; None where that is a heading."""
    _, mark, rest = text.rpartition("####")
    if not mark:
        return None
    line, _, after = rest.lstrip("#").partition("\n")
    line, after = clean(line), after.strip()
    if not line or _TITLE.fullmatch(line):
        line, _, after = after.partition("\n")
        line, after = clean(line), ""
    if not line:
        return None
    if _HEADING.match(line) or (after and not any(character.isdigit() or character in "\\$" for character in line)):
        return None
    phrased = _phrased(line)
    return line if phrased is None else phrased


def _phrased(text: str) -> str | None:
    """What stands behind the last "answer is" or "answer:", to the end of its line or sentence."""
    phrases = [match.end() for match in _PHRASE.finditer(text)]
    if not phrases:
        return None
    # Where nothing follows on the line, the next one has it.
    line, _, after = text[phrases[-1] :].partition("\n")
    line = clean(line) or clean(after.strip().partition("\n")[0])
    for stop in (". ", ".** ", "** ", " (", "! "):
        line = line.partition(stop)[0] if not line.startswith(stop.strip()) else line
    return clean(line) or None
