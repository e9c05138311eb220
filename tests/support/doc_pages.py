"""What the pages for people hold: their blocks, and the commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shared import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}[^\n]*\n|\n(?= {4}))+)")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """language: of a fenced block, "" without one, None of a block that is indented."""

    page: Path
    language: str | None
    text: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    text = page.read_text(encoding="utf-8")
    fenced = [Block(page, language, body) for language, body in FENCE.findall(text)]
    rest = FENCE.sub("\n", text)
    return (*fenced, *(Block(page, None, re.sub(r"^ {4}", "", body, flags=re.M)) for body in INDENTED.findall(rest)))


def code_spans(page: Path) -> list[str]:
    """Code inside the text of a page, a line's end counted as a blank."""
    rest = FENCE.sub("\n", page.read_text(encoding="utf-8"))
    return [" ".join((a or b).split()) for a, b in re.findall(r"``(.+?)``|`([^`]+)`", INDENTED.sub("\n", rest), re.S)]


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each line of a shell's block: comments left out, continued lines and quoted ones in one."""
    pending = ""
    for line in text.replace("\\\n", " ").splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # A quotation that the next line ends.
            pending += "\n"
            continue
        pending = ""
        if words:
            yield words


def without_prefix(words: list[str]) -> list[str]:
    """A command without what only sets up its process: variables, `env`, `exec`, `srun` and their options."""
    if words and re.match(r"\w+=\(", words[0]):  # A list, whose parts shlex takes for words.
        return []
    while words and (ASSIGNMENT.match(words[0]) or words[0] in ("env", "exec", "srun")):
        takes_options = words[0] in ("env", "srun")
        words = words[1:]
        while takes_options and words and words[0].startswith("--"):
            words = words[1:]
    return words[:-1] if words and words[-1] == "&" else words
