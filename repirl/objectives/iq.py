"""Inverse soft-Q learning on expert trajectories: behaviour cloning that also bounds the rewards of its logits.

The policy's logits are read as soft Q, their logsumexp as soft V, and Q(s_t, a_t) - gamma V(s_{t+1}) as the reward r_t,
with V = 0 after the end:

    loss_t = - f(r_t) + V(s_t) - gamma V(s_{t+1}),    f(x) = x - x^2 / (4 alpha)

As log pi(a_t | s_t) = Q(s_t, a_t) - V(s_t), this is - log pi(a_t | s_t) + r_t^2 / (4 alpha), for every gamma. Without
the square (`alpha: null`) it is behaviour cloning.

The loss needs no rollouts. Garg et al. also take the second part, V(s_t) - gamma V(s_{t+1}), over rollouts; with
gamma 1 its sum is V(prompt) for every response, so rollouts on the experts' prompts would not change it.

Source: Garg et al. 2021 (IQ-Learn, chi-square divergence); for language models Wulfmeier et al. 2024
(arXiv 2409.01369).
"""

from __future__ import annotations

import torch
from repirl_kernels import token_rewards
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs


class IQLearn(Objective):
    """The loss is the mean over all response tokens of the batch."""

    num_tokens: int

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch:
        return data.next_experts()

    def prepare(self, batch: PackedBatch) -> Metrics:
        self.num_tokens = batch.num_response_tokens
        return {}

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Figures, as means over all response tokens: `negative_logprob`, in nats, the loss of behaviour cloning;
        `reward`, r_t; `reward_square`, r_t^2."""
        logprob, config = outputs["logprob"], self.config.iq
        reward = token_rewards(
            "soft_q",
            target_logit=outputs["target_logit"],
            logsumexp=outputs["logsumexp"],
            cu_seqlens=micro.response_cu_seqlens.to(logprob.device),
            gamma=config.gamma,
        )
        loss = -logprob if config.alpha is None else reward.square() / (4 * config.alpha) - logprob
        tokens = {"negative_logprob": -logprob, "reward": reward, "reward_square": reward.square()}
        figures = {name: (x.detach().sum(dtype=torch.float64), micro.num_response_tokens) for name, x in tokens.items()}
        return loss.sum() / self.num_tokens, figures
