"""The learning rates of an update: warm-up, schedule, and a value head's own."""

import math

import pytest
import torch

from repirl.optimizer import make_optimizer, make_scheduler, scaled_rates
from repirl.options import OptimizerConfig


def rates(num_updates, **options):
    """The rates of the layer and of the head, update by update."""
    parameters = {
        "model.weight": torch.nn.Parameter(torch.ones(2, 2)),
        "score.weight": torch.nn.Parameter(torch.ones(1, 2)),
    }
    config = OptimizerConfig(lr=1.0, **options)
    optimizer = make_optimizer(parameters, config)
    scheduler = make_scheduler(optimizer, parameters, config, num_updates)
    seen = []
    for _ in range(num_updates):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    return seen


def test_the_first_update_of_a_warm_up_counts():
    assert [rate for (rate,) in rates(5, warmup_steps=3)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert [rate for (rate,) in rates(2)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4))]),
    ],
)
def test_what_follows_the_warm_up(schedule, expected):
    assert [rate for (rate,) in rates(5, warmup_steps=1, schedule=schedule)] == pytest.approx(expected)


def test_a_value_head_has_a_rate_of_its_own_and_may_move_alone_first():
    assert rates(4, warmup_steps=1, head_lr=4.0, head_updates=2) == [(0.0, 2.0), (0.0, 4.0), (1.0, 4.0), (1.0, 4.0)]
    # Without a rate of its own it has that of the rest.
    assert rates(2, head_updates=1) == [(0.0, 1.0), (1.0, 1.0)]


def test_weight_decay_leaves_vectors_alone():
    parameters = {"a": torch.nn.Parameter(torch.ones(2, 2)), "b": torch.nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(parameters, OptimizerConfig(weight_decay=0.1))
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.1), (1, 0.0)]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scaled_rates_shorten_one_step_and_are_what_they_were_after_it(as_tensor):
    parameters = {"model.weight": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))}
    optimizer = make_optimizer(parameters, OptimizerConfig(lr=0.1, weight_decay=0.5))
    [group] = optimizer.param_groups
    if as_tensor:
        group["lr"] = torch.tensor(0.1)
    parameters["model.weight"].grad = torch.ones(2, 2, dtype=torch.float64)
    before = float(group["lr"])
    with scaled_rates(optimizer, 0.25):
        optimizer.step()
    # AdamW's first step: the rate times the gradient's sign, after the decay.
    assert parameters["model.weight"][0, 0].item() == pytest.approx((1 - 0.025 * 0.5) - 0.025, abs=1e-7)
    assert float(group["lr"]) == before
    assert torch.is_tensor(group["lr"]) == as_tensor
    with pytest.raises(RuntimeError, match="failed"), scaled_rates(optimizer, 0.5):
        raise RuntimeError("failed")
    assert float(group["lr"]) == before
