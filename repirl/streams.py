"""Writes into a batch what learners say of it: the present ones, for the objectives that read it, and the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from repirl_kernels import segment_sum
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import Config
from repirl.learner import Learner
from repirl.rewards import read_rewards
from repirl.work import PhaseTimer

# For each learner whose outputs objectives read (`Objective.reads_learners`): the stream that holds them, which is also
# the phase in which they are computed for another learner's update.
STREAM_OF = {"prm": "reward", "policy": "logprob", "critic": "state_value"}


class Scores:
    """The streams of one learner's updates in one turn; each is written again when its learner has changed.

    Args:
        config: the run's.
        learners: by name.
        updated: the learner whose updates these are.
        timer: measures the phases.
    """

    def __init__(self, config: Config, learners: dict[str, Learner], updated: str, timer: PhaseTimer) -> None:
        self.config, self.learners, self.updated, self.timer = config, learners, updated, timer
        # Learner -> the version of its weights that the batch has the outputs of.
        self._versions: dict[str, int] = {}

    def write(self, batch: PackedBatch, names: tuple[str, ...]) -> None:
        """Write the outputs of the present learners of these names."""
        for name in names:
            learner = self.learners[name]
            if self._versions.get(name) == learner.version:
                continue
            with self.timer(self.updated if name == self.updated else STREAM_OF[name]):
                values = self._read(name, batch)
                batch.write(STREAM_OF[name], values)
                if name == "prm":
                    batch.write("prm_reward", values)
            self._versions[name] = learner.version

    def _read(self, name: str, batch: PackedBatch) -> Tensor:
        outputs = self.learners[name].score(batch)
        if name == "prm":
            return read_rewards(outputs, batch, self.config.prm)
        return outputs["logprob" if name == "policy" else "value"]


@dataclass
class Reference:
    """The frozen initial policy. prm_temperature: at which the PRM reads it; None where its rewards do not need it."""

    learner: Learner
    prm_temperature: float | None

    def write(self, batch: PackedBatch) -> None:
        """Write `ref_logprob`, at the policy's temperature, and `prm_ref_logprob`, at the PRM's."""
        logprob = self.learner.score(batch)["logprob"]
        batch.write("ref_logprob", logprob)
        if self.prm_temperature == self.learner.temperature:
            batch.write("prm_ref_logprob", logprob)
        elif self.prm_temperature is not None:
            batch.write("prm_ref_logprob", self.for_prm(batch))

    def complete(self, batch: PackedBatch) -> None:
        """Write `ref_logprob` of the sequences that lack it, such as experts beside rollouts."""
        values = torch.full((batch.num_response_tokens,), math.nan)
        if "ref_logprob" in batch.streams:
            values = batch.read("ref_logprob")
        missing = segment_sum(values, batch.response_cu_seqlens).isnan().nonzero()[:, 0].tolist()
        if missing:
            logprob = self.learner.score(batch.select(missing))["logprob"]
            values[batch.response_positions(missing)] = logprob
            batch.write("ref_logprob", values)

    def for_prm(self, batch: PackedBatch) -> Tensor:
        """log pi_ref of each response token [R] at the PRM's temperature."""
        return self.learner.score(batch, self.prm_temperature)["logprob"]
