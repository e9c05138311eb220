"""Metrics of ProcessBench and PRMBench, against figures of their own evaluation scripts and worked out by hand."""

import math
import random

import pytest

from repirl.apps.benchmarks import calibrate, calibrate_kept, prmbench_row, prmbench_scores, processbench_scores
from repirl.apps.localize import best_threshold, first_error, first_error_f1


def test_processbench_scores_are_the_scripts():
    """Predictions and labels of eight solutions, and what ProcessBench's script says of them."""
    labels = [1, 2, 0, 1, -1, -1, -1, -1]
    scores = processbench_scores([1, -1, 0, 2, -1, -1, 3, -1], labels)
    assert (scores.error_acc, scores.correct_acc, scores.f1) == (50.0, 75.0, 60.0)
    assert (scores.num_errors, scores.num_correct) == (4, 4)
    # None is wrong, also where there is no error.
    assert processbench_scores([None] * 8, labels).f1 == 0.0
    assert processbench_scores([1, None], [1, -1]).correct_acc == 0.0


def test_processbench_scores_of_one_kind_only():
    scores = processbench_scores([0, -1], [0, 1])
    assert (scores.error_acc, scores.correct_acc, scores.f1) == (50.0, None, None)
    assert processbench_scores([], []).error_acc is None


def test_calibration_tries_every_threshold():
    rng = random.Random(0)
    for _ in range(60):
        lengths = [rng.randint(1, 4) for _ in range(rng.randint(2, 12))]
        scores = [[float(rng.randint(-3, 3)) for _ in range(n)] for n in lengths]
        labels = [rng.randint(-1, n - 1) for n in lengths]
        labels[:2] = [-1, 0]
        threshold = calibrate(scores, labels)

        def f1(value, scores=scores, labels=labels):
            predicted = [first_error(steps, value) for steps in scores]
            return processbench_scores([-1 if p is None else p for p in predicted], labels).f1

        assert f1(threshold) == pytest.approx(max(f1(i / 2) for i in range(-9, 10)))
        # The same measure as that of the demo, whose thresholds are fewer.
        errors = [None if label == -1 else label for label in labels]
        assert f1(threshold) == pytest.approx(100 * first_error_f1(scores, errors, threshold))
        assert f1(threshold) >= 100 * first_error_f1(scores, errors, best_threshold(scores, errors)) - 1e-9
    with pytest.raises(ValueError, match="with and without an error, there are 0 and 1"):
        calibrate([[1.0]], [-1])


def test_prmbench_rows_are_the_scripts():
    """Two solutions, and what PRMBench's script says of them; wrong steps count from 1."""
    first, second = prmbench_row([True, True, False, True, True], [3, 4]), prmbench_row([True, False, True], [])
    assert (first.correct_step_acc, first.wrong_step_acc, first.total_step_acc) == (1.0, 0.5, 0.8)
    assert (first.first_error_acc, first.model_response_acc) == (1, 0.8)
    assert first.f1_matrix == {"TP": 3, "FP": 1, "TN": 1, "FN": 0}
    assert (second.correct_step_acc, second.wrong_step_acc, second.first_error_acc) == (2 / 3, None, None)
    assert (second.total_step_acc, second.model_response_acc) == (2 / 3, 2 / 3)
    assert second.f1_matrix == {"TP": 2, "FP": 0, "TN": 0, "FN": 1}
    assert prmbench_row([True, True], [2]).first_error_acc == 0

    # Precision and recall of the right steps: 5/6 and 5/6; of the wrong ones: 1/2 and 1/2.
    total = prmbench_scores([first, second])
    assert (total.f1, total.negative_f1) == (pytest.approx(5 / 6), 0.5)
    assert total.prm_score == pytest.approx((5 / 6 + 1 / 2) / 2)


def test_prmbench_without_any_hit_divides_by_nothing():
    total = prmbench_scores([prmbench_row([True], [1])])
    assert (total.f1, total.negative_f1, total.prm_score) == (0.0, 0.0, 0.0)
    assert not any(math.isnan(value) for value in (total.f1, total.negative_f1))
    for kept, steps in (([], []), ([True], [2]), ([True], [0])):
        with pytest.raises(ValueError, match=r"\(from 1\) of a solution with \d steps"):
            prmbench_row(kept, steps)


def test_calibration_for_prmbench_tries_every_threshold():
    rng = random.Random(0)
    for _ in range(60):
        scores = [[float(rng.randint(-3, 3)) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(2, 8))]
        wrong = [[i for i in range(len(steps)) if rng.random() < 0.4] for steps in scores]
        wrong[0], wrong[1] = [0], []

        def prm_score(value, scores=scores, wrong=wrong):
            rows = [
                prmbench_row([score > value for score in steps], [i + 1 for i in bad])
                for steps, bad in zip(scores, wrong, strict=True)
            ]
            return prmbench_scores(rows).prm_score

        threshold = calibrate_kept(scores, wrong)
        assert prm_score(threshold) == pytest.approx(max(prm_score(i / 2) for i in range(-9, 10)))
    with pytest.raises(ValueError, match="there are 0 and 1"):
        calibrate_kept([[1.0]], [[]])
