"""The program in a model's response. Only patterns are searched for: what a model wrote is not parsed in this process,
whose parser it could crash."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

# Characters of a response that are looked at.
MAX_RESPONSE = 1 << 20

_FENCE = re.compile(r"([ \t]*(?:[-*>][ \t]+)?)(`{3,}|~{3,})([^`]*)")
_TAGS = {"", "python", "py", "python3", "py3", "ipython", "ipython3", "sage", "pycon", "starter", "code"}
# Lines that begin a program, where a response is nothing but one.
_CODE_START = re.compile(
    r"(?:import|from)\s+\w|(?:async\s+)?def\s+\w|class\s+\w|@\w|[A-Za-z_][\w.]*\s*(?:[-+*/]?=[^=]|\()"
)
_KEYWORD_START = re.compile(r"(?:for|while|if|with|try)\b.*:\s*(?:#.*)?$")
_LOOKS_LIKE_CODE = re.compile(r"\b(?:print|input|import|def|class|return|sys)\b")
_FUTURE = re.compile(r"^from\s+__future__\s+import\s+[^\n]*\n?", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block. tag: its language, in lower case. closed: whether its end is there."""

    code: str
    tag: str
    closed: bool


def find_code(response: str, entry: str | None, starter: str = "") -> str | None:
    """The program that a response gives as its solution.

    What stands before the last `</think>` is left out. Blocks between fences count that are tagged as Python or not at
    all. Of these, the last closed one that defines what is asked for; else a last one without a closing fence that
    does, as of a response that was cut off; else the last one. Where programs read stdin, nothing is asked for by
    name: then the last block that is tagged as Python, else the last one that looks like code. Without any block the
    whole response counts from its first line of code on, and a response that begins with an indented line goes on from
    the starter code.

    Args:
        response: a model's text.
        entry: what is called, as "f" or "Solution.f"; None for a program that reads stdin.
        starter: the code that the model was given to go on from.

    Returns:
        The whole program, the starter code included; None where there is no code.
    """
    text = response[:MAX_RESPONSE].rpartition("</think>")[2]
    blocks = [block for block in fenced_blocks(text) if block.tag in _TAGS and block.code.strip()]
    code = _chosen(blocks, entry).code if blocks else _unfenced(text, entry, starter)
    if code is None:
        return None
    if _is_body(code, entry) and starter.strip():
        # A body, of the head that the starter code ends with.
        return _hoisted("", f"{starter.rstrip()}\n{_body(code)}")
    return _hoisted(whole_head(starter), _in_class(textwrap.dedent(code), entry))


def fenced_blocks(text: str) -> list[Block]:
    """The blocks between fences of backticks or tildes, in their order; a fence may be indented, as in a list, and the
    closing one may stand at the end of the last line of code."""
    blocks, lines = list[Block](), list[str]()
    fence, tag, indent = "", "", 0
    for line in _lines(text):
        if not fence:
            if match := _FENCE.fullmatch(line):
                fence, tag, indent, lines = match[2], _tag(match[3]), len(match[1]), []
            continue
        # A fence within a docstring is indented further.
        is_inner = len(line) - len(line.lstrip()) > indent + 3 and not line.strip().strip(fence[0])
        line = line[min(indent, len(line) - len(line.lstrip())) :]
        if line.rstrip().endswith(fence) and not is_inner:
            if last := line.rstrip().rstrip(fence[0]):
                lines.append(last)
            blocks.append(Block("\n".join(lines) + "\n", tag, closed=True))
            fence = ""
        else:
            lines.append(line)
    if fence:
        blocks.append(Block("\n".join(lines) + "\n", tag, closed=False))
    return blocks


def _lines(text: str) -> list[str]:
    """Without their ends. A text in a program may hold other characters that `str.splitlines` takes for ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _tag(info: str) -> str:
    """The language that a fence names: python of `python title="a"`, `{.python}` and `python:a.py`."""
    words = re.split(r"[\s:,;={}]+", info.strip().lower().strip("{}. "))
    return words[0].lstrip(".")


def _chosen(blocks: list[Block], entry: str | None) -> Block:
    closed = [block for block in blocks if block.closed]
    if entry is None:
        tagged = [block for block in closed if block.tag]
        like_code = [block for block in closed if _LOOKS_LIKE_CODE.search(block.code)]
        return (tagged or like_code or blocks)[-1]
    defining = [block for block in closed if _defines(block.code, entry)]
    if not defining:
        defining = [block for block in blocks if _defines(block.code, entry)]
    return (defining or closed or blocks)[-1]


def _defines(code: str, entry: str | None) -> bool:
    """Whether a text binds the name that is called, or the method of a class that is."""
    if entry is None:
        return False
    names = "|".join(re.escape(name) for name in entry.split("."))
    return bool(
        re.search(rf"^[ \t]*(?:async\s+)?(?:def|class)\s+(?:{names})\b", code, re.M)
        or re.search(rf"^(?:{names})\s*(?::[^=\n]+)?=[^=]|^(?:from|import)\b.*\b(?:{names})\b", code, re.M)
    )


def _unfenced(text: str, entry: str | None, starter: str) -> str | None:
    """The code of a response without fences."""
    lines = text.splitlines(keepends=True)
    if _is_body(text, entry) and starter.strip():
        return text
    for number, line in enumerate(lines):
        if _CODE_START.match(line) or (entry is None and _KEYWORD_START.match(line)):
            # What does not stand in these lines does not stand in the last of them either.
            code = "".join(lines[number:])
            is_code = _defines(code, entry) if entry is not None else _LOOKS_LIKE_CODE.search(code)
            return code if is_code else None
    return None


def _is_body(code: str, entry: str | None) -> bool:
    """Whether the first line is indented, so that it goes on from something, and is not the whole function itself."""
    first = next((line for line in code.splitlines() if line.strip()), "")
    return first[:1] in (" ", "\t") and not _defines(first, entry)


def _body(code: str) -> str:
    """The first indented lines: what comes behind them is no part of the function that is being completed."""
    kept = []
    for line in _lines(code):
        if line.strip() and line[:1] not in " \t":
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


def whole_head(starter: str) -> str:
    """Starter code as a program by itself: where its last function has no body, it gets one. Where that is not enough,
    what stands before its first function or class."""
    for text in (starter, f"{starter.rstrip()} pass\n"):
        try:
            compile(text, "starter", "exec")
            return text
        except (SyntaxError, ValueError):
            continue
    return re.split(r"^(?:@|class\b|def\b|async\b)", starter, maxsplit=1, flags=re.M)[0]


def _in_class(code: str, entry: str | None) -> str:
    """A method that a model wrote without its class is put into one."""
    name, _, method = (entry or "").partition(".")
    if not method or re.search(rf"^(?:class\s+{name}\b|{name}\s*=)", code, re.M):
        return code
    if not (head := re.search(rf"^(?:async\s+)?def\s+{method}\s*\(\s*(self\b)?", code, re.M)):
        return code
    value = method if head[1] else f"staticmethod({method})"
    return f"{code}\nclass {name}:\n    {method} = {value}\n"


def _hoisted(head: str, code: str) -> str:
    """Both as one program, with its imports from __future__ first, as the language wants them."""
    futures = "".join(dict.fromkeys(line.strip() + "\n" for line in _FUTURE.findall(head + "\n" + code)))
    head, code = _FUTURE.sub("", head), _FUTURE.sub("", code)
    return f"{futures}{head.rstrip()}\n\n{code}" if head.strip() else f"{futures}{code}"
