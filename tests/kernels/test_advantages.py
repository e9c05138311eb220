"""Advantages against loops over sequences in float64, and against published implementations."""

import math

import exact_mdp as mdp
import pytest
import torch
from packed_cases import GROUPS, LENGTHS, cu_of, rollouts, split
from repirl_kernels import advantages, losses, packed
from torch import Tensor


def close(actual: Tensor, expected: Tensor | list[float], tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def slow_rloo(outcome, reward, cu, groups, c_o: float, c_p: float, gamma: float) -> list[float]:
    pieces = split(reward, cu)
    result = []
    for i, piece in enumerate(pieces):
        others = [j for j in range(len(pieces)) if j != i and groups[j] == groups[i]]
        a_o = float(outcome[i]) - sum(float(outcome[j]) for j in others) / len(others)
        means = [float(pieces[j].mean()) for j in others if len(pieces[j])]
        for t in range(len(piece)):
            a_p = sum(gamma ** (u - t) * (float(piece[u]) - sum(means) / len(means)) for u in range(t, len(piece)))
            result.append(c_o * a_o + c_p * a_p)
    return result


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize(("c_o", "c_p"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.05)])
def test_rloo_advantages(c_o: float, c_p: float, gamma: float) -> None:
    reward, _, cu = rollouts(LENGTHS)
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64)
    options = {"outcome_coefficient": c_o, "process_coefficient": c_p, "gamma": gamma}
    groups = torch.tensor(GROUPS)
    actual = advantages.rloo_advantages(outcome, reward, cu, groups, **options)
    expected = torch.tensor(slow_rloo(outcome, reward, cu, GROUPS, c_o, c_p, gamma), dtype=torch.float64)
    close(actual, expected)
    whitened = advantages.rloo_advantages(outcome, reward, cu, groups, whiten=True, **options)
    close(whitened, (expected - expected.mean()) / (expected.var() + 1e-8).sqrt())
    assert advantages.rloo_advantages(outcome.float(), reward.float(), cu, groups, **options).dtype == torch.float32


def test_rloo_refuses_what_it_cannot_compare() -> None:
    reward, _, cu = rollouts([2, 1, 3])
    outcome = torch.tensor([1.0, 0.0, 1.0])
    both = {"outcome_coefficient": 1.0, "process_coefficient": 1.0}
    with pytest.raises(ValueError, match=r"1 sequences are alone in their group .first: sequence 2, group 8"):
        advantages.rloo_advantages(outcome, reward, cu, torch.tensor([4, 4, 8]), **both)
    groups = torch.tensor([4, 4, 4])
    with pytest.raises(ValueError, match=r"outcome must be finite; 1 values are not, first nan at index 1"):
        advantages.rloo_advantages(torch.tensor([1.0, math.nan, 0.0]), reward, cu, groups, **both)
    for name in both:
        with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
            advantages.rloo_advantages(outcome, reward, cu, groups, **(both | {name: math.nan}))
    with pytest.raises(ValueError, match="outcome is None"):
        advantages.rloo_advantages(None, reward, cu, groups, **both)
    with pytest.raises(ValueError, match="reward is None"):
        advantages.rloo_advantages(outcome, None, cu, groups, **both)
    with pytest.raises(ValueError, match="gamma must lie in"):
        advantages.rloo_advantages(outcome, reward, cu, groups, gamma=1.5, **both)
    # An empty sequence has no mean reward, so the only other one is alone with its process rewards.
    with pytest.raises(ValueError, match="alone"):
        advantages.rloo_advantages(
            None, reward[:2], cu_of([2, 0]), groups[:2], outcome_coefficient=0.0, process_coefficient=1.0
        )


def process_part(reward: Tensor, cu: Tensor, groups: list[int], **options) -> Tensor:
    """The advantages of process rewards alone."""
    options = {"outcome_coefficient": 0.0, "process_coefficient": 1.0} | options
    return advantages.rloo_advantages(None, reward, cu, torch.tensor(groups), **options)


def test_whitening_is_unbiased_and_takes_few_tokens() -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    close(advantages.whitened(values), (values - 7 / 3) / math.sqrt(7 / 3 + 1e-8))
    close(advantages.whitened(values[:1]), [0.0])
    assert advantages.whitened(values[:0]).shape == (0,)


def test_process_norm_return_bounds_every_return() -> None:
    reward, _, cu = rollouts(LENGTHS, scale=7.0)
    pieces = split(reward, cu)
    largest = max(abs(float(piece[t:].sum())) for piece in pieces for t in range(len(piece)))
    for gamma in (1.0, 0.5):
        actual = process_part(reward, cu, GROUPS, process_norm="return", gamma=gamma)
        close(actual, process_part(reward / (largest + 1e-6), cu, GROUPS, gamma=gamma))
    assert advantages.normalize_returns(reward[:0], cu_of([0])).shape == (0,)


