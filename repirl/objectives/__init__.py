"""What a learner is trained for: one file an objective, all of one shape."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import Config
from repirl.data import Data

# What a model says about each response token of a (micro-)batch: name -> [R] float32.
Outputs = dict[str, Tensor]
Metrics = dict[str, float]
# Name -> (sum, count) of a figure over a micro-batch. What is reported is the quotient of the sums of both over all
# micro-batches and processes.
Figures = dict[str, tuple[Tensor, int]]


def load_objectives(places: Mapping[str, str]) -> dict[str, type[Objective]]:
    """The classes of a row of systems.py, by learner; places: `System.objectives`."""
    found = {}
    for learner, place in places.items():
        module, _, name = place.partition(":")
        found[learner] = getattr(importlib.import_module(module), name)
    return found


class Objective(ABC):
    """The rules of one update; no model, no processes and no micro-batches are known here.

    Once a turn `select` says what to learn from. Then for each update: the PRM writes the stream `reward` (where
    `reads_rewards`), `prepare` adds streams and computes what belongs to the whole batch, and the learner calls `loss`
    for each micro-batch. So how a batch is cut and dealt out to processes changes no gradient.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        """Whether the stream `ref_logprob` is read: log-probabilities under the frozen initial policy."""
        return False

    @property
    def reads_rewards(self) -> bool:
        """Whether the stream `reward`, of the present PRM, is read."""
        return False

    @abstractmethod
    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        """What this turn's updates are made on.

        Args:
            rollouts: this turn's, scored by the policy (`old_logprob`) and verified; None in an offline system.
            data: where experts come from.

        Returns:
            A batch, or None where there is nothing to learn from this turn; that is reported as NAME/skipped.
        """

    def prepare(self, batch: PackedBatch) -> Metrics:
        """Add the streams that `loss` reads, and keep the normalisers of the whole batch. Returns what to report."""
        return {}

    @abstractmethod
    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """This micro-batch's share of the loss (a scalar; shares are added up), and figures to report."""
