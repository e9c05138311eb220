"""Prompts, expert trajectories, and what objectives take of them."""

from __future__ import annotations

from dataclasses import dataclass

from repirl.batch import PackedBatch
from repirl.data.experts import Experts


@dataclass
class Data:
    """What objectives may learn from beside rollouts; None where the system has no use for it."""

    experts: Experts | None = None

    def next_experts(self) -> PackedBatch:
        """The next expert trajectories."""
        assert self.experts is not None, "the system's row in systems.py has no experts in `data`"
        return self.experts.next()
