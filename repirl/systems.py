"""The table of training systems: which learners each one trains, on which data, and with which objectives.

To add a system, add a row here and a file in `objectives/`. Checking a configuration reads this table and must not
import torch, which is slow. So the table holds the objectives' names; `objectives.load_objectives` imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        summary: one line about the system, for users.
        objectives: for each learner that is trained ("policy", "prm", ...), the "module:class" of its
            `objectives.Objective`. Learners are updated in this order.
        data: the kinds of data that the system needs ("prompts", "answers", "experts").
        online: whether a turn samples from the policy.
        reads: the frozen learners that the system needs ("prm"). The frozen reference is not listed: whether it is
            needed depends on options (`Objective.needs_reference`).
    """

    summary: str
    objectives: Mapping[str, str]
    data: tuple[str, ...]
    online: bool
    reads: tuple[str, ...] = ()

    @property
    def trains(self) -> tuple[str, ...]:
        """The learners that are updated."""
        return tuple(self.objectives)

    @property
    def has_prm(self) -> bool:
        """Whether there is a PRM, trained or frozen."""
        return "prm" in (*self.trains, *self.reads)


# What people call a learner, where that is not its name.
LABELS = {"prm": "PRM"}

SYSTEMS: dict[str, System] = {
    "repirl": System(
        "PRM by inverse reinforcement learning, policy on outcome and process rewards (Wu et al. 2026)",
        objectives={"prm": "repirl.objectives.irl:IRL", "policy": "repirl.objectives.rloo:RLOO"},
        data=("prompts", "experts"),
        online=True,
    ),
    "rloo": System(
        "policy on outcome rewards with a leave-one-out baseline (Ahmadian et al. 2024)",
        objectives={"policy": "repirl.objectives.rloo:RLOO"},
        data=("prompts", "answers"),
        online=True,
    ),
    "sft": System(
        "supervised fine-tuning on expert trajectories (behaviour cloning)",
        objectives={"policy": "repirl.objectives.sft:SFT"},
        data=("experts",),
        online=False,
    ),
}
