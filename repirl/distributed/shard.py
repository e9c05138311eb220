"""Models sharded over the processes by FSDP2 (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from repirl.distributed.precision import cast_once, find_units


def shard(model: PreTrainedModel, mesh: DeviceMesh, compute_dtype: torch.dtype, *, cpu_offload: bool = False) -> None:
    """Shard a fused model in place, in units (`precision.find_units`) that are gathered one at a time.

    Args:
        model: the model; its parameters may still be on the device `meta`.
        mesh: the processes that share the model.
        compute_dtype: the dtype of gathered weights and of activations. Gradients are reduced and summed in float32.
        cpu_offload: keep parameters, gradients and optimiser state in host memory.
    """
    on_gpu = mesh.device_type != "cpu"
    # By default FSDP casts floating-point inputs of a unit to param_dtype, which would round them.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy()
    # Record the dtype as a plain attribute; other code reads `model.compute_dtype`.
    model.__dict__["compute_dtype"] = compute_dtype
    for unit in find_units(model):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)


def units(model: nn.Module) -> list[FSDPModule]:
    """The sharded units of a model; an empty list if it is not sharded."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the gathered weights.

    After a forward pass without gradients the root unit keeps its gathered weights. Without this call it would still
    use them after an update.
    """
    for unit in units(model):
        unit.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which every process has the whole model, and can run forward passes without the others.

    No gradients are computed inside.
    """
    sharded = units(model)
    for unit in sharded:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with cast_once(model):
            yield
    finally:
        for unit in sharded:
            # The root is not resharded between forward and backward: backward needs it first.
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def local_slices(parameter: DTensor) -> tuple[slice, ...] | None:
    """The part of a sharded parameter that this process holds, one slice per axis; None if it holds nothing."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if 0 in shape:
        return None
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


@torch.no_grad()
def find_nonfinite(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors that hold NaN or infinity; of sharded ones only this process's part is looked at."""
    largest: dict[str, Tensor] = {}
    for name, tensor in named:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():
            # The largest magnitude is NaN where any is; nothing as large as the tensor is made for it.
            largest[name] = torch.linalg.vector_norm(local, float("inf")).float()
    if not largest:
        return []
    # Asked for once: each answer of a GPU has to be waited for.
    is_finite = torch.stack(list(largest.values())).isfinite().tolist()
    return [name for name, finite in zip(largest, is_finite, strict=True) if not finite]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all processes if it is sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
