"""Error localisation: step scores, AUROC and first-error F1 against figures worked out by hand."""

import pytest
import torch

from repirl.apps.localize import auroc, best_threshold, first_error, first_error_f1, judge, step_scores


def test_step_scores_aggregate_each_step():
    reward = torch.tensor([1.0, -2.0, 3.0, 4.0, 9.0])
    assert step_scores(reward, [2, 2]) == [-2.0, 3.0]
    assert step_scores(reward, [2, 2], "mean") == [-0.5, 3.5]
    assert step_scores(reward, [2, 2], "sum") == [-1.0, 7.0]
    assert step_scores(reward, [2, 2], "last") == [-2.0, 4.0]
    with pytest.raises(ValueError, match=r"\[4, 2\] tokens do not fit into 5"):
        step_scores(reward, [4, 2])
    with pytest.raises(ValueError, match="aggregate is 'median'"):
        step_scores(reward, [1], "median")


def test_auroc_counts_pairs():
    assert auroc([0.0], [1.0, 2.0]) == 1.0
    assert auroc([3.0], [1.0, 2.0]) == 0.0
    assert auroc([1.0, 0.0], [1.0, 2.0]) == 0.875
    with pytest.raises(ValueError, match="0 wrong and 1 right"):
        auroc([], [1.0])


def test_first_error_f1_is_the_harmonic_mean_of_both_accuracies():
    scores = [[1.0, -1.0, 2.0], [1.0, 1.0], [-1.0, 1.0], [2.0, 2.0]]
    errors = [1, 1, None, None]
    # One of two errors is found at its step, one of two clean solutions is left alone.
    assert first_error_f1(scores, errors, 0.0) == 0.5
    assert first_error_f1(scores, errors, -9.0) == 0.0
    assert first_error(scores[0], 0.0) == 1
    assert first_error(scores[1], 0.0) is None


def test_best_threshold_separates_what_can_be_separated():
    scores, errors = [[1.0, -1.0], [0.5, 1.0], [0.9, 0.8], [-0.5, 3.0]], [1, None, None, 0]
    assert -0.5 < best_threshold(scores, errors) < 0.5


def test_judge_leaves_steps_after_the_error_out():
    # The step after each error scores lowest of all; it must not count as a right step.
    scores = [[5.0, 0.0, -9.0]] * 4 + [[5.0, 5.0, 5.0]] * 4
    errors = [1] * 4 + [None] * 4
    assert judge(scores, errors) == {"auroc": 1.0, "first_error_f1": 1.0}
