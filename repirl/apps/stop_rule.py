"""When test-time training ends: a rule that needs no answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from repirl.callbacks import Callback
from repirl.config import ConfigError

# In a turn's metrics: the PRM's reward of its rollouts, and the KL of the policy that sampled them to its start.
REWARD, KL = "policy/response_reward", "policy/kl_reference"


@dataclass(frozen=True)
class StopOptions:
    """When test-time training ends, without knowing any answer.

    Args:
        max_turns: at the latest.
        max_kl: as soon as the policy is further from its start than this: KL(policy, start) in nats a token, estimated
            on a turn's rollouts (k3); None for no limit.
        every: turns whose rollouts are one evaluation: the mean of their rewards by the PRM.
        patience: evaluations in a row that are not above the best one before them; None for no limit.
    """

    max_turns: int = 100
    max_kl: float | None = 0.1
    every: int = 5
    patience: int | None = 4

    def __post_init__(self) -> None:
        for option, value in {"turns": self.max_turns, "every": self.every, "patience": self.patience}.items():
            if value is not None and value < 1:
                raise ConfigError(f"--{option} is {value}, expected at least 1")
        if self.max_kl is not None and not 0 < self.max_kl < math.inf:
            raise ConfigError(f"--max-kl is {self.max_kl}, expected a number above 0, or none")


class StopRule(Callback):
    """Ends a run as `StopOptions` says. reason: why, "" as long as it goes on; turn: the last one that it knows.

    rewards, kls: of each turn; a turn without an update has none.
    """

    def __init__(self, options: StopOptions) -> None:
        self.options = options
        self.begin(())

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The run goes on: what the earlier turns were."""
        self.rewards, self.kls = list[float](), list[float]()
        self.reason, self.turn = "", 0
        for record in records:
            if record["step"]:
                self.after_turn(record["step"], record)

    def after_turn(self, turn: int, metrics: Mapping[str, Any]) -> bool:
        self.turn = turn
        for values, name in ((self.rewards, REWARD), (self.kls, KL)):
            # What is not finite stands in metrics.jsonl as null.
            if (value := metrics.get(name)) is not None and math.isfinite(value):
                values.append(value)
        self.reason = self._reason(turn)
        return bool(self.reason)

    @property
    def evaluations(self) -> list[float]:
        """The mean reward of every `every` turns."""
        every = self.options.every
        return [fmean(self.rewards[i : i + every]) for i in range(0, len(self.rewards) - every + 1, every)]

    def _reason(self, turn: int) -> str:
        options, evaluations = self.options, self.evaluations
        if options.max_kl is not None and self.kls and self.kls[-1] > options.max_kl:
            return "kl"
        if options.patience is not None and evaluations:
            since_best = len(evaluations) - 1 - evaluations.index(max(evaluations))
            if since_best >= options.patience:
                return "no gain"
        return "turns" if turn >= options.max_turns else ""

    def described(self) -> str:
        """The reason in words."""
        options = self.options
        return {
            "kl": f"the KL to the start is above {options.max_kl} nats a token",
            "no gain": f"the PRM's reward has not risen in {options.patience} evaluations of {options.every} turns",
            "turns": f"{options.max_turns} turns are done",
        }[self.reason]
