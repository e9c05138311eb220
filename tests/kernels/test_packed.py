"""Sums, means and returns of packed sequences against loops over sequences, in float64."""

import math

import pytest
import torch
from packed_cases import LENGTHS, cu_of, rollouts, split
from repirl_kernels import advantages, importance, packed, pareto
from torch import Tensor


def close(actual: Tensor, expected: Tensor | list[float], tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_segment_sums_means_and_ids() -> None:
    values, _, cu = rollouts(LENGTHS)
    pieces = split(values, cu)
    close(packed.segment_sum(values, cu), [float(p.sum()) for p in pieces])
    close(packed.segment_mean(values, cu), [float(p.mean()) if len(p) else 0.0 for p in pieces])
    expected = [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert packed.sequence_ids(cu).tolist() == expected
    assert packed.sequence_ids(cu.int(), sum(LENGTHS)).tolist() == expected


def test_prefix_sums() -> None:
    values, _, cu = rollouts(LENGTHS)
    close(packed.prefix_sums(values, cu), torch.cat([p.cumsum(0) for p in split(values, cu)]))


def test_prefix_sums_do_not_cancel_across_sequences() -> None:
    huge = torch.tensor([1e9, 1e9, 1e-3, 1e-3], dtype=torch.float32)
    close(packed.prefix_sums(huge, cu_of([2, 2]))[2:], [1e-3, 2e-3], 1e-7)


@pytest.mark.parametrize("function", [packed.prefix_sums, packed.returns_to_go])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_sequence(function, bad: float) -> None:
    values, _, cu = rollouts(LENGTHS)
    expected = function(values, cu)
    broken = values.clone()
    broken[7] = bad
    owner = packed.sequence_ids(cu) == packed.sequence_ids(cu)[7]
    assert torch.equal(function(broken, cu)[~owner], expected[~owner])
    assert not function(broken, cu)[7].isfinite()


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3, 0.0])
def test_returns_to_go(gamma: float) -> None:
    reward, _, cu = rollouts([*LENGTHS, 37])
    expected = []
    for piece in split(reward, cu):
        following, returns = 0.0, []
        for r in reversed(piece.tolist()):
            following = r + gamma * following
            returns.append(following)
        expected += reversed(returns)
    close(packed.returns_to_go(reward, cu, gamma), expected)


def test_returns_and_prefix_sums_are_differentiable() -> None:
    reward, _, cu = rollouts([3, 0, 1, 4])
    reward.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: packed.returns_to_go(r, cu, 0.7), reward)
    assert torch.autograd.gradcheck(lambda r: packed.prefix_sums(r, cu), reward)
    assert torch.autograd.gradcheck(lambda r: packed.segment_mean(r, cu), reward)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_in_nothing_out(lengths: list[int]) -> None:
    reward, logprob, cu = rollouts(lengths)
    assert packed.returns_to_go(reward, cu, 0.5).shape == (0,)
    assert packed.prefix_sums(reward, cu).shape == (0,)
    assert packed.segment_sum(reward, cu).tolist() == [0.0] * len(lengths)
    groups = torch.zeros(len(lengths), dtype=torch.int64)
    for kind in importance.WEIGHT_KINDS:
        lw = importance.log_importance_weights(reward, logprob, cu, kind=kind, group_ids=groups)
        weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
        assert weights.shape == ((0,) if lw.per_token else (len(lengths),))
        smoothed, k_hat = pareto.pareto_smooth(lw.log_weight, lw.bucket_ids)
        assert smoothed.shape == weights.shape
        assert k_hat.isnan().all()
        assert importance.importance_diagnostics(lw, weights, reward, cu)["reward_std"] == 0.0
    advantage = advantages.rloo_advantages(
        None, reward, cu, groups, outcome_coefficient=0.0, process_coefficient=1.0, whiten=True
    )
    assert advantage.shape == (0,)


@pytest.mark.parametrize(
    ("cu", "error", "message"),
    [
        (torch.tensor([0.0, 2.0]), TypeError, "int32 or int64"),
        (torch.tensor([1, 2]), ValueError, "start at 0"),
        (torch.tensor([0, 3, 2]), ValueError, "never decrease"),
        (torch.tensor([0, 3]), ValueError, r"got \(2,\)"),
        (torch.tensor([[0, 2]]), ValueError, r"\[S\+1\]"),
    ],
)
def test_malformed_packing_is_named(cu: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        packed.segment_sum(torch.zeros(2), cu)


def test_integer_values_are_refused() -> None:
    with pytest.raises(TypeError, match="values must be a floating-point tensor"):
        packed.segment_sum(torch.zeros(2, dtype=torch.int64), cu_of([2]))
