"""The mathematical verifier."""

import pytest

from repirl.verify.math import extract_answer, math_reward


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("48+24 = 72\n#### 72", "She sold 48/2 = 24 ...\n#### 72", 1.0),
        ("#### 72", "72", 1.0),
        ("#### 73", "72", 0.0),
        ("first #### 72, no:\n#### 5", "72", 0.0),
        ("#### $1,234.50", "1234.5", 1.0),
        ("#### 20%", "20", 1.0),
        ("#### 7.", "7", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 3", "-3", 0.0),
        ("#### 1e400", "72", 0.0),
        (r"so \boxed{72}", "72", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\frac{1}{2}}", r"\frac{2}{4}", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{x^2 + 2x}", "(x+1)^2", 0.0),
        (r"#### 5 but finally \boxed{6}", "6", 1.0),
        (r"\boxed{12}", "1,2", 0.0),
        (r"\boxed{1,23}", "12,3", 0.0),
        ("#### 1 2", "12", 0.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        ("#### 1,234,567", "1234567", 1.0),
        ("I do not know", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_verdicts(response, answer, expected):
    assert math_reward(response, answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 72 ", "72"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{never closed", None),
        ("####", None),
        ("no mark", None),
    ],
)
def test_extraction(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    "response",
    [
        "#### " + "9" * 5000,
        "#### " + "(" * 300,
        r"\boxed{" * 200,
        r"#### \frac{1}{0}",
        "#### 1/0",
        "#### \x00\ud800",
        "#### NaN",
        "#### inf",
        "#### 10**10**10",
        "#### 9^9^9^9",
        "####\n####\n",
        r"\boxed{\sqrt{-1}^{\infty}}",
    ],
)
def test_nothing_that_a_model_writes_raises_or_wins(response):
    assert math_reward(response, "72") == 0.0
