"""Models sharded over the processes by FSDP2 (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, mesh: DeviceMesh, compute_dtype: torch.dtype, *, cpu_offload: bool = False) -> None:
    """Shard a fused model in place: a unit a decoder layer, one for the rest; parameters may still be on `meta`.

    compute_dtype: of gathered weights and activations; gradients are reduced, and added up, in float32.
    cpu_offload: parameters, gradients and optimiser state stay in host memory.
    """
    on_gpu = mesh.device_type != "cpu"
    # Inputs are integers; casting float ones, FSDP's default, would round what should not be rounded.
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy()
    layer_names = set(getattr(model, "_no_split_modules", None) or ())
    units: list[nn.Module] = [m for m in model.modules() if type(m).__name__ in layer_names]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Tied weights are one parameter of two modules: it belongs to the unit that holds both, the root's.
    if head is not None and head.weight is not embeddings.weight:
        units += [embeddings, head]
    # As an attribute that is no module or tensor, for whoever asks how the model computes.
    model.__dict__["compute_dtype"] = compute_dtype
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offload)


def units(model: nn.Module) -> list[FSDPModule]:
    """The sharded units of a model, none if it is not sharded."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights. The root keeps its own after a forward pass without gradients, and would go on
    computing with them after an update."""
    for unit in units(model):
        unit.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole model and may run forward passes on its own, without the others."""
    found = units(model)
    for unit in found:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in found:
            # The root is not resharded between forward and backward: backward needs it first.
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def local_slices(parameter: DTensor) -> tuple[slice, ...] | None:
    """Which part of a sharded parameter this process holds; None where it holds nothing."""
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if 0 in shape:
        return None
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be a process's part of a larger one, gathered; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
