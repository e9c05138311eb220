"""The table of training systems: what each trains and reads, on which data, and which objective updates what.

A new system is a row here and a file in `objectives/`. The table is read to check a configuration, which must not wait
for torch: so it names objectives, and objectives.load_objectives imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row.

    summary: what it is, for people. objectives: learner ("policy", "prm", ...) -> "module:class" of the
    `objectives.Objective` that it is trained with, in the order of their updates. data: which data it learns from
    ("prompts", "answers", "experts"). online: whether a turn samples from the policy. reads: frozen learners that it
    needs ("prm"); whether it needs the frozen reference, the objectives say, as it depends on options.
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
