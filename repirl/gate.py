"""The gate: the policy waits while the PRM cannot tell experts from rollouts that it has not seen.

The rewards of a new PRM are noise at first, and those of a PRM whose policy has caught up with the experts are noise
again. AdamW makes a full step of any gradient, so a policy that is trained on noise, or on its entropy bonus alone,
unlearns what it knew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from repirl.batch import EXPERT, PackedBatch
from repirl.config import Config

Metrics = dict[str, float]


class Gate:
    """Decides in each turn whether the policy may follow the PRM.

    z (`separation`) is measured on the batch of each turn before the PRM's first update on it. The gate is closed if z
    is below the threshold, or cannot be measured. With `order: policy_first` the z of the turn before decides. A closed
    gate sets the PRM's rewards to 0 for a policy that has an outcome reward. A policy without one makes no update, as
    only the entropy bonus would be left; with `irl.gate_full` its learning rate grows with z once the gate opens. No
    policy makes an update in the first `prm.warmup_turns` turns.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: Config) -> None:
        self.threshold, self.full = config.gate_threshold, config.irl.gate_full
        self.warmup_turns = config.prm.warmup_turns
        self.has_outcome = config.loss.outcome_coefficient > 0
        self.lags = config.order == "policy_first"
        self.z = math.nan
        self._z_before = math.nan
        self._warming_up = False

    def begin(self, turn: int) -> None:
        """Call this at the start of each turn; turn: from 0."""
        self._z_before, self.z = self.z, math.nan
        self._warming_up = turn < self.warmup_turns

    def look(self, name: str, batch: PackedBatch) -> None:
        """Measure z, or take the rewards away; call this before each update, when the rewards are written.

        Args:
            name: the learner that is about to be updated.
            batch: its batch, with the stream `reward`.
        """
        if self.threshold is None or "reward" not in batch.streams:
            return
        if name == "prm" and math.isnan(self.z):
            self.z = separation(batch.read("reward"), batch)
        elif name == "policy" and self.closed:
            batch.write("reward", torch.zeros(batch.num_response_tokens))

    @property
    def deciding_z(self) -> float:
        """The z that decides about this turn; NaN if none was measured."""
        return self._z_before if self.lags else self.z

    @property
    def factor(self) -> float:
        """How far the gate is open in this turn, from 0, closed, to 1.

            clip((z - gate) / (gate_full - gate), 0, 1)

        of the deciding z, with `gate_full`; without it 1 if z >= gate, else 0.
        """
        if self.threshold is None:
            return 1.0
        if not self.deciding_z >= self.threshold:
            return 0.0
        if self.full is None:
            return 1.0
        return min((self.deciding_z - self.threshold) / (self.full - self.threshold), 1.0)

    @property
    def closed(self) -> bool:
        """Whether the policy must not follow the PRM's rewards."""
        return self.factor == 0.0

    def rate(self, name: str) -> float:
        """The share of its learning rate that a learner has in this turn; with 0 it makes no update."""
        if name != "policy":
            return 1.0
        if self._warming_up:
            return 0.0
        return 1.0 if self.has_outcome else self.factor

    def metrics(self) -> Metrics:
        """`held`: 1 if the policy did not follow the PRM in this turn; `gate_z`, if it was measured; `gate_factor`, the
        share of its learning rate that it had, if there is such a thing (`irl.gate_full`)."""
        if self.threshold is None and not self.warmup_turns:
            return {}
        metrics = {"policy/held": float(self._warming_up or self.closed)}
        if not math.isnan(self.deciding_z):
            metrics["policy/gate_z"] = self.deciding_z
        if self.full is not None:
            metrics["policy/gate_factor"] = self.rate("policy")
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The z that was measured last."""
        return {"z": self.z}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a state that `state_dict` returned; None is that of a run without a gate."""
        self.z = math.nan if state is None else float(state["z"])


def separation(reward: Tensor, batch: PackedBatch) -> float:
    """How well rewards tell the experts of a batch from its rollouts, in standard errors (Welch 1947).

        z = (mean_E - mean_P) / sqrt(var_E / n_E + var_P / n_P)

    of mean rewards per response token. A prompt counts once on each side, with the mean over its responses there:
    responses to one prompt are not independent.

    Args:
        reward: [R], of the batch's response tokens.
        batch: the sequences, experts by `source`.

    Returns:
        z; 0 where all rewards are equal, NaN where a side has fewer than two prompts.
    """
    lengths = batch.response_cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(batch.num_sequences), lengths)
    totals = torch.zeros(batch.num_sequences, dtype=torch.float64).index_add(0, sequence, reward.double().cpu())
    means = totals / lengths.clamp(min=1)
    is_expert = batch.source == EXPERT
    experts = _group_means(means[is_expert], batch.group_ids[is_expert])
    rollouts = _group_means(means[~is_expert], batch.group_ids[~is_expert])
    if experts.numel() < 2 or rollouts.numel() < 2:
        return math.nan
    difference = float(experts.mean() - rollouts.mean())
    variance = float(experts.var() / experts.numel() + rollouts.var() / rollouts.numel())
    if variance == 0.0:
        return 0.0 if difference == 0.0 else math.copysign(math.inf, difference)
    return difference / math.sqrt(variance)


def _group_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean of the values [S] of each group [G]."""
    _, index, count = groups.unique(return_inverse=True, return_counts=True)
    return torch.zeros(count.numel(), dtype=values.dtype).index_add(0, index, values) / count
