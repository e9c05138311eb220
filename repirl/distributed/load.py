"""Loading a model straight into its shards: no process ever holds the whole of it."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

from repirl.adapters import base_name
from repirl.distributed.shard import find_nonfinite, local_slices, reshard, shard
from repirl.distributed.world import World
from repirl.fused import fuse
from repirl.model_checks import check_names, check_shapes, refuse_nonfinite, refuse_shape
from repirl.model_files import StoredTensor, explained, read_model_config, weight_tensors
from repirl.models import keep_generation_settings, load_model
from repirl.packing import check_packed
from repirl.value_head import add_value_head, head_name, own_attention

logger = logging.getLogger(__name__)


def load_sharded_model(
    name: str,
    *,
    kind: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    world: World,
    cpu_offload: bool = False,
    gguf_file: str | None = None,
    prepare: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """As models.load_model, sharded over `world`: every process reads its own slices of the safetensors files.

    prepare: what is done to the model before it is sharded (adapters are added).
    What is not in safetensors under the model's own parameter names (GGUF, old formats) is loaded whole by every
    process first, and said so.
    """
    assert world.mesh is not None
    whole_kind, needs_head, kind = kind, kind == "trained value", kind.removeprefix("trained ")
    home = torch.device("cpu") if cpu_offload else world.device
    files = None if gguf_file else weight_tensors(name)
    model = None if files is None else _empty_model(name, kind, dtype, files)
    if model is not None and files is not None and _all_there(model, files, kind):
        left = sorted(set(files) - set(model.state_dict()) - _ignored(model, files))
        missing = set(model.state_dict()) - set(files) - _tied(model)
        check_names(model, name, missing, left, kind=kind, needs_head=needs_head)
        if prepare is not None:
            prepare(model)
        shard(model, world.mesh, compute_dtype, cpu_offload=cpu_offload)
        _materialise(model, home)
        _read(model, name, files)
        named = ((plain, p) for key, p in model.named_parameters() if (plain := base_name(key)) is not None)
        refuse_nonfinite(name, sorted(set(world.gather(find_nonfinite(named)))), files)
    else:
        if world.is_main and not gguf_file:
            logger.warning("%s: not in safetensors under the model's own names; every process loads it whole", name)
        cpu = torch.device("cpu")
        model = load_model(name, kind=whole_kind, dtype=dtype, device=cpu, gguf_file=gguf_file)
        if prepare is not None:
            prepare(model)
        shard(model, world.mesh, compute_dtype, cpu_offload=cpu_offload)
        # Buffers, which FSDP leaves where they are.
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, buffer.to(world.device), key not in module._non_persistent_buffers_set)
    check_packed(model, name, world.device, compute_dtype)
    reshard(model)
    return model


def _empty_model(name: str, kind: str, dtype: torch.dtype, files: dict[str, StoredTensor]) -> PreTrainedModel:
    config: PretrainedConfig = read_model_config(name)
    if kind == "value":
        add_value_head(config)
    check_shapes(name, config, kind, files)
    factory = AutoModelForCausalLM if kind == "causal" else AutoModelForTokenClassification
    # Buffers (rotary frequencies) are computed for real: nothing in the files could restore them.
    with init_empty_weights(include_buffers=False):
        model = factory.from_config(config, dtype=dtype, attn_implementation=own_attention(factory, config))
    # On its way to `meta` each module got parameters of its own.
    model.tie_weights()
    keep_generation_settings(model, name)
    return fuse(model)


def _tied(model: PreTrainedModel) -> set[str]:
    """Second names of parameters."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _ignored(model: PreTrainedModel, files: dict[str, StoredTensor]) -> set[str]:
    """What files may hold besides, as the model's class says: layers of another use, old buffers."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return {key for key in files if any(re.search(pattern, key) for pattern in patterns)}


def _all_there(model: PreTrainedModel, files: dict[str, StoredTensor], kind: str) -> bool:
    # Tied parameters have one name here, and files with both names may hold two heads, which transformers sees to.
    # Persistent buffers would have to be read, too: none of these models has any.
    expected, tied = {name for name, _ in model.named_parameters()}, _tied(model)
    if expected | tied != set(model.state_dict()) or (tied & set(files) and kind == "causal"):
        return False
    missing = expected - set(files)
    head = head_name(model)
    return not missing or (kind == "value" and missing <= {f"{head}.weight", f"{head}.bias"})


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Memory for parameters; unlike `to_empty` it leaves buffers their values."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


@torch.no_grad()
def _read(model: nn.Module, name: str, files: dict[str, StoredTensor]) -> None:
    by_file: dict[str, list[tuple[str, DTensor]]] = defaultdict(list)
    for parameter_name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        plain = base_name(parameter_name)
        if plain in files:
            by_file[files[plain].path].append((plain, parameter))
        else:
            # A new value head: every reward is 0 at first. Adapters get their values elsewhere.
            parameter.to_local().zero_()
    for path, parameters in by_file.items():
        with explained("model", name), safe_open(path, "pt") as file:
            for key, sharded in parameters:
                source = file.get_slice(key)
                if tuple(source.get_shape()) != tuple(sharded.shape):
                    refuse_shape(name, key, source.get_shape(), sharded.shape)
                if (where := local_slices(sharded)) is not None:
                    sharded.to_local().copy_(source[where])
