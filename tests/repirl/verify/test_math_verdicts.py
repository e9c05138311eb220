"""The verdicts of the mathematical verifier, on pairs of a response and a right answer that a person has judged."""

import json
from pathlib import Path

import pytest

from repirl.verify.math import math_reward

# The first are of public reports on verifiers; the others are variants of each kind of fault in them.
PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_verdicts.jsonl").read_text().splitlines()]
SIZE = 100


@pytest.mark.parametrize("begin", range(0, len(PAIRS), SIZE))
def test_verdicts_are_those_of_a_person(begin):
    pairs = PAIRS[begin : begin + SIZE]
    assert [pair for pair in pairs if math_reward(pair["response"], pair["gold"]) != pair["want"]] == []


ANSWERS = ["72", r"\frac{1}{2}", "x + 1", r"\sqrt{3}", "-4", r"2\pi", r"\text{Tom}"]
OTHERS = ["73", r"\frac{1}{3}", "x + 2", r"\sqrt{5}", "4", r"3\pi", r"\text{Bob}"]
SEPARATORS = [
    r"\\",
    r"=",
    r"\cup",
    r"\lor",
    r"\to",
    r"&",
    r"\approx",
    r"}{",
    r";",
    r",",
    r"\neq",
    r"|",
    r"\quad",
    r"\text{or}",
    r"\text{and}",
    r"\land",
    r"\implies",
    r"\sim",
    r">",
    r"<",
    r"\le",
]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_two_answers_in_one_box_are_none(separator):
    for gold, other in zip(ANSWERS, OTHERS, strict=True):
        for pair in ((gold, other), (other, gold)):
            response = (
                rf"\boxed{{{f' {separator} '.join(pair)}}}" if separator != "}{" else rf"\boxed{{{'}{'.join(pair)}}}"
            )
            assert math_reward(response, gold) == 0.0, response


@pytest.mark.parametrize("dressed", ["#### {}", "#### **{}**", r"\fbox{{{}}}", r"\boxed {{{}}}", "<answer>{}</answer>"])
def test_an_answer_is_found_in_any_dress(dressed):
    for gold, other in zip(ANSWERS, OTHERS, strict=True):
        assert math_reward(dressed.format(gold), gold) == 1.0, gold
        assert math_reward(dressed.format(other), gold) == 0.0, gold
