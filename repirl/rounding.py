"""Weights that lie halfway between two bfloat16 numbers.

With `compute_dtype: bfloat16`, the model computes with its float32 weights rounded to bfloat16. An update that is small
beside the step between two bfloat16 numbers moves the rounded value of few weights, and in the mean over all of them by
as much as the weights themselves. But of weights that were dequantised, or stored as float16, many lie exactly halfway
between two bfloat16 numbers, and the smallest update changes the rounded value of half of these, by a whole step. So
such ties are broken at load: the weight gets a random place between the two numbers. Its rounded value is one of them,
as it was before.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from repirl.distributed.shard import local_slices
from repirl.distributed.world import World

# Of float32 weights of any origin, one in 65536 is a tie. Below this share of a tensor, ties are left alone.
NOTICEABLE = 0.01
_LOW, _TIE = 0xFFFF, 0x8000


@torch.no_grad()
def break_ties(model: nn.Module, world: World) -> float:
    """Move the float32 parameters of a model that lie on ties of bfloat16, in place, by up to half a bfloat16 step.

    Only in tensors of which more than 1% are ties. Where a weight goes depends on the parameter's name and the place in
    it alone: so it is the same for every number of processes, and a policy and its reference stay equal.

    Args:
        model: it may be sharded; then all processes call this.
        world: the processes.

    Returns:
        The share of all weights that was moved.
    """
    parts = {
        name: part
        for name, parameter in model.named_parameters()
        if (part := _local(parameter)) is not None and part.dtype == torch.float32
    }
    counts = {name: (int(_ties(part).sum()), part.numel()) for name, part in parts.items()}
    ties, sizes = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for theirs in world.gather([counts]):
        for name, (number, size) in theirs.items():
            ties[name], sizes[name] = ties.get(name, 0) + number, sizes.get(name, 0) + size
    chosen = {name for name, number in ties.items() if number > NOTICEABLE * sizes[name]}
    for name, parameter in model.named_parameters():
        if name in chosen and name in parts:
            _move(parts[name], name, _first_index(parameter))
    return sum(ties[name] for name in chosen) / max(sum(sizes.values()), 1)


def _local(parameter: Tensor) -> Tensor | None:
    """What this process holds of a parameter; None where it holds nothing."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    return None if local_slices(parameter) is None else parameter.to_local().detach()


def _first_index(parameter: Tensor) -> int:
    """The place of this process's first value among all of the parameter's; parameters are cut along the first axis."""
    if not isinstance(parameter, DTensor):
        return 0
    slices = local_slices(parameter)
    assert slices is not None
    assert all((s.start, s.stop) == (0, n) for s, n in zip(slices[1:], parameter.shape[1:], strict=True))
    return int(slices[0].start * parameter[:1].numel()) if len(slices) else 0


def _ties(values: Tensor) -> Tensor:
    return (values.view(torch.int32) & _LOW) == _TIE


def _move(values: Tensor, name: str, first: int) -> None:
    """Give the ties among values other low bits, in place; first: the index of values[0] in the whole parameter."""
    bits = values.view(torch.int32).view(-1)
    places = _ties(values).view(-1).nonzero()[:, 0]
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)
    # The mixing function of SplitMix64 (Steele et al. 2014), of the index: any part of a tensor can be computed alone.
    mixed = (places + first) * -7046029254386353131 + key
    mixed = (mixed ^ _shift(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shift(mixed, 27)) * -7723592293110705685
    low = _shift(mixed ^ _shift(mixed, 31), 48)
    bits[places] = (bits[places] & ~_LOW) | low.to(torch.int32)


def _shift(values: Tensor, count: int) -> Tensor:
    """values >> count of int64, as if they had no sign."""
    return (values >> count) & ((1 << (64 - count)) - 1)
