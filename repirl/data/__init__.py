"""Prompts, expert trajectories, preference pairs, fixed rollouts, labelled steps, and what objectives take of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from repirl.batch import PackedBatch
from repirl.data.experts import Experts
from repirl.data.pairs import Pairs
from repirl.data.steps import LabelledResponse, LabelledSteps
from repirl.data.trajectories import Trajectories


class Feed(Protocol):
    """Data in the order of a run; a checkpoint holds where it stands."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None: ...


@dataclass
class Data:
    """What objectives may learn from beside rollouts; None where the system has no use for it."""

    experts: Experts | None = None
    pairs: Pairs | None = None
    trajectories: Trajectories | None = None
    steps: LabelledSteps | None = None
    eval_steps: list[LabelledResponse] | None = None

    @property
    def feeds(self) -> dict[str, Feed]:
        """All that there is, by its name in checkpoints."""
        parts: dict[str, Feed | None] = {
            "experts": self.experts,
            "pairs": self.pairs,
            "trajectories": self.trajectories,
            "steps": self.steps,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def metrics(self) -> dict[str, float]:
        """Figures of what was given last."""
        return {} if self.experts is None else self.experts.metrics()

    def next_experts(self) -> PackedBatch:
        """The next expert trajectories."""
        assert self.experts is not None, "the system's row in systems.py has no experts in `data`"
        return self.experts.next()

    def matching_experts(self, rollouts: PackedBatch) -> PackedBatch | None:
        """All experts of the rollouts' prompts, in their groups; None if there are none."""
        assert self.experts is not None, "the system's row in systems.py has no experts in `data`"
        return self.experts.matching(rollouts)

    def next_pairs(self) -> PackedBatch:
        """The next preference pairs: the chosen responses, then the rejected ones."""
        assert self.pairs is not None, "the system's row in systems.py has no pairs in `data`"
        return self.pairs.next()

    def next_steps(self) -> PackedBatch:
        """The next responses with labelled steps."""
        assert self.steps is not None, "the system's row in systems.py has no steps in `data`"
        return self.steps.next()
