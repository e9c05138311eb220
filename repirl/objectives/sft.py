"""Supervised fine-tuning, which is behaviour cloning of the experts: the mean of -log pi over expert tokens."""

from __future__ import annotations

from torch import Tensor

from repirl.batch import PackedBatch
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs


class SFT(Objective):
    """The loss is divided by the number of response tokens in the whole batch."""

    num_tokens: int

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch:
        return data.next_experts()

    def prepare(self, batch: PackedBatch) -> Metrics:
        self.num_tokens = batch.num_response_tokens
        return {}

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        return -outputs["logprob"].sum() / self.num_tokens, {}
