"""A PRM learns labels of steps: cross-entropy at the steps' last tokens, and nowhere else.

Source: Math-Shepherd (Wang et al. 2024). Its PRM predicts one of two tokens at a tag behind each step; a head with one
output is the same, with the difference of the two logits as its output.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from repirl.batch import PackedBatch
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs


class StepLabels(Objective):
    """The mean over the labelled steps of the whole batch of -[y log p + (1 - y) log(1 - p)], p = sigmoid(output)."""

    num_labels: int

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch:
        return data.next_steps()

    def prepare(self, batch: PackedBatch) -> Metrics:
        """Reads `step_label`. Reports `right`: the mean of the labels."""
        labels = batch.read("step_label")
        labels = labels[~labels.isnan()]
        self.num_labels = labels.numel()
        return {"steps": self.num_labels, "right": float(labels.mean())}

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Reads `step_label`. Figures, as means over labelled steps: `accuracy`, the share of steps that the PRM takes
        for what their labels say (both rounded)."""
        logits, labels = step_logits(outputs["value"], micro)
        losses = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        right = ((logits > 0) == (labels >= 0.5)).sum()
        return losses / self.num_labels, {"accuracy": (right, labels.numel())}


def step_logits(values: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The outputs at the labelled steps' last tokens, and the labels there.

    Args:
        values: [R], the PRM's outputs.
        batch: with the stream `step_label`.

    Returns:
        Two tensors with an entry for each labelled step.
    """
    labels = batch.read("step_label").to(values.device)
    labelled = ~labels.isnan()
    return values[labelled], labels[labelled]
