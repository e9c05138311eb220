"""Labels of steps from completions: how often does the policy still get it right from here?

Each method is a generator, so that the completions of many prompts can be sampled side by side: it yields what it wants
to have completed, is sent the trajectories, and returns the labelled responses.

Sources: Math-Shepherd (Wang et al. 2024, arXiv 2312.08935), OmegaPRM (Luo et al. 2024, arXiv 2406.06592).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from repirl.data.split import Steps
from repirl.options import LabelConfig
from repirl.rollout.completions import Trajectory

Prefix: TypeAlias = tuple[int, ...]
Split: TypeAlias = Callable[[Trajectory], Steps]


@dataclass(frozen=True)
class LabelledTrajectory:
    """A response, or its first steps, with labels.

    Args:
        trajectory: the response.
        steps: its first steps, or all of them.
        labels: of each of these steps: the share of right completions from there, or None.
    """

    trajectory: Trajectory
    steps: Steps
    labels: tuple[float | None, ...]

    @property
    def finished(self) -> bool:
        """Whether the last of the steps is the last of the response, which an end token ended."""
        return self.trajectory.ended and self.steps.ends[-1] == len(self.trajectory.token_ids) - 1


# It yields (prefix, number of completions) pairs, and is sent a list of trajectories for each pair.
Method: TypeAlias = Generator[
    Sequence[tuple[Prefix, int]], Sequence[Sequence[Trajectory]], Sequence[LabelledTrajectory]
]


def share(trajectories: Sequence[Trajectory]) -> float:
    """The share of right ones: the mean of their verdicts."""
    return math.fsum(t.outcome for t in trajectories) / len(trajectories)


def hard(label: float | None) -> bool | None:
    """Math-Shepherd's hard label: whether any completion was right."""
    return None if label is None else label > 0


def math_shepherd(given: Sequence[Trajectory], split: Split, num_responses: int, options: LabelConfig) -> Method:
    """Label each step by completions from there, and the last step by the response's own outcome.

    Args:
        given: the responses; if there are none, they are sampled.
        split: gives a response's steps.
        num_responses: how many are sampled where none is given.
        options: `samples` is the number of completions a step.
    """
    if not given:
        [given] = yield [((), num_responses)]
    divided = [split(trajectory) for trajectory in given]
    asked = [
        (trajectory.token_ids[: end + 1], options.samples)
        for trajectory, steps in zip(given, divided, strict=True)
        for end in steps.ends[:-1]
    ]
    answers = iter((yield asked))
    return [
        LabelledTrajectory(t, steps, (*(share(next(answers)) for _ in steps.ends[:-1]), t.outcome))
        for t, steps in zip(given, divided, strict=True)
    ]


@dataclass
class State:
    """A state of OmegaPRM's tree: a response up to the end of a step.

    Args:
        prefix: its tokens.
        value: MC(s), the share of rollouts from here that were right.
        visits: N(s), how often a rollout from here was searched.
    """

    prefix: Prefix
    value: float
    visits: int = 0


@dataclass
class Tree:
    """OmegaPRM's tree of one prompt.

    Args:
        split: gives a response's steps.
        options: those of the method.
        states: by their prefixes.
        pool: the wrong rollouts that may be searched, each with the state that it starts from.
    """

    split: Split
    options: LabelConfig
    states: dict[Prefix, State] = field(default_factory=dict)
    pool: list[tuple[State, Trajectory]] = field(default_factory=list)

    def add(self, prefix: Prefix, rollouts: Sequence[Trajectory]) -> State:
        """Add a state. Its wrong rollouts may be searched if some of its rollouts are right: then they hold an error
        behind it."""
        state = self.states[prefix] = State(prefix, share(rollouts))
        if state.value > 0:
            self.pool += [(state, rollout) for rollout in rollouts if rollout.outcome == 0]
        return state

    def select(self) -> tuple[State, Trajectory]:
        """Take the rollout with the largest Q(s, r) + U(s) out of the pool, the first of equal ones.

        Q(s, r) = alpha^(1 - MC(s)) beta^(len(r) / L), U(s) = c_puct sqrt(sum of all N) / (1 + N(s)).
        """
        options, total = self.options, sum(state.visits for state in self.states.values())

        def priority(index: int) -> float:
            state, rollout = self.pool[index]
            length = len(rollout.token_ids) - len(state.prefix)
            q = options.alpha ** (1 - state.value) * options.beta ** (length / options.length_scale)
            return q + options.exploration * math.sqrt(total) / (1 + state.visits)

        state, rollout = self.pool.pop(max(range(len(self.pool)), key=priority))
        state.visits += 1
        return state, rollout

    def search(self, state: State, rollout: Trajectory) -> Method:
        """Binary search for the first step of a wrong rollout from which no completion is right."""
        steps = self.split(rollout)
        first = sum(end < len(state.prefix) for end in steps.ends)
        labels: list[float | None] = [None] * len(steps.ends)
        # `right` is the last step known to lead to a right answer, `wrong` the first that is known not to.
        right, wrong = first - 1, len(steps.ends) - 1
        while wrong - right > 1:
            middle = (right + wrong) // 2
            prefix = rollout.token_ids[: steps.ends[middle] + 1]
            reached = self.states.get(prefix)
            if reached is None:
                [rollouts] = yield [(prefix, self.options.samples)]
                reached = self.add(prefix, rollouts)
                labels[middle] = reached.value
            if reached.value > 0:
                right = middle
            else:
                wrong = middle
        if wrong == len(steps.ends) - 1 and rollout.token_ids not in self.states:
            # The whole response is a state as well, whose value is its outcome.
            labels[wrong] = self.add(rollout.token_ids, [rollout]).value
        count = wrong + 1
        if all(label is None for label in labels[:count]):
            return []
        kept = Steps(steps.texts[:count], steps.ends[:count])
        return [LabelledTrajectory(rollout, kept, tuple(labels[:count]))]


def omega(given: Sequence[Trajectory], split: Split, num_responses: int, options: LabelConfig) -> Method:
    """OmegaPRM: find the first errors of wrong rollouts by binary search, and go on from the states on the way.

    Each state is labelled once, by MC(s), in the response in which it was first reached; so is each first error. A
    prompt that the policy always or never gets right has no labels.

    Args:
        given: rollouts of the prompt, beside those that are sampled.
        split: gives a response's steps.
        num_responses: not used; `options.samples` rollouts are sampled from the prompt, as from any other state.
        options: those of the method.
    """
    [sampled] = yield [((), options.samples)]
    tree = Tree(split, options)
    tree.add((), [*given, *sampled])
    labelled: list[LabelledTrajectory] = []
    for _ in range(options.searches):
        if not tree.pool:
            break
        labelled += yield from tree.search(*tree.select())
    return labelled


METHODS = {"math-shepherd": math_shepherd, "omega": omega}
