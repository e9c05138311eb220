"""The methods of labelling, with a completer whose chances are known."""

import pytest

from repirl.apps.step_labels import METHODS, Tree, hard, share
from repirl.data.split import Steps
from repirl.options import LabelConfig
from repirl.rollout.completions import Trajectory

# The project's fixture math_shepherd.json: what 8 completions from each of three steps came to, and the labels.
SUCCESSES = [[1, 1, 0, 1, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
HARD, SOFT = [True, True, False], [0.75, 0.25, 0.0]


def split(trajectory):
    """Each token is a step."""
    count = len(trajectory.token_ids)
    return Steps(tuple(f"{i}\n" for i in trajectory.token_ids), tuple(range(count)))


def response(*token_ids, outcome=0.0):
    return Trajectory(token_ids, True, outcome, len(token_ids))


def run(method, answer):
    """Drive a method; `answer` gives the completions of a prefix. Returns its labels and all that it asked for."""
    asked, wants = [], next(method)
    while True:
        asked.append(list(wants))
        try:
            wants = method.send([answer(prefix, count) for prefix, count in wants])
        except StopIteration as done:
            return done.value, asked


def test_hard_and_soft_labels_are_the_published_ones():
    given = [response(5, 6, 7, 8, outcome=0.0)]

    def answer(prefix, count):
        assert count == 8
        return [response(*prefix, 9, outcome=float(right)) for right in SUCCESSES[len(prefix) - 1]]

    [labelled], asked = run(METHODS["math-shepherd"](given, split, 4, LabelConfig()), answer)
    assert asked == [[((5,), 8), ((5, 6), 8), ((5, 6, 7), 8)]]
    # The last step's label is the response's own outcome.
    assert labelled.labels == (*SOFT, 0.0)
    assert [hard(label) for label in labelled.labels] == [*HARD, False]
    assert hard(None) is None
    assert labelled.finished
    assert share([response(outcome=0.5), response(outcome=1.0)]) == 0.75


def test_responses_are_sampled_where_none_is_given():
    sampled = [response(5, 6, outcome=1.0), response(5, outcome=0.0)]

    def answer(prefix, count):
        return sampled if prefix == () else [response(*prefix, 9, outcome=1.0)] * count

    labelled, asked = run(METHODS["math-shepherd"]([], split, 2, LabelConfig(samples=3)), answer)
    assert asked == [[((), 2)], [((5,), 3)]]
    assert [one.labels for one in labelled] == [(1.0, 1.0), (0.0,)]


@pytest.mark.parametrize("error", range(8))
def test_omega_finds_the_first_error_by_bisection(error):
    """A wrong rollout of 8 steps; from a prefix without the error half of the completions are right."""
    wrong = response(*range(10, 18))

    def answer(prefix, count):
        if prefix == ():
            return [wrong, *[response(1, outcome=1.0)] * (count - 1)]
        right = prefix == wrong.token_ids[: len(prefix)] and len(prefix) <= error
        return [response(*prefix, 50 + i, outcome=float(right and i % 2 == 0)) for i in range(count)]

    options = LabelConfig(searches=1, samples=4)
    [labelled], asked = run(METHODS["omega"]([], split, 9, options), answer)
    # Not one completion from each of the 7 steps, but from 3 of them.
    assert asked[0] == [((), 4)]
    assert [len(wants) for wants in asked] == [1] * 4
    steps = len(labelled.steps.ends)
    assert steps == error + 1
    assert labelled.labels[-1] == 0.0
    assert {label for label in labelled.labels[:-1] if label is not None} <= {0.5}
    tested = sorted(len(wants[0][0]) - 1 for wants in asked[1:])
    assert [i for i, label in enumerate(labelled.labels) if label is not None] == sorted(
        {i for i in tested if i <= error} | {error}
    )
    # Only the whole response ends with an end token.
    assert labelled.finished == (error == 7)


def test_omega_goes_on_from_the_states_on_the_way():
    """The search of the root's rollout gives the state (10, 11), whose own wrong rollout is searched next."""
    wrong = response(10, 11, 12, 13)
    later = response(10, 11, 20, 21)

    def answer(prefix, count):
        if prefix == ():
            return [wrong, response(1, outcome=1.0)]
        if prefix == (10, 11):
            return [later, response(10, 11, 2, outcome=1.0)]
        return [response(*prefix, 3), response(*prefix, 4)]

    options = LabelConfig(samples=2)
    labelled, asked = run(METHODS["omega"]([], split, 9, options), answer)
    assert [wants[0][0] for wants in asked] == [(), (10, 11), (10, 11, 12), (10, 11, 20)]
    assert [one.labels for one in labelled] == [(None, 0.5, 0.0), (None, None, 0.0)]
    # A prompt that is always or never right has no labels.
    for outcome in (0.0, 1.0):
        assert run(
            METHODS["omega"]([], split, 9, options), lambda p, n, o=outcome: [response(1, 2, outcome=o)] * n
        ) == ([], [[((), 2)]])


def test_omega_labels_no_state_twice():
    """The same wrong rollout came up twice."""
    wrong = response(10, 11, 12)

    def answer(prefix, count):
        return [wrong, wrong, response(1, outcome=1.0)] if prefix == () else [response(*prefix, 9, outcome=1.0)] * count

    labelled, asked = run(METHODS["omega"]([], split, 9, LabelConfig(samples=3)), answer)
    assert [one.labels for one in labelled] == [(1.0, 1.0, 0.0)]
    assert len(asked) == 3
    # A search limit ends it sooner.
    assert run(METHODS["omega"]([], split, 9, LabelConfig(samples=3, searches=1)), answer)[0] == labelled


def test_omegas_choice_is_puct():
    options = LabelConfig(alpha=0.5, beta=0.9, length_scale=4, exploration=0.125)
    tree = Tree(split, options)
    root = tree.add((), [response(1, 2, 3, 4), response(5, outcome=1.0)])
    good = tree.add((7,), [response(7, 8), response(7, 9, outcome=1.0), response(7, 6, outcome=1.0)])
    assert tree.add((8,), [response(8, 1)]).value == 0.0
    assert (root.value, good.value) == (0.5, pytest.approx(2 / 3))
    # Q: 0.5^0.5 0.9^(4/4) = 0.636 for the root's, 0.5^(1/3) 0.9^(1/4) = 0.773 for the other; none was visited.
    assert tree.select() == (good, response(7, 8))
    assert good.visits == 1
    # A state of value 0 holds no first error behind it.
    assert tree.pool == [(root, response(1, 2, 3, 4))]
    # U = 0.125 sqrt(9) / (1 + N(s)): what was never visited gets ahead of what is better by less.
    good.visits, tree.pool = 9, [*tree.pool, (good, response(7, 8))]
    assert 0.636 + 0.125 * 3 > 0.773 + 0.125 * 3 / 10
    assert tree.select()[0] is root
