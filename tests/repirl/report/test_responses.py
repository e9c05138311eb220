"""Responses on a page: whatever is in them, the page stays whole."""

import re

import pytest
from pages import Page

from repirl.report.responses import FIRST_TOKENS, LAST_TOKENS, samples_section, shortened

NASTY = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a\x00b\x07\x1b[31m",
    "\u202egnp.exe\u2066\u2067",
    "</span></div></article>",
    "\" onmouseover=\"alert(1)' x='",
    "<!-- ]]> -->",
    "&lt;b&gt;&#0;",
    "\ud800\udfff",
    "x" * 100_000,
    "\ufffe\uffff\x85",
    "{{7*7}}${7*7}`",
]


def sample(tokens, rewards="given", **changes):
    scores = [-float(i) for i in range(len(tokens))] if rewards == "given" else rewards
    variant = {"name": "a", "tokens": tokens, "rewards": scores, "error_span": None, "response_start": 0}
    made = {"title": "t", "prompt": "p", "note": "", "variants": [variant | changes], "correct": None}
    return made | {"tags": {"Turn": ["1"]}}


def page(*samples):
    return Page(samples_section(list(samples), {}, ""))


def test_no_text_breaks_out_of_its_place():
    steps = [{"start": 0, "end": len(NASTY), "score": -1.0}]
    one = sample(NASTY, steps=steps, note=NASTY[0], name=NASTY[1])
    one |= {"title": NASTY[0], "prompt": "".join(NASTY[:6]), "tags": {NASTY[1]: [NASTY[0]], "Turn": ["1", NASTY[5]]}}
    other = sample(["x"]) | {"tags": {NASTY[1]: ["2"], "Turn": ["3"]}}
    text = samples_section([one, other], {}, NASTY[0])
    read = Page(text)
    assert {tag for tag, _, _ in read.elements} <= {
        *("section", "h2", "p", "ul", "li", "span", "div", "form", "label", "select", "option", "article", "h3", "b"),
        *("output", "details", "summary", "ol", "i", "nav", "button", "code"),
    }
    assert not any(name.startswith("on") or name in ("src", "href") for _, a, _ in read.elements for name in a)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]", text)
    assert read.tokens()[0][1] == NASTY[0]
    assert read.tokens()[4][1] == NASTY[4]
    assert read.tokens()[7][1] == NASTY[7]


def test_right_to_left_text_is_kept():
    assert page(sample(["\u05e9\u05dc\u05d5\u05dd", "\u200f."])).tokens()[0][1] == "\u05e9\u05dc\u05d5\u05dd"


def test_long_texts_are_shortened_and_it_is_said():
    text = samples_section([sample(["x" * 100_000]) | {"prompt": "y" * 100_000}], {}, "")
    assert len(text) < 10_000
    assert "[99600 characters left out]" in Page(text).tokens()[0][1]
    assert "[96000 characters left out]" in Page(text).all("p", "prompt")[0][1]
    assert shortened("abcdefgh", 8) == "abcdefgh"


def test_a_long_response_shows_its_ends_and_it_is_said():
    read = page(sample([f"{i} " for i in range(5000)]))
    shown = [text.strip() for _, text in read.tokens()]
    assert shown == [str(i) for i in [*range(FIRST_TOKENS), *range(5000 - LAST_TOKENS, 5000)]]
    assert [text for _, text in read.all("span", "gap")] == ["\u2026 4000 tokens left out \u2026"]
    values = read.all("div", "tokens")[0][0]["data-r"].replace("\u2212", "-").split()
    assert [float(v) for v in values] == [-float(t) for t in shown]


def test_without_rewards_tokens_have_no_colour():
    read = page(sample(["a", "b"], None))
    assert [a["class"] for a, _ in read.tokens()] == ["t", "t"]
    assert "data-r" not in read.all("div", "tokens")[0][0]
    assert read.all("ul", "scales") == []


def test_rewards_on_one_side_are_not_neutral():
    """As rewards of a trained PRM are: a few low ones among many close to 0."""
    rewards = [-(1.03**i) * 1e-7 for i in range(591)]
    read = page(sample([str(i) for i in range(591)], rewards))
    plain = sum(a["class"] == "t q0" for a, _ in read.tokens())
    assert 0.3 < plain / 591 < 0.5
    [(_, legend)] = read.all("div", "cells")
    assert legend.count("<") == 5
    assert "highest 40% are plain" in read.all("span", "how")[0][1]


def test_verdicts_and_steps_are_shown():
    steps = [{"start": 0, "end": 2, "score": -0.5}, {"start": 2, "end": 3, "score": -2.0}]
    read = page(
        sample(["1+1", "=2; ", "2"], correct=1.0, steps=steps),
        sample(["3"], correct=0.0),
        sample(["3"], correct=0.5),
        sample(["3"], correct=None),
    )
    assert [text for _, text in read.all("span", "badge")] == ["\u2713 right", "\u2717 wrong", "outcome 0.5"]
    items = [text for _, text in read.all("li") if text.endswith(("=2;", " 2"))]
    assert items == ["\u22120.5 1+1=2;", "\u22122 2"]


def test_filters_offer_what_there_is():
    samples = [sample(["x"]) | {"tags": {"Run": ["a", "b"][: i + 1], "Turn": [str(i)], "End": ["e"]}} for i in range(2)]
    read = page(*samples)
    assert [(a["data-filter"], text) for a, text in read.all("select")] == [("0", "allab"), ("1", "all01")]
    cards = [a for a, _ in read.all("article")]
    assert [(a["data-f0"], a["data-f1"]) for a in cards] == [("0", "0"), ("0 1", "1")]


def test_no_samples_no_section():
    assert samples_section([], {}, "lead") == ""


def test_a_mistake_is_named():
    with pytest.raises(ValueError, match="2 tokens and 1 rewards"):
        page(sample(["a", "b"], [1.0]))
