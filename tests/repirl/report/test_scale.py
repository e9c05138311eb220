"""The scale of reward colours fits the rewards that are shown."""

import random
from collections import Counter

import pytest

from repirl.report.colours import LEVELS
from repirl.report.scale import SHARES, reward_scale


def heavy_tailed(num=591, sign=-1):
    rng = random.Random(0)
    return [sign * rng.lognormvariate(-6, 3) for _ in range(num)]


def test_rewards_on_one_side_of_zero_use_all_shades():
    values = heavy_tailed()
    scale = reward_scale(values)
    counts = Counter(scale.level(v) for v in values)
    assert set(counts) == set(range(-LEVELS, 1))
    assert counts[0] / len(values) == pytest.approx(SHARES[0], abs=0.01)
    assert counts[-LEVELS] / len(values) == pytest.approx(1 - SHARES[-1], abs=0.01)
    assert scale.level(min(values)) == -LEVELS
    assert scale.level(max(values)) == 0
    assert "highest 40% are plain, the lowest 5% strongest" in scale.explained


def test_low_rewards_stand_out_among_positive_ones_too():
    values = heavy_tailed(sign=1)
    scale = reward_scale(values)
    assert scale.level(min(values)) == -LEVELS
    assert scale.level(max(values)) == 0


def test_both_signs_are_plain_around_zero():
    values = heavy_tailed(300) + heavy_tailed(200, sign=1)
    scale = reward_scale(values)
    assert {scale.level(v) for v in values} == set(range(-LEVELS, LEVELS + 1))
    assert scale.level(0.0) == 0
    assert scale.level(min(values)) == -LEVELS
    assert scale.level(max(values)) == LEVELS
    assert all(scale.level(v) * v >= 0 for v in values)


def test_a_few_of_the_other_sign_are_no_side():
    scale = reward_scale(heavy_tailed(1000) + [0.5] * 20)
    assert scale.high == ()
    assert scale.level(0.5) == 0


def test_levels_are_ordered_and_agree_with_the_legend():
    for values in (heavy_tailed(), heavy_tailed(50) + heavy_tailed(50, 1), [0.0] * 60 + [-1.0, -2.0, -3.0] * 15):
        scale = reward_scale(values)
        levels = [scale.level(v) for v in sorted(values)]
        assert levels == sorted(levels)
        shown = [level for level, _ in scale.cells()]
        assert shown == sorted(shown)
        assert set(levels) <= set(shown)


def test_equal_and_no_rewards_are_plain():
    for values in ([], [2.0, 2.0, float("nan")], [float("inf")]):
        scale = reward_scale(values)
        assert (scale.low, scale.high) == ((), ())
        assert scale.level(2.0) == 0


def test_extreme_values_do_not_move_the_cuts():
    values = heavy_tailed()
    assert reward_scale([*values, -1e30]).low == pytest.approx(reward_scale(values).low, rel=0.1)
