"""How a PRM's token rewards are read off what its network says."""

from __future__ import annotations

from repirl_kernels import token_rewards
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.config import PRMConfig


def read_rewards(outputs: dict[str, Tensor], batch: PackedBatch, config: PRMConfig) -> Tensor:
    """r_t of every response token [R] float32, by `config.reward`.

    Args:
        outputs: what the PRM said of the batch (Learner.score, or a forward pass with gradients).
        batch: `implicit` rewards read its stream `prm_ref_logprob`.
        config: kind of reward, gamma and beta.
    """
    reference = None
    if config.reward == "implicit":
        reference = batch.read("prm_ref_logprob").to(outputs["logprob"].device)
    return token_rewards(
        config.reward,
        **{name: outputs.get(name) for name in ("value", "logprob", "logsumexp", "target_logit")},
        ref_logprob=reference,
        cu_seqlens=batch.response_cu_seqlens.to(next(iter(outputs.values())).device),
        gamma=config.gamma,
        beta=config.beta,
    )
