"""Writes into a batch what the present learners say of it, for the objectives that read it."""

from __future__ import annotations

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
