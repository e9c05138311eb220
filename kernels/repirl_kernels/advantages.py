"""Leave-one-out advantages of packed rollouts, from outcome and process rewards.

Axes as in ``packed``: T tokens, S sequences.

Sources: RLOO, Ahmadian et al. 2024; rePIRL, Wu et al., ICML 2026.
"""

import torch
from torch import Tensor

from repirl_kernels.packed import (
    bucket_sum,
    check_finite,
    check_gamma,
    check_number,
    check_packed,
    dense_group_ids,
    returns_to_go,
    segment_mean,
    sequence_ids,
)


def rloo_advantages(
    outcome: Tensor | None,
    reward: Tensor | None,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    outcome_coefficient: float,
    process_coefficient: float,
    gamma: float = 1.0,
    whiten: bool = False,
) -> Tensor:
    """Leave-one-out advantages from outcome and process rewards, [T] (Ahmadian et al. 2024; rePIRL).

        A_o(i)   = R_o(i) - mean_{j != i} R_o(j)
        r~(i, t) = r(i, t) - mean_{j != i} mean_t r(j, t),    A_p(i, t) = sum_{t' >= t} gamma^(t'-t) r~(i, t')
        A        = outcome_coefficient A_o + process_coefficient A_p,   whitened over all tokens on request

    outcome [S], reward [T], group_ids [S]: sequences of one prompt share an id; j runs over the group. Either
    reward may be None where its coefficient is 0. Constant to autograd.

    ValueError where a sequence has no other in its group to be compared with (for process rewards: no other
    with tokens), as a baseline of 0 would silently mix raw rewards into the advantages; and for rewards or
    coefficients that are NaN or infinite.
    """
    check_packed(cu_seqlens, reward=reward)
    check_gamma(gamma)
    check_number("outcome_coefficient", outcome_coefficient)
    check_number("process_coefficient", process_coefficient)
    groups, num_groups = dense_group_ids(group_ids, cu_seqlens, "prompt")
    num_tokens = int(cu_seqlens[-1])
    ids = sequence_ids(cu_seqlens, num_tokens)
    lengths = cu_seqlens.diff().long()
    advantage = torch.zeros(num_tokens, dtype=torch.float64, device=cu_seqlens.device)
    dtypes = [torch.float32]
    if outcome_coefficient != 0.0:
        if outcome is None:
            raise ValueError(f"outcome_coefficient is {outcome_coefficient!r} but outcome is None")
        if outcome.shape != lengths.shape:
            raise ValueError(f"outcome must have shape [S] = {tuple(lengths.shape)}, got {tuple(outcome.shape)}")
        check_finite(outcome=outcome)
        everyone = torch.ones_like(groups, dtype=torch.bool)
        baseline = _others_mean(outcome.detach().double(), everyone, groups, num_groups, group_ids)
        advantage = advantage + outcome_coefficient * (outcome.detach().double() - baseline)[ids]
        dtypes.append(outcome.dtype)
    if process_coefficient != 0.0:
        if reward is None:
            raise ValueError(f"process_coefficient is {process_coefficient!r} but reward is None")
        check_finite(reward=reward)
        means = segment_mean(reward.detach().double(), cu_seqlens)
        baseline = _others_mean(means, lengths > 0, groups, num_groups, group_ids)
        centred = reward.detach().double() - baseline[ids]
        advantage = advantage + process_coefficient * returns_to_go(centred, cu_seqlens, gamma)
        dtypes.append(reward.dtype)
    if whiten and num_tokens > 0:
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    return advantage.to(torch.float64 if torch.float64 in dtypes else torch.float32)


def _others_mean(values: Tensor, counted: Tensor, groups: Tensor, num_groups: int, group_ids: Tensor) -> Tensor:
    """Mean of the other counted sequences of the group, [S]; 0 for a sequence that is not counted itself."""
    values = torch.where(counted, values, 0.0)
    others = bucket_sum(counted, groups, num_groups)[groups] - counted.double()
    lonely = (counted & (others == 0)).nonzero()[:, 0]
    if lonely.numel():
        raise ValueError(
            f"{lonely.numel()} sequences are alone in their group (first: sequence {int(lonely[0])}, group "
            f"{int(group_ids[lonely[0]])}): a leave-one-out baseline needs at least 2 rollouts a prompt"
        )
    total = bucket_sum(values, groups, num_groups)[groups] - values
    return torch.where(counted, total / others.clamp(min=1), 0.0)
