"""The page of a run: well-formed, self-contained, faithful to its input, and readable."""

import copy
import math
import re

import pytest
from pages import Page

from repirl.report.html import render, write_report

NASTY = "<script>alert(\"x\")</script> & 'quoted'"


def report(**changes):
    tokens = ["8", "+", "7", "=", "1", "6", "; ", "\n", "\tx", "<eos>"]
    rewards = [-0.1, 0.0, -0.2, 0.1, -0.3, -6.0, 0.2, 0.0, 0.1, 0.3]
    made = {
        "title": "A run",
        "subtitle": "three ways",
        "configuration": "# a comment\nsteps: 40\npolicy:\n  model: runs/start\n",
        "environment": {"python": "3.11", "threads": "2"},
        "table": {"columns": ["", "accuracy", "AUROC"], "rows": [["start", "26.5%", 0.5], ["rePIRL", "81.0%", 0.9512]]},
        "notes": ["a note"],
        "curves": [
            {
                "title": "Held-out accuracy",
                "xlabel": "step",
                "ylabel": "share",
                "percent": True,
                "series": [
                    {"name": "RLOO", "x": [0, 5, 10], "y": [0.25, 0.5, 0.6]},
                    {"name": "rePIRL", "x": [0, 5, 10], "y": [0.25, 0.7, 0.8125]},
                ],
            },
            {
                "title": "Reward gap",
                "xlabel": "step",
                "ylabel": "nats",
                "percent": False,
                "series": [{"name": "rePIRL", "x": [1, 2, 3, 4], "y": [0.1, float("nan"), -0.2, 0.3]}],
            },
        ],
        "samples": [
            {
                "title": "8+7=",
                "prompt": "8+7=",
                "note": "planted error in step 1",
                "correct": False,
                "variants": [
                    {"name": n, "tokens": tokens, "rewards": rewards, "error_span": [4, 6], "response_start": 0}
                    for n in ("rePIRL", "PRM only")
                ],
            }
        ],
    }
    return made | changes


def test_page_is_well_formed_and_has_every_part():
    page = Page(render(report()))
    assert page.all("title")[0][1] == page.all("h1")[0][1] == "A run"
    assert [text for _, text in page.all("h2")] == ["Results", "Learning curves", "Token rewards", "How it was made"]
    assert page.all("pre")[0][1] == report()["configuration"].rstrip("\n")
    assert {a["name"] for a, _ in page.all("meta") if "name" in a} == {"viewport", "color-scheme"}
    cells = [text for _, text in page.all("td")]
    assert cells == ["26.5%", "0.5", "81.0%", "0.9512"]


def test_every_text_is_escaped():
    made = report(title=NASTY, subtitle=NASTY, configuration=f"key: {NASTY}\n{NASTY}: 1", environment={NASTY: NASTY})
    made["table"] = {"columns": [NASTY], "rows": [[NASTY]]}
    made["notes"] = [NASTY]
    for curve in made["curves"]:
        curve |= {"title": NASTY, "xlabel": NASTY, "ylabel": NASTY}
        curve["series"][0]["name"] = NASTY
    sample = made["samples"][0]
    sample |= {"title": NASTY, "prompt": NASTY + "?", "note": NASTY}
    sample["variants"][0] |= {"name": NASTY, "tokens": [NASTY], "rewards": [1.0]}
    text = render(made)
    page = Page(text)
    assert text.count("<script>") == 1
    assert "alert(" not in page.all("script")[0][1]
    assert page.all("h1")[0][1] == page.all("p", "subtitle")[0][1] == NASTY
    assert page.tokens()[0][1] == NASTY
    assert page.all("dd")[0][1] == NASTY
    assert page.all("pre")[0][1] == f"key: {NASTY}\n{NASTY}: 1"


def test_page_fetches_nothing():
    text = render(report())
    assert not re.search(r"https?:|//[a-z]|\burl\(|@import|\bsrc=|\bhref=\"[^#]|fetch\(|XMLHttpRequest", text)
    policy = [a["content"] for a, _ in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'")
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _, _ in Page(text).elements}


