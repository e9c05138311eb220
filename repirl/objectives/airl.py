"""A discriminator as PRM: the reward of a token is the logit of its being an expert's, and the policy is paid in it.

There are no partition function and no importance weights: the PRM tells the experts' tokens from the rollouts', in one
pass. Otherwise the sides are those of `objectives.irl`.

Source: Ho and Ermon 2016 (GAIL); Fu et al. 2018 (AIRL); Fanconi et al. 2025 (arXiv 2510.01857) for language models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repirl.batch import EXPERT, PackedBatch
from repirl.config import Config
from repirl.objectives import Figures, Metrics, Outputs
from repirl.objectives.irl import IRL
from repirl.objectives.rloo import RLOO
from repirl.rewards import read_rewards


class AIRL(IRL):
    """Updates of the PRM on experts and rollouts. Of the options of `irl` it reads those that choose the sides
    (`experts`, `experts_per_step`, `use_outcome`), `gate` and `reward_l2` (null: 0).

    With x_t = r_t, or r_t - log mu_t with `discriminator.subtract_logprob`, and a mean over the tokens of each response
    first, over the responses of a side then:

        bce     1/2 mean over experts of softplus(-x_t) + 1/2 mean over rollouts of softplus(x_t)
        wgan    mean over rollouts of r_t - mean over experts of r_t
    """

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return False

    @property
    def reads_rewards(self) -> bool:
        # The loss does not, but the gate does.
        return self.config.gate_threshold is not None

    @property
    def reads_learners(self) -> tuple[str, ...]:
        # Experts come without log-probabilities under the policy.
        return (*super().reads_learners, *["policy"] * self.config.discriminator.subtract_logprob)

    def prepare(self, batch: PackedBatch) -> Metrics:
        """Writes `loss_weight`, each token's share in the mean of its side."""
        self.num_tokens = batch.num_response_tokens
        lengths, is_expert = batch.response_cu_seqlens.diff(), batch.source == EXPERT
        num_experts = is_expert.sum()
        side = torch.where(is_expert, num_experts, batch.num_sequences - num_experts)
        batch.write("loss_weight", (1 / (side * lengths.clamp(min=1)).double()).repeat_interleave(lengths))
        return {}

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Figures, as means over the tokens of one side: `expert_reward` and `rollout_reward`; `expert_accuracy` and
        `rollout_accuracy`, the share on the right side of x_t = 0."""
        config, reward = self.config.discriminator, read_rewards(outputs, micro, self.config.prm)
        weight = micro.read("loss_weight").to(reward)
        is_expert = (micro.source == EXPERT).repeat_interleave(micro.response_cu_seqlens.diff()).to(reward.device)
        logit = reward - micro.read("logprob").to(reward) if config.subtract_logprob else reward
        sign = torch.where(is_expert, -1.0, 1.0)
        tokens = sign * logit if config.loss == "wgan" else F.softplus(sign * logit) / 2
        reward_l2 = self.config.irl.reward_l2 or 0.0
        loss = (weight * tokens).sum() + reward_l2 * reward.square().sum() / self.num_tokens
        figures: Figures = {}
        for name, mine, right in (("expert", is_expert, logit > 0), ("rollout", ~is_expert, logit < 0)):
            count = int(mine.sum())
            figures[f"{name}_reward"] = (reward.detach()[mine].sum(dtype=torch.float64), count)
            figures[f"{name}_accuracy"] = (right[mine].sum(), count)
        return loss, figures


class ClippedRLOO(RLOO):
    """The policy's updates, with each reward cut to at most `discriminator.reward_clip` from 0."""

    def prepare(self, batch: PackedBatch) -> Metrics:
        clip = self.config.discriminator.reward_clip
        if clip is not None and self.reads_rewards:
            batch.write("reward", batch.read("reward").clamp(-clip, clip))
        return super().prepare(batch)
