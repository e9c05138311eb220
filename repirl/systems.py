"""The table of training systems: which learners each one trains, on which data, and with which objectives.

To add a system, add a row here and a file in `objectives/`. Checking a configuration reads this table and must not
import torch, which is slow. So the table holds the objectives' names; `objectives.load_objectives` imports them.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        summary: one line about the system, for users.
        objectives: for each learner that is trained ("policy", "prm", ...), the "module:class" of its
            `objectives.Objective`. Learners are updated in this order.
        data: the kinds of data that the system needs ("prompts", "answers", "experts", "pairs", "trajectories",
            and "outcomes" of the latter, "steps").
        online: whether a turn samples from the policy.
        gated: whether the policy can wait for a PRM that learns from experts (`irl.gate`).
        reads: the frozen learners that the system needs ("prm"). The frozen reference is not listed: whether it is
            needed depends on options (`Objective.needs_reference`).
        optional: the kinds of data that it makes use of where they are given ("experts").
        sections: sections of options that only the systems which name them here read.
        prm_beta: `prm.beta` where the configuration has none.
        prm_rewards: the readings of the PRM (`prm.reward`) that the system is defined for; empty: all of them.
    """

    summary: str
    objectives: Mapping[str, str]
    data: tuple[str, ...]
    online: bool
    reads: tuple[str, ...] = ()
    gated: bool = False
    optional: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    prm_rewards: tuple[str, ...] = ()
    prm_beta: float = 1.0

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
        gated=True,
    ),
    "rloo": System(
        "policy on outcome rewards with a leave-one-out baseline (Ahmadian et al. 2024)",
        objectives={"policy": "repirl.objectives.rloo:RLOO"},
        data=("prompts", "answers"),
        online=True,
    ),
    "prime": System(
        "PRM by cross-entropy of its summed implicit rewards against outcomes, policy on both (PRIME, Cui et al. 2025)",
        objectives={"prm": "repirl.objectives.prime:OutcomePRM", "policy": "repirl.objectives.prime:PrimePolicy"},
        data=("prompts", "answers"),
        online=True,
        sections=("prime",),
        prm_rewards=("implicit",),
        prm_beta=0.05,
    ),
    "airl": System(
        "PRM that tells tokens of experts from those of rollouts, policy on its logits (Fanconi et al. 2025)",
        objectives={"prm": "repirl.objectives.airl:AIRL", "policy": "repirl.objectives.airl:ClippedRLOO"},
        data=("prompts", "experts"),
        online=True,
        gated=True,
        sections=("discriminator",),
    ),
    "iq-learn": System(
        "inverse soft-Q learning on expert trajectories, the policy's logits as Q (Wulfmeier et al. 2024)",
        objectives={"policy": "repirl.objectives.iq:IQLearn"},
        data=("experts",),
        online=False,
        sections=("iq",),
    ),
    "dpo": System(
        "policy on preference pairs (DPO, Rafailov et al. 2023; IPO, Azar et al. 2023)",
        objectives={"policy": "repirl.objectives.dpo:DPO"},
        data=("pairs",),
        online=False,
        sections=("dpo",),
    ),
    "online-dpo": System(
        "DPO on pairs of each turn: a right rollout or an expert's solution, and a wrong rollout of the same prompt",
        objectives={"policy": "repirl.objectives.dpo:OnlineDPO"},
        data=("prompts", "answers"),
        online=True,
        optional=("experts",),
        sections=("dpo",),
    ),
    "dqo": System(
        "policy's logits as soft Q, a critic as V, on fixed rollouts (DQO, Ji et al. 2024; OREO, Wang et al. 2024)",
        objectives={"critic": "repirl.objectives.dqo:CriticDQO", "policy": "repirl.objectives.dqo:PolicyDQO"},
        data=("trajectories", "outcomes"),
        online=False,
        sections=("critic", "dqo"),
    ),
    "online-dqo": System(
        "DQO on each turn's rollouts",
        objectives={"critic": "repirl.objectives.dqo:CriticDQO", "policy": "repirl.objectives.dqo:PolicyDQO"},
        data=("prompts", "answers"),
        online=True,
        sections=("critic", "dqo"),
    ),
    "prm-offline": System(
        "PRM by inverse reinforcement learning from experts and fixed rollouts, without sampling",
        objectives={"prm": "repirl.objectives.irl:IRL"},
        data=("experts", "trajectories"),
        online=False,
    ),
    "rloo-prm": System(
        "policy on outcomes and the rewards of a frozen PRM, which may score tokens or steps",
        objectives={"policy": "repirl.objectives.frozen:FrozenPRM"},
        data=("prompts",),
        online=True,
        reads=("prm",),
    ),
    "math-shepherd": System(
        "PRM on labelled steps (Math-Shepherd, Wang et al. 2024; `repirl label` makes the labels)",
        objectives={"prm": "repirl.objectives.steps:StepLabels"},
        data=("steps",),
        online=False,
        sections=("step_prm",),
        prm_rewards=("value",),
    ),
    "sft": System(
        "supervised fine-tuning on expert trajectories (behaviour cloning)",
        objectives={"policy": "repirl.objectives.sft:SFT"},
        data=("experts",),
        online=False,
    ),
}


def find_system(name: str) -> System:
    """The row of a name, or a System of somebody's own as "module:name", from the working directory or an installed
    package.

    Raises:
        ValueError: there is none; or its module cannot be imported.
    """
    if name in SYSTEMS:
        return SYSTEMS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, SYSTEMS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"input should be one of {[*SYSTEMS]}{hint}, or a System of your own as module:name")
    if "" not in sys.path and "." not in sys.path:
        # The command `repirl` does not look there by itself, as `python` does.
        sys.path.append("")
    try:
        system = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"objective {name!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not isinstance(system, System):
        raise ValueError(f"objective {name!r} is of type {type(system).__name__}, expected a repirl.System")
    return system
