"""Loading a model straight into its shards: no process ever holds the whole of it."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from repirl.adapters import base_name
from repirl.config import ConfigError
from repirl.distributed.shard import local_slices, reshard, shard
from repirl.distributed.world import World
from repirl.models import add_value_head, check_packed, fuse, load_message, load_model

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
    home = torch.device("cpu") if cpu_offload else world.device
    files = None if gguf_file else _files_by_name(name)
    model = None if files is None else _empty_model(name, kind, dtype)
    if model is not None and files is not None and _all_there(model, files, kind):
        if prepare is not None:
            prepare(model)
        shard(model, world.mesh, compute_dtype, cpu_offload=cpu_offload)
        _materialise(model, home)
        _read(model, files)
    else:
        if world.is_main and not gguf_file:
            logger.warning("%s: not in safetensors under the model's own names; every process loads it whole", name)
        model = load_model(name, kind=kind, dtype=dtype, device=torch.device("cpu"), gguf_file=gguf_file)
        if prepare is not None:
            prepare(model)
        shard(model, world.mesh, compute_dtype, cpu_offload=cpu_offload)
        # Buffers, which FSDP leaves where they are.
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, buffer.to(world.device), key not in module._non_persistent_buffers_set)
    if kind == "causal":
        check_packed(model, name, world.device, compute_dtype)
        reshard(model)
    return model


def _files_by_name(name: str) -> dict[str, str] | None:
    """Parameter name -> the safetensors file that holds it; None where there are no such files."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
        if index is not None:
            files, _ = get_checkpoint_shard_files(name, index)
            by_file = {Path(f).name: f for f in files}
            return {key: by_file[f] for key, f in json.loads(Path(index).read_text())["weight_map"].items()}
        single = cached_file(name, SAFE_WEIGHTS_NAME, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(load_message("model", name, None, error)) from error
    if single is None:
        return None
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _empty_model(name: str, kind: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name)
    if kind == "value":
        add_value_head(config)
    factory = AutoModelForCausalLM if kind == "causal" else AutoModelForTokenClassification
    # Buffers (rotary frequencies) are computed for real: nothing in the files could restore them.
    with init_empty_weights(include_buffers=False):
        model = factory.from_config(config, dtype=dtype, attn_implementation="sdpa")
    # On its way to `meta` each module got parameters of its own.
    model.tie_weights()
    return fuse(model)


def _all_there(model: PreTrainedModel, files: dict[str, str], kind: str) -> bool:
    # Tied parameters have one name here. Persistent buffers would have to be read, too: none of these models has any.
    expected = {name for name, _ in model.named_parameters()}
    tied = {key for key in model.state_dict() if key.startswith("lm_head") and key not in expected}
    if expected | tied != set(model.state_dict()):
        return False
    missing = expected - set(files)
    return not missing or (kind == "value" and all(name.startswith("score.") for name in missing))


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Memory for parameters; unlike `to_empty` it leaves buffers their values."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))


@torch.no_grad()
def _read(model: nn.Module, files: dict[str, str]) -> None:
    by_file: dict[str, list[tuple[str, DTensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        plain = base_name(name)
        if plain in files:
            by_file[files[plain]].append((plain, parameter))
        else:
            # A new value head: every reward is 0 at first. Adapters get their values elsewhere.
            parameter.to_local().zero_()
    for path, parameters in by_file.items():
        with safe_open(path, "pt") as file:
            for name, sharded in parameters:
                source = file.get_slice(name)
                if tuple(source.get_shape()) != tuple(sharded.shape):
                    raise ConfigError(
                        f"{path} holds {name!r} with shape {tuple(source.get_shape())}, the configuration beside it "
                        f"says {tuple(sharded.shape)}"
                    )
                if (where := local_slices(sharded)) is not None:
                    sharded.to_local().copy_(source[where])
