"""Direct Q-function optimisation: the policy's log-ratios are soft Q, a critic is soft V.

With k_t = beta (log pi - log pi_ref) the optimal policy of the KL-regularised token process has the soft Q-function
k_t + V(s_t). With the outcome as reward of the last token, V = 0 after it, and no discount:

    G_t = r_t - k_t + (1 - lambda) V(s_{t+1}) + lambda G_{t+1}
    L_V = mean over responses of mean over tokens of (V(s_t) - G_t)^2
    L_Q = mean over responses of mean over tokens of (k_t + V(s_t) - (G_t + k_t))^2

where the sum G_t + k_t holds no k_t, only those of later tokens. G, and in L_Q also V, are constants: L_V trains the
critic and L_Q the policy, each with its own optimiser. lambda 1 is OREO, lambda 0 the residual of one step.

Sources: Ji et al. 2024 (DQO); Wang et al. 2024 (OREO), with the same losses at lambda 1 and 0.
"""

from __future__ import annotations

import torch
from repirl_kernels import returns_to_go, segment_mean, segment_sum
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import Config
from repirl.data import Data
from repirl.objectives import Figures, Metrics, Objective, Outputs

# Of the importance weight of a response.
MAX_LOG_WEIGHT = 1.0


def lambda_returns(gain: Tensor, value: Tensor, cu_seqlens: Tensor, td_lambda: float) -> Tensor:
    """G_t = y_t + (1 - lambda) V(s_{t+1}) + lambda G_{t+1}, with V and G 0 after the last token.

    Args:
        gain: [R] y_t, the reward of each token.
        value: [R] V(s_t), of the state before each token.
        cu_seqlens: [S+1] of the responses.
        td_lambda: lambda, in [0, 1].

    Returns:
        [R].
    """
    following = torch.cat([value[1:], value.new_zeros(min(1, value.numel()))])
    following[cu_seqlens[1:][cu_seqlens.diff() > 0] - 1] = 0.0
    return returns_to_go(gain + (1 - td_lambda) * following, cu_seqlens, td_lambda)


class _DQO(Objective):
    """What both updates have in common: the batch, the rewards, and how residuals are averaged."""

    num_sequences: int

    @classmethod
    def needs_reference(cls, config: Config) -> bool:
        return True

    def select(self, rollouts: PackedBatch | None, data: Data) -> PackedBatch | None:
        """All rollouts, of this turn or of the data."""
        return rollouts

    def prepare(self, batch: PackedBatch) -> Metrics:
        self.num_sequences = batch.num_sequences
        assert bool(batch.outcome.isfinite().all()), "outcomes are what the system's row asks for"
        return {"outcome": float(batch.outcome.mean())}

    def _returns(self, k: Tensor, value: Tensor, micro: PackedBatch) -> Tensor:
        """G_t of each token [R], without a gradient. k: [R] k_t. value: [R] V(s_t)."""
        cu_seqlens = micro.response_cu_seqlens.to(k.device)
        gain = -k.detach()
        gain[cu_seqlens[1:] - 1] += micro.outcome.to(gain)
        return lambda_returns(gain, value.detach(), cu_seqlens, self.config.dqo.td_lambda)

    def _k(self, logprob: Tensor, micro: PackedBatch) -> Tensor:
        return self.config.dqo.beta * (logprob - micro.read("ref_logprob").to(logprob.device))

    def _mean(self, values: Tensor, micro: PackedBatch, weight: Tensor | None) -> Tensor:
        """The micro-batch's share of the mean over responses of the mean over tokens.

        Args:
            values: [R].
            micro: the micro-batch.
            weight: [S] of each response; None for 1.
        """
        means = segment_mean(values, micro.response_cu_seqlens.to(values.device))
        return (means if weight is None else means * weight).sum() / self.num_sequences

    def _weight(self, logprob: Tensor, micro: PackedBatch) -> Tensor | None:
        """min(e, pi / mu) of each response [S], without a gradient; None where the option is off."""
        if not self.config.dqo.importance_weights:
            return None
        log_ratio = logprob.detach() - micro.read("old_logprob").to(logprob.device)
        return segment_sum(log_ratio, micro.response_cu_seqlens.to(logprob.device)).clamp(max=MAX_LOG_WEIGHT).exp()


class CriticDQO(_DQO):
    """L_V: the critic on lambda-returns of the present policy."""

    @property
    def reads_learners(self) -> tuple[str, ...]:
        return ("policy",)

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Reads `logprob`, `ref_logprob` and, with importance weights, `old_logprob`. Figures: `value`, `target`."""
        value = outputs["value"]
        logprob = micro.read("logprob").to(value.device)
        target = self._returns(self._k(logprob, micro), value, micro)
        figures = {
            "value": (value.detach().sum(dtype=torch.float64), micro.num_response_tokens),
            "target": (target.sum(dtype=torch.float64), micro.num_response_tokens),
        }
        return self._mean((value - target) ** 2, micro, self._weight(logprob, micro)), figures


class PolicyDQO(_DQO):
    """L_Q: the policy on lambda-returns of the present critic, and a KL term."""

    @property
    def reads_learners(self) -> tuple[str, ...]:
        return ("critic",)

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """Reads `state_value`, `ref_logprob` and, with importance weights or a KL term, `old_logprob`.

        Figures: `log_ratio`, the mean of log pi - log pi_ref over response tokens; `kl_reference`, the KL term.
        """
        logprob = outputs["logprob"]
        value = micro.read("state_value").to(logprob.device)
        k = self._k(logprob, micro)
        target = self._returns(k, value, micro) + k.detach()
        total = self._mean((k + value - target) ** 2, micro, self._weight(logprob, micro))
        count = micro.num_response_tokens
        figures = {"log_ratio": (k.detach().sum(dtype=torch.float64) / self.config.dqo.beta, count)}
        if self.config.dqo.kl_coefficient != 0:
            kl = self._kl(logprob, micro)
            figures["kl_reference"] = (kl.detach().sum(dtype=torch.float64), count)
            total = total + self.config.dqo.kl_coefficient * self._mean(kl, micro, None)
        return total, figures

    def _kl(self, logprob: Tensor, micro: PackedBatch) -> Tensor:
        """An estimate of KL(pi, pi_ref) at each state, [R], from the token that mu sampled there.

        (pi / mu) (log(pi / pi_ref) + pi_ref / pi - 1) has the mean KL(pi, pi_ref) under mu, and its gradient the
        gradient of that: the estimate is unbiased, and no distribution over the vocabulary is kept.
        """
        log_ratio = logprob - micro.read("ref_logprob").to(logprob.device)
        weight = (logprob - micro.read("old_logprob").to(logprob.device)).exp()
        return weight * (log_ratio + (-log_ratio).exp() - 1)
