"""Ways to choose among N responses: against brute force over all subsets."""

import math
import random
from itertools import combinations, product
from statistics import fmean

import pytest

from repirl.apps.best_of import best_of_n, choose, mean_and_error, pass_at_n, shown_mean, softmax, subsets, vote, votes


def mean_over_subsets(count, size, value):
    return fmean(value(subset) for subset in combinations(range(count), size))


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_best_of_n_and_pass_at_n_are_means_over_all_subsets(count):
    rng = random.Random(count)
    for _ in range(20):
        # Few values, so that there are ties.
        scores = [rng.choice([-2.0, -0.5, 0.0, 3.0]) for _ in range(count)]
        right = [rng.random() < 0.4 for _ in range(count)]
        for size in range(1, count + 1):
            chosen = list(combinations(range(count), size))
            best = fmean(right[max((scores[i], -i) for i in subset)[1] * -1] for subset in chosen)
            assert best_of_n(scores, right, size) == pytest.approx(best, abs=1e-12)
            any_right = fmean(any(right[i] for i in subset) for subset in chosen)
            assert pass_at_n(sum(right), count, size) == pytest.approx(any_right, abs=1e-12)


def test_votes_are_means_over_all_subsets():
    answers, right = ["a", "b", "b", None, "a", "c"], [True, False, False, False, True, False]
    scores, temperature = [3.0, -1.0, 0.5, 9.0, -40.0, 2.9], 0.7

    def by_votes(subset):
        counts = [(sum(answers[j] == answers[i] for j in subset), -i) for i in subset if answers[i]]
        return right[-max(counts)[1]] if counts else right[subset[0]]

    def by_weights(subset):
        total = sum(math.exp(scores[i] / temperature) for i in subset)
        weights = {}
        for i in subset:
            if answers[i]:
                weights[answers[i]] = weights.get(answers[i], 0) + math.exp(scores[i] / temperature) / total
        return max(weights, key=weights.get) == "a" if weights else right[subset[0]]

    for size in range(1, 7):
        majority, weighted = votes(answers, scores, right, subsets(6, size, 20, ""), temperature)
        assert majority == pytest.approx(mean_over_subsets(6, size, by_votes))
        assert weighted == pytest.approx(mean_over_subsets(6, size, by_weights))


def test_ties_of_votes_go_to_the_first():
    assert vote(["a", "b", "b", "a"], [1.0] * 4) == 0
    assert vote([None, "b", "a", "a", "b"], [1.0] * 5) == 1
    assert vote(["a", "b", "b"], [0.6, 0.2, 0.2]) == 0
    assert vote(["a", "b", "b"], [0.3, 0.4, 0.3]) == 1
    assert vote([None, None], [1.0, 1.0]) == 0


def test_negative_scores_weigh_less_not_against():
    """With sums of raw scores two votes of -1 would lose to one of -1.5."""
    scores = [-1.5, -1.0, -1.0]
    assert vote(["a", "b", "b"], softmax(scores, 1.0)) == 1
    assert sum(softmax(scores, 1.0)) == pytest.approx(1)
    # Far beyond what exp can hold.
    assert softmax([5000.0, 4000.0], 1.0) == [1.0, 0.0]
    assert softmax([7.0, 1.0], 1e9) == pytest.approx([0.5, 0.5])


def test_subsets_are_all_or_drawn():
    assert subsets(4, 2, 6, "") == list(combinations(range(4), 2))
    drawn = subsets(4, 2, 5, "seed")
    assert drawn == subsets(4, 2, 5, "seed") != subsets(4, 2, 5, "other")
    assert len(drawn) == 5
    many = subsets(10, 3, 100, "")
    assert all(a < b < c for a, b, c in many)
    # Each number is in 3 of 10 places: 30 times of 100, with a standard deviation below 5.
    assert all(10 < sum(i in subset for subset in many) < 50 for i in range(10))


def test_drawn_votes_are_near_the_exact_ones():
    answers = ["a", "b", "a", "c", "b", "a", "d", "b"] * 2
    right, scores = [answer == "a" for answer in answers], [math.sin(i) for i in range(16)]
    exact = votes(answers, scores, right, subsets(16, 4, 1820, ""), 1.0)
    drawn = votes(answers, scores, right, subsets(16, 4, 1000, "0"), 1.0)
    assert drawn == pytest.approx(exact, abs=0.08)


def test_standard_errors():
    assert mean_and_error([0.5]) == (0.5, None)
    assert mean_and_error([1.0, 0.0, 0.0, 1.0]) == (0.5, pytest.approx(math.sqrt(1 / 3 / 4)))
    # The error of a mean of three, by the spread of all means of three of a population: drawn with replacement.
    values = [0.0, 1.0, 4.0]
    means = [fmean(drawn) for drawn in product(values, repeat=3)]
    variances = [mean_and_error(drawn)[1] ** 2 for drawn in product(values, repeat=3)]
    assert fmean(variances) == pytest.approx(fmean((m - fmean(means)) ** 2 for m in means))


def test_choices_of_all_responses():
    scores, answers = [2.0, 1.0, 1.0, 2.0, -9.0], ["a", "b", "b", None, "b"]
    # exp(2) is more than twice exp(1); of two best scores the first counts, whether it has an answer or not.
    assert choose(scores, answers, 1.0) == {"best_of_n": 0, "majority": 1, "weighted": 0}
    assert choose(scores[::-1], answers[::-1], 1.0) == {"best_of_n": 1, "majority": 0, "weighted": 4}
    # At a high temperature all weights are nearly equal.
    assert choose(scores, answers, 1e6)["weighted"] == 1


def test_means_are_shown_with_their_errors():
    assert shown_mean(0.5, 0.25) == "0.5000 ± 0.2500"
    assert shown_mean(1.0, None) == "1.0000"
