"""Figures of answers against ones worked out by hand."""

from itertools import combinations

import numpy as np
import pytest

from repirl.apps.eval_metrics import Answered, Responses, figures, num_tied, shares, sizes


def responses(greedy, sampled):
    """Texts stand for answers: a right one begins with +, one that does not vote is ?."""

    def answered(text):
        return Answered(text.startswith("+"), None if text == "?" else text, True, "equal")

    return Responses([answered(text) for text in greedy.split()], [answered(text) for text in sampled.split()])


PROBLEMS = [responses("+a", "+a b +a c"), responses("b", "b b +a ?"), responses("+a", "? ? c c")]


def test_figures_are_means_over_problems():
    result = figures(PROBLEMS, votes=True, seed=0, resamples=100)
    assert list(result) == ["greedy pass@1", "avg@4", "pass@2", "pass@4", "maj@2", "maj@4"]
    value = {name: figure["value"] for name, figure in result.items()}
    assert value["greedy pass@1"] == pytest.approx(2 / 3)
    assert value["avg@4"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    # Two of four are right: 1 - C(2, 2) / C(4, 2) = 5/6; one of four: 1 - C(3, 2) / C(4, 2) = 1/2.
    assert value["pass@2"] == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    assert value["pass@4"] == pytest.approx(2 / 3)
    # Pairs of the first problem: +a b, +a +a, +a c, b +a, b c, +a c, where the first one wins a tie.
    assert value["maj@2"] == pytest.approx((4 / 6 + 1 / 6 + 0) / 3)
    assert value["maj@4"] == pytest.approx(1 / 3)
    assert not {"maj@2", "maj@4"} & figures(PROBLEMS, votes=False, seed=0, resamples=9).keys()


def test_pass_at_k_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    for count in (3, 6):
        right = [bool(x) for x in rng.integers(2, size=count)]
        problem = Responses([], [Answered(r, None, None, "") for r in right])
        result = figures([problem], votes=False, seed=0, resamples=9)
        assert "greedy pass@1" not in result
        for k in sizes(count)[1:]:
            chosen = list(combinations(right, k))
            assert result[f"pass@{k}"]["value"] == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert sizes(6) == [1, 2, 4, 6]
    assert (sizes(4), sizes(1), sizes(0)) == ([1, 2, 4], [1], [])


def test_intervals_are_those_of_the_bootstrap_and_repeat():
    problems = [responses("+a" if i % 4 == 0 else "b", "") for i in range(400)]
    result = figures(problems, votes=True, seed=3, resamples=2000)
    assert result == figures(problems, votes=True, seed=3, resamples=2000)
    assert result != figures(problems, votes=True, seed=4, resamples=2000)
    # The standard error of a share of 1/4 of 400 is 0.02165; a normal interval has 1.96 of them on each side.
    assert result["greedy pass@1"]["value"] == 0.25
    assert result["greedy pass@1"]["low"] == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.005)
    assert result["greedy pass@1"]["high"] == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.005)
    assert figures(PROBLEMS[:1], votes=True, seed=0, resamples=9)["greedy pass@1"] == {
        "value": 1.0,
        "low": None,
        "high": None,
    }


def test_ties_and_what_was_cut_off_are_counted():
    assert num_tied(PROBLEMS) == 0
    assert num_tied([responses("", "a a b b ?"), responses("", "? ?"), responses("", "a b b")]) == 1
    kinds = [("equal", True), ("differs", False), ("no final answer found", False), ("too long", None)]
    result = shares([Answered(False, None, end, kind) for kind, end in kinds], ("no final answer found", "too long"))
    assert (result["responses"], result["truncated"], result["unreadable"]) == (4, 2 / 3, 2)
    assert result["reasons"]["differs"] == 1
    assert shares([], ())["truncated"] is None