def test_every_token_stands_there_as_it_is_with_its_value():
    variant = report()["samples"][0]["variants"][0]
    page = Page(render(report()))
    assert [text for _, text in page.tokens()] == variant["tokens"] * 2
    values = page.all("div", "tokens")[0][0]["data-r"].replace("\u2212", "-").split()
    assert [float(v) for v in values] == variant["rewards"]


def test_colours_follow_the_rewards():
    shown = Page(render(report())).tokens()
    levels = [a["class"].split()[1] for a, _ in shown[:10]]
    by_reward = dict(zip(report()["samples"][0]["variants"][0]["rewards"], levels, strict=True))
    assert by_reward[-6.0] == "qm5"
    number = {r: int(c[2:]) * (-1 if c[1] == "m" else 1) if len(c) > 2 else 0 for r, c in by_reward.items()}
    ordered = [number[r] for r in sorted(number)]
    assert ordered == sorted(ordered)


def test_only_the_planted_error_is_underlined():
    page = Page(render(report()))
    underlined = [text for _, text in page.all("u", "err")]
    # The first one is the legend's.
    assert underlined == ["Underlined", "16", "16"]
    assert len(page.all("span", "in-error")) == 2
    clean = report()
    for variant in clean["samples"][0]["variants"]:
        variant["error_span"] = None
    assert Page(render(clean)).all("u", "err") == []


def test_prompt_tokens_are_not_coloured():
    made = report()
    made["samples"][0]["variants"][0]["response_start"] = 4
    page = Page(render(made))
    assert [a["class"] for a, _ in page.tokens()[:4]] == ["t p"] * 4
    assert len(page.all("div", "tokens")[0][0]["data-r"].split()) == 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_do_not_break_the_page(bad):
    made = report()
    made["samples"][0]["variants"][0]["rewards"] = [bad] * 10
    made["table"]["rows"][0][2] = bad
    for curve in made["curves"]:
        curve["series"][0]["y"] = [bad] * len(curve["series"][0]["y"])
    text = render(made)
    page = Page(text)
    assert [a["class"] for a, _ in page.tokens()[:10]] == ["t qn"] * 10
    drawn = " ".join(str(a.get(k, "")) for _, a, _ in page.elements for k in ("points", "cx", "cy", "y1", "x"))
    assert not re.search("nan|inf", drawn)
    assert "No values were recorded." in text


def test_a_gap_breaks_the_line():
    page = Page(render(report()))
    lines = [a["points"].split() for a, _ in page.all("polyline", "line")]
    assert [len(points) for points in lines] == [3, 3, 1, 2]
    assert len(page.all("circle", "spot")) == 9
    values = [(a["data-x"], a["data-y"]) for a, _ in page.all("g", "series")]
    assert values[1] == ("0 5 10", "25.0% 70.0% 81.2%")
    assert values[2] == ("1 3 4", "0.1 \u22120.2 0.3")


def test_points_stand_at_their_places():
    page = Page(render(report()))
    first = [tuple(map(float, p.split(","))) for p in page.all("polyline", "line")[0][0]["points"].split()]
    across = [x for x, _ in first]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1])
    # 0.25 -> 0.5 -> 0.6: the first rise is 2.5 times the second; up is a smaller y.
    assert (first[0][1] - first[1][1]) / (first[1][1] - first[2][1]) == pytest.approx(2.5, rel=0.02)


def test_a_name_has_one_colour_on_the_whole_page():
    page = Page(render(report()))
    assert [a["class"] for a, _ in page.all("g", "series")] == ["series s0 d0", "series s1 d1", "series s1 d1"]
    assert [a["class"] for a, _ in page.all("li") if "class" in a] == ["s0 d0", "s1 d1"]
    # The response of rePIRL is marked with its line, too; PRM only has none.
    keys = [a["class"] for a, _ in page.all("g") if "series" not in a["class"]]
    assert keys == ["s0 d0", "s1 d1", "s1 d1", "s1 d1"]


