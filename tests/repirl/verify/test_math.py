"""The mathematical verifier."""

import time

import pytest

from repirl.verify.math import MAX_PARSED, extract_answer, is_overlong, math_reward, plain_reward


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


PROSE = "It costs a lot to go on like this. " * 40


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # Marked, wherever it stands.
        (r"\boxed{1 + x} " + PROSE, 1.0),
        (f"#### 1 + x\n{PROSE}", 1.0),
        # Not marked: what stands at the end.
        (f"{PROSE}so it is $1 + x$.", 1.0),
        (f"it is $1 + x$. {PROSE}", 0.0),
        # The cut goes through a formula, and through one of the line before.
        (f"from ${'y' * 2 * MAX_PARSED}$ we get $1 + x$", 1.0),
        (f"it costs $5 {PROSE}\n{PROSE[:200]}so it is $1 + x$", 1.0),
        (f"${'y' * 2 * MAX_PARSED}$", 0.0),
    ],
)
def test_of_a_long_response_the_answer_is_parsed_alone(response, expected):
    assert len(response) > MAX_PARSED
    assert not is_overlong(response, "x + 1")
    assert math_reward(response, "x + 1") == expected


@pytest.mark.parametrize("mark", ["#### {}", r"\boxed{{{}}}"])
def test_an_answer_that_is_too_long_is_wrong(mark):
    answer = "x" * (MAX_PARSED + 1)
    assert is_overlong(mark.format(answer), "1/2")
    assert is_overlong("1/2", mark.format(answer))
    assert is_overlong("1/2", answer)
    assert not is_overlong(mark.format(answer[1:]), answer[1:])
    # But what needs no parser is told.
    assert math_reward(mark.format(answer), answer) == 1.0
    assert math_reward(mark.format("7" * 1000), "7" * 1000 + ".0") == 1.0
    assert math_reward(mark.format("x+" * MAX_PARSED + "1"), "1+" + "x+" * MAX_PARSED) == 0.0


UNITS = [
    " ",
    "9",
    "9 ",
    ",",
    "{",
    "}",
    "#",
    "#### ",
    "#### -",
    "\n",
    "\\",
    r"\boxed ",
    r"\boxed{",
    r"\boxed{1}",
    "answer: ",
    "**",
]


def seconds(text):
    begin = time.process_time()
    for pair in ((text, "72"), (text + "x", "72"), ("#### 72", text)):
        plain_reward(*pair)
        is_overlong(*pair)
    return time.process_time() - begin


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("start", ["", "#### -", r"\boxed{", "<answer>", "Answer: "])
def test_the_time_of_plain_comparison_grows_with_the_length(unit, start):
    size = 16_000 // len(unit)
    short, long = (min(seconds(start + unit * times * size) for _ in range(2)) for times in (1, 10))
    # A quadratic one would take a hundred times as long. What is this quick at any length need not be compared.
    assert long < 40 * short or long < 0.1


def test_plain_comparison_takes_a_million_characters():
    for unit in UNITS:
        assert plain_reward("#### -" + unit * (1_000_000 // len(unit)) + "x", "72") in (None, 0.0)
