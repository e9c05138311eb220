"""The figures of the ops' results: drawn for each question, in both settings, and nothing lies outside of them."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path

import pytest

from bench.plots import figures, needed_products, sweeps

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "cpu"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def result():
    return json.loads((RESULTS / "ops.json").read_text())


def with_sizes(result: dict, sizes: list[tuple[int, int]]) -> dict:
    """The case of policy+entropy in bf16 again for each (N, V), its figures in proportion."""
    template = result["cases"][2]
    cases = []
    for num_rows, num_columns in sizes:
        measured = deepcopy(template)
        measured["name"] = f"{num_rows} {num_columns}"
        measured["case"] |= {"num_rows": num_rows, "shape": f"576x{num_columns}"}
        for row in measured["rows"]:
            if "extra_bytes" in row:
                row["extra_bytes"] = row["extra_bytes"] * num_rows // 1024
        cases.append(measured)
    return result | {"cases": cases}


def texts(drawing: str) -> list[str]:
    return [element.text for element in ET.fromstring(drawing).iter(f"{SVG}text")]


def test_there_is_one_figure_for_each_question(result):
    drawn = figures(result)
    assert list(drawn) == ["time", "memory", "error"]
    assert figures(result) == drawn
    for name, drawing in drawn.items():
        root = ET.fromstring(drawing)
        assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text
        panels = [text for text in texts(drawing) if re.match(r"(score|sft|policy|policy\+entropy|logits), ", text)]
        assert len(panels) == len(result["cases"]), name
        measured = [row for case in result["cases"] for row in case["rows"] if "reason" not in row]
        bars = [rect.get("class") for rect in root.iter(f"{SVG}rect") if rect.get("class").startswith("bar")]
        assert len(bars) == len(measured) + 2  # the key's two
        assert bars.count("bar ours") == sum(row["ours"] for row in measured) + 1


def test_bars_have_their_numbers_and_the_floor(result):
    time = texts(figures(result)["time"])
    for measured in result["cases"]:
        for row in measured["rows"]:
            if "median" in row:
                products = row["products"]
                assert f"{products:.2f}" in time or f"{products:.1f}" in time or f"{products:.0f}" in time
    assert {"floor: 1 product", "floor: 3 products", "floor: 2 products", "floor: 1.2 products"} <= set(time)
    assert "floor: memory bandwidth, 1 copy" in time
    assert "[N, V] once: 96 MiB" in texts(figures(result)["memory"])
    assert {"rounding to bfloat16", "rounding to float32"} <= set(texts(figures(result)["error"]))


@pytest.mark.parametrize("name", ["time", "memory", "error"])
def test_everything_lies_inside_and_no_texts_overlap(result, name):
    root = ET.fromstring(figures(result)[name])
    width = float(root.get("width"))
    places = []
    for group in root.iter(f"{SVG}g"):
        left, top = map(float, re.findall(r"[\d.]+", group.get("transform")))
        for element in group.iter(f"{SVG}text"):
            x, y, kind = left + float(element.get("x")), top + float(element.get("y")), element.get("class") or ""
            size = 6.6 * len(element.text)
            start = x - size if "end" in kind else x - size / 2 if "mid" in kind else x
            places.append((y, start, start + size, element.text))
            assert start >= 0, element.text
            assert start + size <= width, element.text
        for bar in group.iter(f"{SVG}rect"):
            assert left + float(bar.get("x")) + float(bar.get("width")) < width
    for (y, start, end, text), (y2, start2, end2, text2) in itertools.combinations(places, 2):
        assert abs(y - y2) > 10 or end <= start2 or end2 <= start, (text, text2)


def test_cases_that_differ_in_one_size_become_curves(result):
    swept = with_sizes(result, [(64, 1000), (128, 1000), (256, 1000), (64, 2000), (64, 4000)])
    assert [len(group) for group in sweeps(swept["cases"], "N")] == [3]
    assert [len(group) for group in sweeps(swept["cases"], "V")] == [3]
    drawn = figures(swept)
    assert sorted(drawn) == sorted(f"{name}_over_{axis}" for name in ("time", "memory", "error") for axis in "NV")
    lines = ET.fromstring(drawn["memory_over_N"]).findall(f".//{SVG}polyline")
    contenders = [row for row in swept["cases"][0]["rows"] if "reason" not in row]
    assert len(lines) == len(contenders) + 1  # and the size of the logits
    assert {"64", "128", "256"} <= set(texts(drawn["memory_over_N"]))
    labels = [text for text in texts(drawn["memory_over_N"]) if text.startswith("ours: ")]
    assert len(labels) == sum(row["ours"] for row in contenders)


def test_two_sizes_are_no_curve(result):
    assert list(figures(with_sizes(result, [(64, 1000), (128, 1000)]))) == ["time", "memory", "error"]


def test_without_times_there_is_no_figure_of_them():
    memory = json.loads((RESULTS / "ops_memory.json").read_text())
    assert list(figures(memory)) == ["memory", "error"]


def test_axes_are_logarithmic_where_values_span_a_decade(result):
    log = figures(result | {"cases": [result["cases"][1]]})
    assert "products, log scale" in texts(log["time"])  # 3 to 64
    assert "products" in texts(figures(result | {"cases": [result["cases"][0]]})["time"])  # 1 to 5


def test_needed_products_count_gradients_and_rows():
    case = {"task": "policy+entropy", "frozen": False, "masked": 0.0}
    assert needed_products(case) == 3
    assert needed_products(case | {"frozen": True}) == 2
    assert needed_products(case | {"task": "score"}) == 1
    assert needed_products(case | {"masked": 0.75}) == 0.75
    assert needed_products(case | {"task": "logits"}) == 1
