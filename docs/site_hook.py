"""What mkdocs does not know of this repository: pages that stand outside docs/, and links that are right on both sides.

A page of docs/ stands at the top of the site, everything else of the repository at its own path (kernels/README.md,
bench/results/cpu/plan.md). A link in a page is relative to the file, as hosted repositories show it; here it is turned
into the link of the site. What a page links to becomes part of the site: Markdown as a page, other files as they are.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`[^`\n]+`)")


def place_in_site(path: str) -> str:
    """Where a file of the repository stands in the site."""
    # mkdocs would take README.md for the first page.
    return "readme.md" if path == "README.md" else path.removeprefix("docs/")


def place_in_repository(page: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if page == "readme.md":
        return "README.md"
    return f"docs/{page}" if (ROOT / "docs" / page).is_file() else page


def linked_file(source: str, target: str) -> str | None:
    """The file of the repository that a link means; None for addresses, and where there is no such file.

    Args:
        source: the file with the link, from the root of the repository.
        target: the link, without an anchor.
    """
    if "://" in target or target.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if (ROOT / path).is_file() and not path.startswith("..") else None


def links(source: str) -> set[str]:
    """The files of the repository that a page links to."""
    text = FENCE.sub("", (ROOT / source).read_text(encoding="utf-8"))
    return {path for match in LINK.finditer(text) if (path := linked_file(source, match.group(2)))}


def on_files(files: Files, config) -> Files:
    """Add what the pages link to, and what those pages link to in turn."""
    waiting = [place_in_repository(file.src_uri) for file in files.documentation_pages()]
    waiting += [page for page in _pages_of(config.nav) if (ROOT / page).is_file()]
    known = set()
    while waiting:
        source = waiting.pop()
        if source in known:
            continue
        known.add(source)
        place = place_in_site(source)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
        if source.endswith(".md"):
            waiting += sorted(links(source))
    return files


def _pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in _pages_of(part)]


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turn links into those of the site, and what only GitHub's Markdown knows into what mkdocs knows."""
    source = place_in_repository(page.file.src_uri)

    def turn(match: re.Match) -> str:
        before, target, anchor, after = match.groups()
        path = linked_file(source, target)
        if path is None:
            return match.group()
        here = posixpath.dirname(page.file.src_uri)
        return f"{before}{posixpath.relpath(place_in_site(path), here or '.')}{anchor or ''}{after}"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(turn, _tables(part)) for part in parts[::2]]
    return "".join(parts)


def _tables(text: str) -> str:
    """In a table's row, a bar inside code needs no backslash here."""
    rows = [
        CODE.sub(lambda code: code.group().replace("\\|", "|"), line) if line.startswith("|") else line
        for line in text.split("\n")
    ]
    return "\n".join(rows)
