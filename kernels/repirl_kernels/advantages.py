"""Advantages of packed rollouts, from outcome and process rewards.

Axes as in ``packed``: T tokens, S sequences.

Sources: RLOO, Ahmadian et al. 2024; GRPO, Shao et al. 2024; Dr. GRPO, Liu et al. 2025; PRIME, Cui et al. 2025; PURE,
Cheng et al. 2025; REINFORCE++, Hu 2025; rePIRL, Wu et al., ICML 2026.
"""

import torch
from torch import Tensor

from repirl_kernels.packed import (
    bucket_logsumexp,
    bucket_sum,
    check_choice,
    check_finite,
    check_gamma,
    check_number,
    check_packed,
    dense_group_ids,
    max_length,
    returns_to_go,
    segment_mean,
    sequence_ids,
    token_positions,
)

BASELINES = ("group", "position", "none")
SCALES = ("none", "group", "batch")
PROCESS_NORMS = ("none", "return", "std")
CREDITS = ("sum", "min")

# Added to a divisor that may be 0.
_EPSILON = 1e-6


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
    baseline: str = "group",
    leave_one_out: bool = True,
    scale: str = "none",
    process_norm: str = "none",
    process_std_floor: float = 0.1,
    credit: str = "sum",
    credit_temperature: float = 0.1,
    old_logprob: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> Tensor:
    """Advantages from outcome and process rewards, with a baseline from the other responses to the same prompt.

    With the default options, for token t of sequence i, with j over the other sequences of its group:

        A_o(i)   = R_o(i) - mean_j R_o(j)
        r~(i, t) = r(i, t) - mean_j mean_t' r(j, t')          (over those j that have tokens)
        A_p(i,t) = sum_{t' >= t} gamma^(t'-t) r~(i, t')
        A(i, t)  = outcome_coefficient A_o(i) + process_coefficient A_p(i, t)

    The other options, in the order in which they act:

    - `credit` "min" (PURE): r becomes r softmax(-r / credit_temperature), the softmax over the tokens of a sequence, so
      that the sum of a sequence is about its smallest reward.
    - `process_norm` "return" (PRIME): r is divided by (max over i, t of |sum_{t' >= t} r(i, t')| + 1e-6).
    - `old_logprob` with an `entropy_coefficient` b other than 0: the reward -b old_logprob is another process reward,
      with a baseline like r and the coefficient 1. Its expected sum is b times the entropy of the policy pi_old.
    - `leave_one_out` False (GRPO): the means over j include i itself, in A_o and in r~.
    - `baseline` "position": the baseline of r(i, t) is the mean of r(j, t) over those j with more than t tokens, and
      as above if there is none. A_o is unchanged. "none": no baseline, in A_o and in r~.
    - `scale` "group" (GRPO): A_o is divided by the standard deviation of R_o over the group + 1e-6; "batch": over all
      sequences. A_p is not scaled.
    - `process_norm` "std": the part of A_p that comes from r is divided by its standard deviation over all tokens, or
      by `process_std_floor` if that is larger, so that the noise of an untrained reward model stays small.
    - `whiten`: A is shifted to mean 0 over all tokens and divided by sqrt(variance + 1e-8).

    All standard deviations and variances are the unbiased ones (of n - 1).

    Args:
        outcome: ``[S]``, R_o; may be ``None`` if its coefficient is 0.
        reward: ``[T]``, r; may be ``None`` if its coefficient is 0.
        cu_seqlens: ``[S+1]``.
        group_ids: ``[S]`` integers; sequences of one prompt share an id.
        outcome_coefficient, process_coefficient: finite numbers; with 0 the term is left out.
        gamma: the discount, in [0, 1].
        whiten: as above.
        baseline: "group", "position" or "none".
        leave_one_out: as above.
        scale: "none", "group" or "batch".
        process_norm: "none", "return" or "std".
        process_std_floor: positive.
        credit: "sum" or "min".
        credit_temperature: positive.
        old_logprob: ``[T]``, log pi_old, in nats; may be ``None`` if `entropy_coefficient` is 0.
        entropy_coefficient: a finite number.

    Returns:
        ``[T]``, constant to autograd; float64 if one of the rewards that are used is, else float32.

    Raises:
        TypeError, ValueError: as :func:`repirl_kernels.packed.check_packed`.
        ValueError: a sequence is alone in its group (for process rewards: the only one with tokens). It has no
            baseline, and a baseline of 0 would make its raw reward the advantage. ``baseline="none"`` accepts it.
        ValueError: a reward or a coefficient is NaN or infinite, a reward that is used is ``None`` or has a wrong
            shape, or an option is out of range.

    Sources: RLOO, Ahmadian et al. 2024; rePIRL, Wu et al., ICML 2026; those of the options: see the module.
    """
    check_packed(cu_seqlens, reward=reward, old_logprob=old_logprob)
    check_gamma(gamma)
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    check_choice("process_norm", process_norm, PROCESS_NORMS)
    check_choice("credit", credit, CREDITS)
    coefficients = {"outcome_coefficient": outcome_coefficient, "process_coefficient": process_coefficient}
    for name, value in (coefficients | {"entropy_coefficient": entropy_coefficient}).items():
        check_number(name, value)
    groups = _Groups(cu_seqlens, group_ids, baseline, leave_one_out)
    advantage = torch.zeros(groups.num_tokens, dtype=torch.float64, device=cu_seqlens.device)
    used = []
    if outcome_coefficient != 0.0:
        if outcome is None:
            raise ValueError(f"outcome_coefficient is {outcome_coefficient!r} but outcome is None")
        if outcome.shape != groups.lengths.shape:
            raise ValueError(f"outcome must have shape [S] = {tuple(groups.lengths.shape)}, got {tuple(outcome.shape)}")
        check_finite(outcome=outcome)
        advantage = advantage + outcome_coefficient * _outcome_advantage(outcome, groups, scale)[groups.ids]
        used.append(outcome)
    if process_coefficient != 0.0:
        if reward is None:
            raise ValueError(f"process_coefficient is {process_coefficient!r} but reward is None")
        check_finite(reward=reward)
        shaped = reward.detach().double()
        if credit == "min":
            shaped = min_credit(shaped, cu_seqlens, credit_temperature)
        if process_norm == "return":
            shaped = normalize_returns(shaped, cu_seqlens)
        process = returns_to_go(shaped - groups.token_baseline(shaped), cu_seqlens, gamma)
        if process_norm == "std":
            process = process / _variance(process).sqrt().clamp(min=_positive("process_std_floor", process_std_floor))
        advantage = advantage + process_coefficient * process
        used.append(reward)
    if entropy_coefficient != 0.0:
        if old_logprob is None:
            raise ValueError(f"entropy_coefficient is {entropy_coefficient!r} but old_logprob is None")
        check_finite(old_logprob=old_logprob)
        surprise = -entropy_coefficient * old_logprob.detach().double()
        advantage = advantage + returns_to_go(surprise - groups.token_baseline(surprise), cu_seqlens, gamma)
        used.append(old_logprob)
    if whiten:
        advantage = whitened(advantage)
    return advantage.to(torch.float64 if torch.float64 in [values.dtype for values in used] else torch.float32)


