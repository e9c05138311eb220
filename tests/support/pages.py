"""Reads a page of repirl.report with the standard library."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Checks nesting while it reads; keeps elements as (tag, attributes, text inside)."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == [], "elements were left open"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute stands twice in {tag}"
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data):
        for _, index in self.open:
            self.elements[index][2] += data

    def all(self, tag, kind=None):
        return [
            (a, text)
            for t, a, text in self.elements
            if t == tag and (kind is None or kind in (a.get("class") or "").split())
        ]

    def tokens(self):
        return [(a, text) for a, text in self.all("span", "t")]
