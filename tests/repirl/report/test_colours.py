"""The colours of a page can be read, in both settings."""

import re

import pytest

from repirl.report.colours import LEVELS, SERIES_DARK, SERIES_LIGHT, contrast, reward_colours
from repirl.report.html import render

EMPTY = {
    "title": "",
    "subtitle": "",
    "configuration": "",
    "environment": {},
    "table": {"columns": [], "rows": []},
    "notes": [],
    "curves": [],
    "samples": [],
}


def variables(dark):
    """The colours that page.css names."""
    first, second = re.findall(r":root\{([^}]*--page[^}]*)\}", render(EMPTY))[:2]
    return dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{6})", second if dark else first))


@pytest.mark.parametrize("dark", [False, True])
def test_text_contrast_of_every_shade_is_accessible(dark):
    shades = reward_colours(dark)
    assert [level for level, _, _ in shades] == list(range(-LEVELS, LEVELS + 1))
    assert min(contrast(background, ink) for _, background, ink in shades) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_text_of_the_page_and_lines_can_be_seen(dark):
    colours = variables(dark)
    for ink in ("ink", "soft"):
        for ground in ("page", "card", "wash"):
            assert contrast(colours[ink], colours[ground]) >= 4.5
    for mark in ("good", "bad"):
        assert contrast(colours[mark], colours["card"]) >= 4.5
        assert contrast(colours[mark], colours[f"{mark}-back"]) >= 4.5
    lines = SERIES_DARK if dark else SERIES_LIGHT
    assert min(contrast(line, colours["card"]) for line in lines) >= 3
    # Links and names of options.
    assert min(contrast(lines[0], colours[ground]) for ground in ("page", "card", "wash")) >= 4.5


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
