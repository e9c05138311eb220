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
    """Leave-one-out advantages from outcome and process rewards.

    For token t of sequence i, with j over the other sequences of its group:

        A_o(i)   = R_o(i) - mean_j R_o(j)
        r~(i, t) = r(i, t) - mean_j mean_t' r(j, t')          (over those j that have tokens)
        A_p(i,t) = sum_{t' >= t} gamma^(t'-t) r~(i, t')
        A(i, t)  = outcome_coefficient A_o(i) + process_coefficient A_p(i, t)

    Args:
        outcome: ``[S]``, R_o; may be ``None`` where its coefficient is 0.
        reward: ``[T]``, r; may be ``None`` where its coefficient is 0.
        cu_seqlens: ``[S+1]``.
        group_ids: ``[S]`` integers; sequences of one prompt share an id.
        outcome_coefficient, process_coefficient: finite numbers; 0 leaves the part out.
        gamma: the discount, in [0, 1].
        whiten: subtract the mean over all tokens and divide by the standard deviation (of the N tokens, not N - 1).

    Returns:
        ``[T]``, constant to autograd; float64 if a reward that takes part is, else float32.

    Raises:
        TypeError, ValueError: as :func:`repirl_kernels.packed.check_packed`.
        ValueError: a sequence is alone in its group (for process rewards: the only one with tokens). Nothing can be its
            baseline then, and with a baseline of 0 its raw reward would be taken for an advantage.
        ValueError: a reward or a coefficient is NaN or infinite, a reward that takes part is ``None`` or has a wrong
            shape, or ``gamma`` is outside [0, 1].

    Sources: RLOO, Ahmadian et al. 2024; rePIRL, Wu et al., ICML 2026.
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
    """Mean of the values of the other sequences in the group.

    Args:
        values: ``[S]``.
        counted: ``[S]`` bool, the sequences that take part.
        groups: ``[S]``, ids from 0 to ``num_groups`` - 1.
        num_groups: how many groups there are.
        group_ids: ``[S]``, the caller's ids, for the error message.

    Returns:
        ``[S]`` float64; 0 for a sequence that does not take part.

    Raises:
        ValueError: a sequence that takes part has no other in its group.
    """
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
