"""Leave-one-out advantages against loops over sequences, in float64."""

import math

import pytest
import torch
from packed_cases import GROUPS, LENGTHS, cu_of, rollouts, split
from repirl_kernels import advantages
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
    close(whitened, (expected - expected.mean()) / expected.std(correction=0), 1e-6)
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