def test_process_norm_std_has_a_floor_and_comes_before_the_coefficient() -> None:
    reward, _, cu = rollouts(LENGTHS)
    outcome, groups = torch.rand(len(LENGTHS), dtype=torch.float64), torch.tensor(GROUPS)
    plain = process_part(reward, cu, GROUPS)
    close(process_part(reward, cu, GROUPS, process_norm="std"), plain / plain.std())
    close(process_part(reward / 1e4, cu, GROUPS, process_norm="std", process_std_floor=0.2), plain / 1e4 / 0.2)
    both = {"outcome_coefficient": 2.0, "process_norm": "std", "process_coefficient": 0.05}
    alone = advantages.rloo_advantages(outcome, None, cu, groups, outcome_coefficient=2.0, process_coefficient=0.0)
    actual = advantages.rloo_advantages(outcome, reward, cu, groups, **both)
    close(actual, alone + 0.05 * plain / plain.std())


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_baseline_at_equal_position(leave_one_out: bool) -> None:
    reward, _, cu = rollouts(LENGTHS)
    pieces, expected = split(reward, cu), []
    for i, piece in enumerate(pieces):
        group = [j for j in range(len(pieces)) if GROUPS[j] == GROUPS[i] and (j != i or not leave_one_out)]
        means = [float(pieces[j].mean()) for j in group if len(pieces[j])]
        for u in range(len(piece)):
            alive = [float(pieces[j][u]) for j in group if len(pieces[j]) > u] or means
            expected.append(float(piece[u]) - sum(alive) / len(alive))
    actual = process_part(reward, cu, GROUPS, baseline="position", leave_one_out=leave_one_out)
    returns = torch.cat([p.flip(0).cumsum(0).flip(0) for p in split(torch.tensor(expected).double(), cu)])
    close(actual, returns, 1e-6)
    # A reward of a position alone, whatever it is, moves nothing as long as another response is as long.
    position = torch.cat([torch.arange(n) for n in (3, 3)]).double()
    close(process_part(position, cu_of([3, 3]), [0, 0], baseline="position"), torch.zeros(6))


def test_no_baseline() -> None:
    reward, _, cu = rollouts([2, 1])
    actual = advantages.rloo_advantages(
        torch.tensor([1.0, 3.0]),
        reward,
        cu,
        torch.tensor([4, 8]),
        outcome_coefficient=1.0,
        process_coefficient=1.0,
        baseline="none",
    )
    close(actual, [1 + float(reward[0] + reward[1]), 1 + float(reward[1]), 3 + float(reward[2])])


def test_entropy_in_the_return() -> None:
    """Its sum is a reward of its own: outside the process coefficient and its norm, and with a baseline."""
    reward, old_logprob, cu = rollouts(LENGTHS)
    options = {"old_logprob": old_logprob, "entropy_coefficient": 0.3, "gamma": 0.9, "baseline": "position"}
    actual = process_part(reward, cu, GROUPS, process_coefficient=0.5, process_norm="return", **options)
    expected = 0.5 * process_part(reward, cu, GROUPS, process_norm="return", gamma=0.9, baseline="position")
    expected = expected + process_part(-0.3 * old_logprob, cu, GROUPS, gamma=0.9, baseline="position")
    close(actual, expected)
    # Without process rewards it is the only one.
    close(
        process_part(reward, cu, GROUPS, process_coefficient=0.0, **options),
        process_part(-0.3 * old_logprob, cu, GROUPS, gamma=0.9, baseline="position"),
    )


def test_entropy_in_the_return_has_the_exact_gradient() -> None:
    """Of E[c_p sum_t r_t + b sum_t H_t], on a process that can be enumerated; as a bonus it has not."""
    states, actions, cu = mdp.packed(torch.arange(mdp.NUM_TRAJECTORIES))
    logits, reward, beta = mdp.random_table(4).requires_grad_(), mdp.random_table(5), 0.7
    table = logits.log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    probability = mdp.trajectory_sums(table).exp()
    soft_return = (probability * mdp.trajectory_sums(0.5 * reward + beta * entropy[:, None])).sum()
    (expected,) = torch.autograd.grad(-soft_return, logits, retain_graph=True)
    logprob, ids = table[states, actions], packed.sequence_ids(cu)
    groups = torch.arange(mdp.NUM_TRAJECTORIES)
    alone = {"outcome_coefficient": 0.0, "process_coefficient": 0.5, "baseline": "none"}
    errors = []
    for in_return in (True, False):
        options = {"old_logprob": logprob, "entropy_coefficient": beta} if in_return else {}
        advantage = advantages.rloo_advantages(None, reward[states, actions], cu, groups, **alone, **options)
        bonus = {} if in_return else {"entropy": entropy[states], "entropy_coefficient": beta}
        loss = losses.policy_loss(logprob, logprob.detach(), advantage, **bonus).loss
        total = (probability.detach()[ids] * loss).sum()
        (actual,) = torch.autograd.grad(total, logits, retain_graph=True)
        errors.append(float((actual - expected).norm() / expected.norm()))
    assert errors[0] < 1e-12
    assert errors[1] > 0.05


