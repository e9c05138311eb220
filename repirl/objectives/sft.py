"""Supervised fine-tuning, which is behaviour cloning of the experts: the mean of -log pi over expert tokens."""

from __future__ import annotations

from torch import Tensor

from repirl.batch import PackedBatch
from repirl.learner import LossFunction, Outputs


def loss(experts: PackedBatch) -> LossFunction:
    """Normalised by the whole batch's number of response tokens."""
    num_tokens = experts.num_response_tokens

    def loss_function(outputs: Outputs, micro: PackedBatch) -> Tensor:
        return -outputs["logprob"].sum() / num_tokens

    return loss_function
