"""The objectives that learners are trained with: one file for each, all with the same interface."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import Config
from repirl.data import Data

# A model's outputs for each response token of a (micro-)batch: name -> [R] float32.
Outputs = dict[str, Tensor]
Metrics = dict[str, float]
# Name -> (sum, count) of a figure over a micro-batch. Both are added up over all micro-batches and processes; their
# quotient is reported.
Figures = dict[str, tuple[Tensor, int]]


def load_objectives(places: Mapping[str, str]) -> dict[str, type[Objective]]:
    """Import the objectives of a row of systems.py.

    Args:
        places: `System.objectives`: learner -> "module:class".

    Returns:
        The classes, by learner.
    """
    objectives = {}
    for learner, place in places.items():
        module, _, name = place.partition(":")
        objectives[learner] = getattr(importlib.import_module(module), name)
    return objectives


class Objective(ABC):
    """The rules of an update. They do not depend on the model, the processes or the micro-batches.

    In each turn `select` returns the batch to learn from. Then, for each update: the learners that `reads_learners`
    names write their streams (the PRM `reward`); `prepare` adds streams and computes normalisers of the whole batch;
    the learner calls `loss` for each micro-batch. So the gradient does not depend on how the batch is divided.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        """Whether it reads the stream `ref_logprob`: log-probabilities under the frozen initial policy."""
        return False

    @property
    def reads_rewards(self) -> bool:
        """Whether it reads the stream `reward`: the rewards of the current PRM."""
        return False

    @property
    def reads_learners(self) -> tuple[str, ...]:
        """The learners whose current outputs `prepare` or `loss` reads as streams (`streams.STREAM_OF`)."""
        return ("prm",) if self.reads_rewards else ()

    @property
    def reads_reference(self) -> bool:
        """Whether it reads `ref_logprob` of all sequences of its batch. Rollouts have it where `needs_reference` holds;
        the others get it after `select`."""
        return False

    @abstractmethod
    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        """Choose the batch for this turn's updates.

        Args:
            rollouts: this turn's rollouts, verified and with the stream `old_logprob`; offline the fixed ones of the
                data, None where the system has none.
            data: gives the expert trajectories and the pairs.

        Returns:
            The batch, or None to skip this turn's updates, which is reported as NAME/skipped.
        """

    def prepare(self, batch: PackedBatch) -> Metrics:
        """Write the streams that `loss` reads, and keep the normalisers of the whole batch.

        Returns:
            Metrics to report.
        """
        return {}

    @abstractmethod
    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """The loss of one micro-batch.

        Args:
            outputs: the model's outputs for the micro-batch.
            micro: the micro-batch.

        Returns:
            A scalar (the loss of the batch is the sum over its micro-batches), and figures to report.
        """
