"""Policy update on preference pairs: DPO and its variants, from a file or from verified rollouts.

The loss of a pair needs the sums of log-probabilities of both its responses. As in `objectives/irl.py` there are two
passes: the first computes, from the sums of the whole batch, one constant for each token; in the second the loss is
linear in the log-probabilities, with these constants as coefficients. So both responses of a pair need not be in one
micro-batch, and the gradient is still that of the loss of the whole batch.

Sources: Rafailov et al. 2023 (DPO); Azar et al. 2023 (IPO); Mitchell 2023 (label smoothing, cDPO); Pang et al. 2024
(the term of supervised fine-tuning, RPO).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from repirl_kernels import segment_mean, segment_sum
from torch import Tensor

from repirl.batch import PackedBatch, concatenate
from repirl.config import Config
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs
from repirl.options import DPOConfig


def preference_losses(chosen: Tensor, rejected: Tensor, config: DPOConfig) -> Tensor:
    """The loss of each pair, without the term of supervised fine-tuning.

    With the difference D = chosen - rejected and e = label_smoothing:

        sigmoid, sigmoid_norm:  - (1 - e) log sigmoid(beta D) - e log sigmoid(- beta D)
        ipo:                    (D - 1 / (2 beta))^2

    Args:
        chosen: [P] log pi - log pi_ref of the chosen responses, summed over tokens; for `ipo` and `sigmoid_norm` their
            means over tokens.
        rejected: [P] the same of the rejected responses.
        config: the options.

    Returns:
        [P].
    """
    difference = chosen - rejected
    if config.loss == "ipo":
        return (difference - 1 / (2 * config.beta)) ** 2
    e, logits = config.label_smoothing, config.beta * difference
    return -(1 - e) * F.logsigmoid(logits) - e * F.logsigmoid(-logits)


class DPO(Objective):
    """Updates on pairs of a file."""

    value: float
    num_tokens: int

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return not config.dpo.reference_free

    @property
    def reads_reference(self) -> bool:
        return not self.config.dpo.reference_free

    @property
    def reads_learners(self) -> tuple[str, ...]:
        return ("policy",)

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        """The chosen responses of the next pairs, then the rejected ones in the same order."""
        return data.next_pairs()

    def prepare(self, batch: PackedBatch) -> Metrics:
        """The first pass: reads `logprob` and `ref_logprob`, writes `coefficient`, dL/d log pi of each token.

        Returns:
            `chosen_reward` and `rejected_reward`: beta times the log-ratios that the loss compares, apart, since both
            may fall while their `margin` grows; `accuracy`: the share of pairs whose chosen response has the higher
            one (ties count half); `chosen_logprob`: mean of log pi over the chosen responses' tokens; `pairs`.
        """
        config, cu_seqlens = self.config.dpo, batch.response_cu_seqlens
        logprob = batch.read("logprob").double().requires_grad_()
        reference = torch.zeros(()) if config.reference_free else batch.read("ref_logprob").double()
        over_tokens = segment_sum if config.loss == "sigmoid" else segment_mean
        chosen, rejected = over_tokens(logprob - reference, cu_seqlens).chunk(2)
        likelihood = segment_mean(logprob, cu_seqlens).chunk(2)[0]
        with torch.enable_grad():
            loss = preference_losses(chosen, rejected, config).mean() - config.sft_coefficient * likelihood.mean()
            [coefficient] = torch.autograd.grad(loss, logprob)
        batch.write("coefficient", coefficient)
        self.value, self.num_tokens = float(loss.detach()), batch.num_response_tokens
        rewards = config.beta * torch.stack([chosen, rejected]).detach()
        margin = rewards[0] - rewards[1]
        return {
            "chosen_reward": float(rewards[0].mean()),
            "rejected_reward": float(rewards[1].mean()),
            "margin": float(margin.mean()),
            "accuracy": float((margin.sign() / 2 + 0.5).mean()),
            "chosen_logprob": float(likelihood.detach().mean()),
            "pairs": margin.numel(),
        }

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """The second pass. Its gradient is that of the sum of coefficient * log pi; its value is the share of the loss
        that the micro-batch has by its tokens."""
        logprob = outputs["logprob"]
        coefficient = micro.read("coefficient").to(logprob.device)
        change = (coefficient * (logprob - logprob.detach())).sum()
        return change + self.value * micro.num_response_tokens / self.num_tokens, {}


class OnlineDPO(DPO):
    """Updates on pairs of this turn's rollouts."""

    num_prompts: int

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        """A pair of each prompt that has one, packed as in `DPO.select`."""
        assert rollouts is not None
        self.num_prompts = rollouts.group_ids.unique().numel()
        return verified_pairs(rollouts, data)

    def prepare(self, batch: PackedBatch) -> Metrics:
        metrics = super().prepare(batch)
        return metrics | {"prompts_without_pair": self.num_prompts - int(metrics["pairs"])}


def verified_pairs(rollouts: PackedBatch, data: Data) -> PackedBatch | None:
    """At most one pair a prompt: a right response and a wrong rollout of the same prompt.

    The right one is a rollout that was verified or, where no rollout of the prompt is right, an expert's solution to
    it. Of several the first is taken; rollouts of a prompt have no order.

    Args:
        rollouts: with outcomes.
        data: its experts, where it has any.

    Returns:
        The right responses, then the wrong ones in the same order; None where no prompt has both.
    """
    is_right = rollouts.outcome > 0.5
    rights, wrongs = _first_of_groups(rollouts, is_right), _first_of_groups(rollouts, ~is_right)
    pairs = {group: (right, wrongs[group]) for group, right in rights.items() if group in wrongs}
    chosen, rejected = [right for right, _ in pairs.values()], [wrong for _, wrong in pairs.values()]
    parts = [rollouts.select(chosen)] if chosen else []
    unsolved = [wrong for group, wrong in wrongs.items() if group not in rights]
    if data.experts is not None and unsolved:
        solutions = data.experts.matching(rollouts.select(unsolved))
        if solutions is not None:
            firsts = _first_of_groups(solutions, torch.ones(solutions.num_sequences, dtype=torch.bool))
            parts.append(solutions.select([*firsts.values()]))
            rejected += [wrongs[group] for group in firsts]
    return concatenate([*parts, rollouts.select(rejected)]) if parts else None


def _first_of_groups(batch: PackedBatch, mask: Tensor) -> dict[int, int]:
    """Group -> index of the first of its sequences for which `mask` [S] holds."""
    firsts: dict[int, int] = {}
    for index in mask.nonzero()[:, 0].tolist():
        firsts.setdefault(int(batch.group_ids[index]), index)
    return firsts