def whitened(values: Tensor) -> Tensor:
    """Values ``[T]`` shifted to mean 0 and divided by sqrt(their unbiased variance + 1e-8).

    Source: the advantages of TRL, verl and PRIME.
    """
    if values.numel() == 0:
        return values
    return (values - values.mean()) / (_variance(values) + 1e-8).sqrt()


def normalize_returns(reward: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Rewards ``[T]`` divided by the largest |return to go| of the batch + 1e-6, so that no return is larger than 1.

    The returns are not discounted. Source: ``batch_norm`` of PRIME, Cui et al. 2025.
    """
    if reward.numel() == 0:
        return reward
    return reward / (returns_to_go(reward, cu_seqlens).abs().max() + _EPSILON)


def min_credit(reward: Tensor, cu_seqlens: Tensor, temperature: float = 0.1) -> Tensor:
    """Rewards ``[T]`` times softmax(-reward / temperature) over each sequence: r' = softmax(-r / temperature) r.

    The sum over a sequence approaches its smallest reward as the temperature goes to 0.

    Args:
        reward: ``[T]``, floating-point; of tokens, or of steps if `cu_seqlens` counts steps.
        cu_seqlens: ``[S+1]``.
        temperature: positive.

    Returns:
        ``[T]``, of the rewards' dtype.

    Raises:
        TypeError, ValueError: as :func:`repirl_kernels.packed.check_packed`.
        ValueError: the temperature is not positive.

    Source: PURE, Cheng et al. 2025.
    """
    check_packed(cu_seqlens, reward=reward)
    logits = -reward.double() / _positive("credit_temperature", temperature)
    ids = sequence_ids(cu_seqlens, reward.numel())
    weights = (logits - bucket_logsumexp(logits, ids, cu_seqlens.numel() - 1)[ids]).exp()
    return (weights * reward.double()).to(reward.dtype)


class _Groups:
    """The groups of a batch, and the baselines that they give.

    Args:
        cu_seqlens, group_ids, baseline, leave_one_out: as in :func:`rloo_advantages`.
    """

    def __init__(self, cu_seqlens: Tensor, group_ids: Tensor, baseline: str, leave_one_out: bool) -> None:
        self.cu_seqlens, self.group_ids, self.kind, self.leave_one_out = cu_seqlens, group_ids, baseline, leave_one_out
        self.groups, self.num_groups = dense_group_ids(group_ids, cu_seqlens, "prompt")
        self.num_tokens = int(cu_seqlens[-1])
        self.ids = sequence_ids(cu_seqlens, self.num_tokens)
        self.lengths = cu_seqlens.diff().long()

    def sequence_baseline(self, values: Tensor, counted: Tensor) -> Tensor:
        """The mean of the values of the group's sequences, without the sequence itself unless `leave_one_out` is off.

        Args:
            values: ``[S]``.
            counted: ``[S]`` bool, the sequences that take part.

        Returns:
            ``[S]`` float64; 0 for a sequence that does not take part.

        Raises:
            ValueError: a sequence that takes part has no other in its group.
        """
        if self.kind == "none":
            return torch.zeros_like(values, dtype=torch.float64)
        values, own = torch.where(counted, values, 0.0), counted.double()
        count = bucket_sum(counted, self.groups, self.num_groups)[self.groups]
        lonely = (counted & (count < 2)).nonzero()[:, 0]
        if lonely.numel():
            raise ValueError(
                f"{lonely.numel()} sequences are alone in their group (first: sequence {int(lonely[0])}, group "
                f"{int(self.group_ids[lonely[0]])}): a baseline needs at least 2 rollouts a prompt"
            )
        total = bucket_sum(values, self.groups, self.num_groups)[self.groups]
        if self.leave_one_out:
            total, count = total - values, count - own
        return torch.where(counted, total / count.clamp(min=1), 0.0)

    def token_baseline(self, reward: Tensor) -> Tensor:
        """The baseline ``[T]`` of process rewards ``[T]`` float64."""
        means = segment_mean(reward, self.cu_seqlens)
        group = self.sequence_baseline(means, self.lengths > 0)[self.ids]
        if self.kind != "position":
            return group
        longest = max_length(self.lengths)
        cells = self.groups[self.ids] * longest + token_positions(self.cu_seqlens)
        total = bucket_sum(reward, cells, self.num_groups * longest)[cells]
        count = bucket_sum(torch.ones_like(reward), cells, self.num_groups * longest)[cells]
        if self.leave_one_out:
            total, count = total - reward, count - 1
        return torch.where(count > 0, total / count.clamp(min=1), group)


def _outcome_advantage(outcome: Tensor, groups: _Groups, scale: str) -> Tensor:
    """A_o ``[S]`` float64, scaled."""
    values = outcome.detach().double()
    advantage = values - groups.sequence_baseline(values, torch.ones_like(values, dtype=torch.bool))
    if scale == "none":
        return advantage
    if scale == "batch":
        return advantage / (_variance(values).sqrt() + _EPSILON)
    size = bucket_sum(torch.ones_like(values), groups.groups, groups.num_groups)
    mean = bucket_sum(values, groups.groups, groups.num_groups) / size
    squares = bucket_sum((values - mean[groups.groups]) ** 2, groups.groups, groups.num_groups)
    deviation = (squares / (size - 1).clamp(min=1)).sqrt()
    return advantage / (deviation[groups.groups] + _EPSILON)


def _variance(values: Tensor) -> Tensor:
    """The unbiased variance, a scalar; 0 of fewer than two values."""
    if values.numel() < 2:
        return values.new_zeros(())
    return values.var()


def _positive(name: str, value: float) -> float:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value
