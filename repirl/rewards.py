"""Computes a PRM's token rewards from the outputs of its network."""

from __future__ import annotations

from repirl_kernels import token_rewards
from torch import Tensor

from repirl.batch import PackedBatch
from repirl.options import PRMConfig


def read_rewards(outputs: dict[str, Tensor], batch: PackedBatch, config: PRMConfig) -> Tensor:
    """The reward r_t of every response token, by the definition that `config.reward` names.

    Args:
        outputs: the PRM's outputs for the batch, from `Learner.score` or from a forward pass with gradients.
        batch: the batch. Rewards of kind `implicit` read its stream `prm_ref_logprob`, or `old_logprob` where they are
            relative to the policy that sampled.
        config: the kind of reward, gamma, beta and the reference.

    Returns:
        [R] float32, differentiable with respect to `outputs`.
    """
    reference = None
    if config.reward == "implicit":
        stream = "prm_ref_logprob" if config.reference == "start" else "old_logprob"
        reference = batch.read(stream).to(outputs["logprob"].device)
    return token_rewards(
        config.reward,
        **{name: outputs.get(name) for name in ("value", "logprob", "logsumexp", "target_logit")},
        ref_logprob=reference,
        cu_seqlens=batch.response_cu_seqlens.to(next(iter(outputs.values())).device),
        gamma=config.gamma,
        beta=config.beta,
    )
