"""When test-time training ends, turn by turn, and that a rule that goes on is the uninterrupted one."""

import pytest

from repirl.apps.stop_rule import KL, REWARD, StopOptions, StopRule
from repirl.config import ConfigError


def turns_of(rule, rewards, kls=None):
    """The turns that the rule lets pass, the last one included."""
    kls = kls or [0.0] * len(rewards)
    for turn, (reward, kl) in enumerate(zip(rewards, kls, strict=True), 1):
        if rule.after_turn(turn, {REWARD: reward, KL: kl}):
            return turn
    return None


@pytest.mark.parametrize(
    ("options", "rewards", "kls", "turn", "reason"),
    [
        # Means of two turns: 1, 3, 2, 3: the second is not beaten in two evaluations, ties do not count.
        ({"every": 2, "patience": 2}, [0, 2, 3, 3, 1, 3, 9, -3, 9], None, 8, "no gain"),
        ({"every": 2, "patience": 2}, [0, 2, 3, 3, 1, 3, 4, 4, 9], None, None, ""),
        ({"every": 2, "patience": None}, [3, 3] + [0] * 7, None, None, ""),
        ({"every": 1, "patience": 3}, [5, 1, 2, 3, 9], None, 4, "no gain"),
        ({"max_kl": 0.1}, [1] * 4, [0.0, 0.1, 0.11, 0.0], 3, "kl"),
        ({"max_kl": None}, [1] * 4, [9.0] * 4, None, ""),
        ({"max_turns": 3}, [1, 2, 3, 4], None, 3, "turns"),
        # Both: what is told is that it went too far.
        ({"max_turns": 3}, [1, 2, 3], [0.0, 0.0, 0.2], 3, "kl"),
    ],
)
def test_it_ends_as_it_says(options, rewards, kls, turn, reason):
    rule = StopRule(StopOptions(**options))
    assert turns_of(rule, rewards, kls) == turn
    assert rule.reason == reason
    if turn is not None:
        assert rule.turn == turn
        number = {"kl": options.get("max_kl", 0.1), "no gain": options.get("patience"), "turns": turn}[reason]
        assert str(number) in rule.described()


def test_a_rule_that_goes_on_knows_the_turns_before():
    options = StopOptions(every=2, patience=2)
    rewards = [0, 2, 3, 3, 1, 3, 9, -3]
    for done in range(len(rewards)):
        rule = StopRule(options)
        lines = [{"step": 0}, *({"step": i + 1, REWARD: reward, KL: None} for i, reward in enumerate(rewards[:done]))]
        rule.begin(lines)
        assert (rule.turn, rule.reason, rule.kls) == (done, "", [])
        ends = [rule.after_turn(turn, {REWARD: rewards[turn - 1]}) for turn in range(done + 1, len(rewards) + 1)]
        assert ends == [False] * (len(ends) - 1) + [True]
        assert rule.evaluations == [1, 3, 2, 3]


def test_a_turn_without_an_update_has_no_reward():
    rule = StopRule(StopOptions(every=1, patience=1))
    assert not any(rule.after_turn(turn, {REWARD: value}) for turn, value in ((1, 1.0), (2, float("nan")), (3, 2.0)))
    assert not rule.after_turn(4, {})
    assert (rule.rewards, rule.turn) == ([1.0, 2.0], 4)


@pytest.mark.parametrize("options", [{"max_turns": 0}, {"every": 0}, {"patience": 0}, {"max_kl": 0.0}])
def test_what_is_no_rule_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        StopOptions(**options)
