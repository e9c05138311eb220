"""The optimiser of a learner and its learning rates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from repirl.config import ConfigError
from repirl.options import OptimizerConfig
from repirl.value_head import HEAD_NAMES


def make_optimizer(parameters: dict[str, torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Make an AdamW optimiser. Weight decay applies only to parameters with two or more dimensions.

    Args:
        parameters: by name. A value head has groups of its own if the options treat it apart.
        config: the options.

    Raises:
        ConfigError: `state_bits` is 8 and the package torchao is not installed.
    """
    apart = config.head_lr is not None or config.head_updates > 0
    groups: list[dict[str, Any]] = []
    for is_head in (False, True):
        part = [p for name, p in parameters.items() if (apart and is_value_head(name)) == is_head]
        rate = (config.head_lr if is_head else None) or config.lr
        groups.append({"params": [p for p in part if p.ndim >= 2], "weight_decay": config.weight_decay, "lr": rate})
        groups.append({"params": [p for p in part if p.ndim < 2], "weight_decay": 0.0, "lr": rate})
    # The fused version goes through the parameters once, and makes no copies of them on a GPU.
    factory: Callable[..., torch.optim.Optimizer] = functools.partial(torch.optim.AdamW, fused=True)
    if config.state_bits == 8:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(f"optimizer.state_bits 8 needs the package torchao: {error}") from error
        factory = AdamW8bit
    betas = (config.betas[0], config.betas[1])
    return factory([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps)


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    config: OptimizerConfig,
    num_updates: int,
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rates of an optimiser that `make_optimizer` made: linear warm-up, then the configured schedule.

    In a warm-up of n updates, update k (from 0) has the share (k + 1) / (n + 1) of the peak: the first update has a
    rate above 0, and the first one after the warm-up has the peak.

    Args:
        optimizer: its groups' rates are the peaks.
        parameters: by name.
        config: the options.
        num_updates: the updates that the schedule spans.
    """
    warm, length = config.warmup_steps, max(num_updates - config.warmup_steps, 1)

    def share(update: int) -> float:
        if update < warm:
            return (update + 1) / (warm + 1)
        progress = min((update - warm) / length, 1.0)
        shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        return shapes[config.schedule]

    def of_the_rest(update: int) -> float:
        return 0.0 if update < config.head_updates else share(update)

    heads = {parameter for name, parameter in parameters.items() if is_value_head(name)}
    rules: Any = [share if group["params"][0] in heads else of_the_rest for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rules)


def is_value_head(name: str) -> bool:
    """Whether a parameter of this name belongs to the head that reads a value: a token classifier's, or the one that a
    PRM on a shared base has."""
    return name.removeprefix("_orig_mod.").split(".")[0] in (*HEAD_NAMES, "value_head")


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, factor: float) -> Iterator[None]:
    """A context in which all learning rates are multiplied by `factor`; those of before are restored exactly."""
    before = [float(group["lr"]) for group in optimizer.param_groups]
    set_rates(optimizer, [factor * rate for rate in before])
    try:
        yield
    finally:
        set_rates(optimizer, before)


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Set the learning rate of each group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            # In place, because a compiled step (8-bit moments) reads this tensor.
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
