"""Which prompts of a turn are trained on, by the outcomes of their responses.

Sources: dynamic sampling of DAPO, Yu et al. 2025; online prompt filter of PRIME, Cui et al. 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from repirl.batch import PackedBatch
from repirl.options import FilterConfig
from repirl.rollout.engine import Response

# Why a prompt is dropped.
REASONS = ("too_hard", "too_easy", "truncated")


@dataclass(frozen=True)
class Group:
    """A prompt with its judged responses.

    Args:
        row: the prompt's number in the data.
        responses: the K responses.
        outcomes: of each response, 1 if it is right, 0 if it is wrong; NaN if the prompt has no answer.
        fresh: whether they come from the policy's present weights.
    """

    row: int
    responses: list[Response]
    outcomes: list[float]
    fresh: bool = True

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"row": self.row, "responses": [astuple(r) for r in self.responses], "outcomes": self.outcomes}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Group:
        """What `state` described, as a group of older weights."""
        responses = [Response(*fields) for fields in state["responses"]]
        return Group(state["row"], responses, state["outcomes"], fresh=False)


@dataclass(frozen=True)
class Sampled:
    """What a turn has sampled.

    Args:
        kept: the prompts of the batch, in its order.
        dropped: those that no turn trains on.
        batch: the rollouts, to which the turn adds streams; None if no prompt was kept.
    """

    kept: list[Group]
    dropped: list[Group]
    batch: PackedBatch | None


def without(groups: list[Group], others: list[Group]) -> list[Group]:
    """Those of the groups whose responses are not in one of the others, a copy with another `fresh` included."""
    known = {id(group.responses) for group in others}
    return [group for group in groups if id(group.responses) not in known]


def why_dropped(group: Group, options: FilterConfig) -> str | None:
    """The first of `REASONS` for which a prompt is dropped; None if it is kept.

    A prompt's accuracy is the mean outcome of its responses. The bounds are inclusive. Without bounds, accuracies of
    exactly 0 and 1 are dropped: such a group has no outcome advantage.
    """
    accuracy = sum(group.outcomes) / len(group.outcomes)
    if accuracy <= 0.0 if options.min_accuracy is None else accuracy < options.min_accuracy:
        return "too_hard"
    if accuracy >= 1.0 if options.max_accuracy is None else accuracy > options.max_accuracy:
        return "too_easy"
    if options.truncated == "drop" and not all(response.ended for response in group.responses):
        return "truncated"
    return None


@dataclass(frozen=True)
class Filtered:
    """What `sample_filtered` returns.

    Args:
        kept: the prompts of the turn's batch, in the order in which they were sampled.
        sampled: all prompts that were sampled for it, kept or not.
        surplus: those that passed but were not needed.
        metrics: to report.
    """

    kept: list[Group]
    sampled: list[Group]
    surplus: list[Group]
    metrics: dict[str, float]


def sample_filtered(
    options: FilterConfig, wanted: int, carried: list[Group], sample: Callable[[int, int], list[Group]]
) -> Filtered:
    """Sample prompts in rounds until enough of them pass the filter, or until `max_rounds` rounds are done.

    A round samples `oversample` prompts for each one that is still missing. If prompts are missing after the last
    round, the batch has fewer of them, possibly none.

    PRIME (its first implementation) carries prompts beyond the wanted number over to the next turn; DAPO drops them.

    Args:
        options: the filter's.
        wanted: how many prompts the batch should have.
        carried: prompts that passed in earlier turns; they are used first.
        sample: of (count, number of prompts already sampled this turn), it samples responses to the next `count`
            prompts and judges them.

    Returns:
        The groups. Metrics: filter/rounds; filter/sampled, the prompts sampled; filter/too_hard, filter/too_easy and
        filter/truncated, those dropped, by reason; filter/surplus, those that passed but are not in the batch;
        filter/kept, the prompts in the batch.
    """
    passed = list(carried)
    sampled: list[Group] = []
    dropped = dict.fromkeys(REASONS, 0)
    rounds = 0
    while len(passed) < wanted and rounds < options.max_rounds:
        rounds += 1
        for group in sample(math.ceil(options.oversample * (wanted - len(passed))), len(sampled)):
            sampled.append(group)
            reason = why_dropped(group, options)
            if reason is None:
                passed.append(group)
            else:
                dropped[reason] += 1
    kept, surplus = passed[:wanted], passed[wanted:]
    metrics = {"filter/rounds": rounds, "filter/sampled": len(sampled), "filter/kept": len(kept)}
    metrics |= {"filter/surplus": len(surplus)} | {f"filter/{reason}": count for reason, count in dropped.items()}
    return Filtered(kept, sampled, surplus, {name: float(value) for name, value in metrics.items()})