@pytest.mark.parametrize(
    ("x", "y"),
    [([0], [0.5]), ([0, 1], [0.5, 0.5]), ([0, 1], [0.0, 0.0]), ([1, 2], [1e-9, 2e9]), ([], []), ([3, 3], [1, 2])],
)
def test_charts_of_few_or_extreme_points(x, y):
    made = report()
    made["curves"] = [made["curves"][1] | {"series": [{"name": "a", "x": x, "y": y}]}]
    page = Page(render(made))
    for a, _ in page.all("circle", "spot"):
        assert math.isfinite(float(a["cx"]))
        assert 0 <= float(a.get("cy")) <= 290


def test_tiles_show_where_each_run_ended():
    page = Page(render(report()))
    assert [text for _, text in page.all("span", "tile-value")] == ["60.0%", "81.2%"]
    changes = [text for _, text in page.all("span", "tile-change")]
    assert changes == ["+35.0 points from 25.0%", "+56.2 points from 25.0%"]


def test_same_report_gives_the_same_bytes_and_is_not_changed(tmp_path):
    made = report()
    kept = copy.deepcopy(made)
    write_report(tmp_path / "a.html", made)
    write_report(tmp_path / "b.html", made)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes() == render(kept).encode()
    assert str(made) == str(kept)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_odd_characters_can_be_written(tmp_path):
    made = report()
    made["samples"][0]["variants"][0] |= {
        "tokens": ["\ud800", "\x00", "", "ü→", "\r"],
        "rewards": [0.0] * 5,
        "error_span": None,
    }
    write_report(tmp_path / "page.html", made)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [text for _, text in page.tokens()[:5]] == ["?", "\u2400", "", "ü→", "\u240d"]


def test_a_narrow_screen_can_name_each_cell():
    page = Page(render(report()))
    cells = [(a["data-label"], text) for a, text in page.all("td")]
    assert cells == [("accuracy", "26.5%"), ("AUROC", "0.5"), ("accuracy", "81.0%"), ("AUROC", "0.9512")]
    assert {a["role"] for tag in ("tr", "td", "th") for a, _ in page.all(tag)} == {
        "row", "cell", "columnheader", "rowheader",
    }  # fmt: skip


def test_charts_tables_and_tokens_are_within_reach_of_the_keyboard():
    page = Page(render(report()))
    for tag, kind in (("div", "scroll"), ("div", "tokens"), ("pre", None)):
        assert all(a["tabindex"] == "0" and a["aria-label"] for a, _ in page.all(tag, kind))
    assert [a["role"] for a, _ in page.all("svg", "chart")] == ["img", "img"]
    assert "last: RLOO 60.0%, rePIRL 81.2%" in page.all("svg", "chart")[0][0]["aria-label"]
    targets = {a["href"][1:] for a, _ in page.all("a")}
    assert targets == {a["id"] for _, a, _ in page.elements if "id" in a}


def test_further_tables_and_configurations():
    table = {"columns": ["option", "a"], "rows": [["lr", "0.1"]]}
    page = Page(render(report(configuration="", tables={"Differ": table}, configurations={"a": "x: 1", "b": "x: 2"})))
    assert "Differ" in [text for _, text in page.all("h3")]
    assert [text for _, text in page.all("summary")] == ["Configuration of a", "Configuration of b"]
    assert [text for _, text in page.all("pre")] == ["x: 1", "x: 2"]


def test_empty_parts_are_left_out():
    page = Page(render(report(curves=[], samples=[], notes=[], environment={}, configuration="")))
    assert [text for _, text in page.all("h2")] == ["Results", "How it was made"]


def test_mistakes_are_named():
    made = report()
    del made["notes"]
    with pytest.raises(ValueError, match="lacks notes"):
        render(made)
    made = report()
    made["samples"][0]["variants"][0]["rewards"] = [0.0]
    with pytest.raises(ValueError, match="10 tokens and 1 rewards"):
        render(made)
    made = report()
    made["curves"][0]["series"][0]["x"] = [1]
    with pytest.raises(ValueError, match="'RLOO' has 1 x and 3 y"):
        render(made)
    made = report()
    made["table"]["rows"][0] = ["start"]
    with pytest.raises(ValueError, match="has 1 cells, expected 3"):
        render(made)