def test_min_credit_of_pure() -> None:
    """README of PURE (CJReinforce/PURE): four step rewards, T = 0.1."""
    reward = torch.tensor([0.9, 0.2, 0.7, 0.95], dtype=torch.float64)
    weighted = advantages.min_credit(reward, cu_of([4]))
    close(weighted / reward, [0.000904, 0.991864, 0.006683, 0.000549], 1e-5)
    close(weighted, [0.000814, 0.198373, 0.004678, 0.000521], 1e-5)
    close(weighted.flip(0).cumsum(0).flip(0), [0.204386, 0.203572, 0.005199, 0.000521], 1e-5)
    # In a batch: each sequence has its own softmax, and then come baseline and returns as of any reward.
    two, cu = torch.cat([reward, -reward[:2]]), cu_of([4, 2])
    shaped = torch.cat([weighted, advantages.min_credit(-reward[:2], cu_of([2]))])
    close(process_part(two, cu, [0, 0], credit="min"), process_part(shaped, cu, [0, 0]))
    # Rewards that this temperature makes too large for exp.
    close(advantages.min_credit(1e3 * reward, cu_of([4]), 1e-2), [0.0, 200.0, 0.0, 0.0])


# verl b178a3c, core_algos.py, unscaled: the advantages of each response, by estimator.
VERL_LENGTHS, VERL_GROUPS = [3, 5, 4, 2, 6, 4, 5, 3], [0, 0, 0, 0, 1, 1, 1, 1]
VERL_OUTCOME = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
GRPO = {"leave_one_out": False, "scale": "group"}
VERL = [
    (GRPO, [0.866024, -0.866024, -0.866024, 0.866024, -0.499999, 1.499997, -0.499999, -0.499999]),
    ({"leave_one_out": False}, [0.5, -0.5, -0.5, 0.5, -0.25, 0.75, -0.25, -0.25]),
    ({}, [0.666667, -0.666667, -0.666667, 0.666667, -0.333333, 1.0, -0.333333, -0.333333]),
    # reinforce_plus_plus_baseline and reinforce_plus_plus
    (
        {"leave_one_out": False, "whiten": True},
        [1.269427, -0.926338, -0.926338, 1.269427, -0.377397, 1.818368, -0.377397, -0.377397],
    ),
    (
        {"baseline": "none", "whiten": True},
        [1.573434, -0.615692, -0.615692, 1.573434, -0.615692, 1.573434, -0.615692, -0.615692],
    ),
]


@pytest.mark.parametrize(("options", "expected"), VERL)
def test_advantages_of_verl(options: dict, expected: list[float]) -> None:
    actual = advantages.rloo_advantages(
        torch.tensor(VERL_OUTCOME, dtype=torch.float64),
        None,
        cu_of(VERL_LENGTHS),
        torch.tensor(VERL_GROUPS),
        outcome_coefficient=1.0,
        process_coefficient=0.0,
        **options,
    )
    lengths = torch.tensor(VERL_LENGTHS)
    close(actual, torch.tensor(expected, dtype=torch.float64).repeat_interleave(lengths), 1e-5)


def test_scale_of_the_outcome_leaves_the_process_part_alone() -> None:
    reward, _, cu = rollouts(LENGTHS)
    # The last group's outcomes are all equal: nothing to scale, and no division by 0.
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5, 0.0, 0.5], dtype=torch.float64)
    groups = torch.tensor(GROUPS)

    def parts(c_o: float, c_p: float, **options) -> Tensor:
        given = {"outcome_coefficient": c_o, "process_coefficient": c_p} | options
        return advantages.rloo_advantages(outcome, reward, cu, groups, **given)

    for scale, deviation in (
        ("batch", outcome.std().expand(7)),
        ("group", torch.where(groups == 3, outcome[groups == 3].std(), 0.0)),
    ):
        divisor = deviation.repeat_interleave(cu.diff()) + 1e-6
        close(parts(2.0, 0.1, scale=scale), 2.0 * parts(1.0, 0.0) / divisor + 0.1 * parts(0.0, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "mean"}, "baseline must be one of 'group', 'position', 'none'; got 'mean'"),
        ({"scale": "std"}, "scale must be one of 'none', 'group', 'batch'; got 'std'"),
        ({"process_norm": "batch"}, "process_norm must be one of 'none', 'return', 'std'; got 'batch'"),
        ({"credit": "max"}, "credit must be one of 'sum', 'min'; got 'max'"),
        ({"credit": "min", "credit_temperature": 0.0}, "credit_temperature must be positive and finite, got 0.0"),
        ({"process_norm": "std", "process_std_floor": -1.0}, "process_std_floor must be positive and finite, got -1.0"),
        ({"entropy_coefficient": 0.1}, "entropy_coefficient is 0.1 but old_logprob is None"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient must be finite, got nan"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    reward, _, cu = rollouts([2, 1])
    with pytest.raises(ValueError, match=message):
        process_part(reward, cu, [0, 0], **options)
