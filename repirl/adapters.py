"""Policy and PRM as two LoRA adapters (peft) on one frozen base; with both off, the base is the reference.

Adapters of one model all stay trainable: peft's own switch freezes those that are off, and a gradient that is still
to come, or a sharded copy that was made before, would be lost without a word. The optimisers tell whose they are.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from repirl.config import ConfigError
from repirl.distributed.shard import local_slices, whole
from repirl.options import AdapterConfig

# peft is imported where adapters are added: it costs seconds, which runs without any need not wait for.
_LORA = ("lora_A", "lora_B")


def add_adapters(
    model: PreTrainedModel, config: AdapterConfig, names: list[str], dtype: torch.dtype, *, value_head: bool
) -> None:
    """Freeze a fused causal LM and add adapters of the given names to it, in place; value_head: also a one-output head
    `value_head`, for a PRM that reads its reward there or a critic. `init_adapters` follows, once they have memory.

    ConfigError where `target_modules` name what is not in the model, or is no linear layer below its head.
    """
    # Not by the model's own add_adapter: transformers then asks for a peft that may not be out yet.
    from peft import LoraConfig, inject_adapter_in_model

    _check_targets(model, config.target_modules)
    model.requires_grad_(False)
    for name in names:
        # peft divides by the rank, whatever number it is.
        alpha: Any = config.alpha
        lora = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=config.target_modules, lora_dropout=0.0)
        with warnings.catch_warnings():
            # That there are several is meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            # It sees by itself which layers hold their weights the other way round.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            inject_adapter_in_model(lora, model, adapter_name=name)
    device = next(model.parameters()).device
    if value_head:
        model.value_head = nn.Linear(model.get_output_embeddings().in_features, 1, device=device, dtype=dtype)
    for layer in _layers(model):
        for part in _LORA:
            getattr(layer, part).to(dtype)
    select_adapter(model, None)


def _check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    """peft itself minds only if no name at all fits, and what it would add to an embedding or to the head, which
    computes no logits, would not be trained."""
    if targets == "all-linear":
        _refuse_packed_experts(model)
        return
    matches: dict[str, list[tuple[str, nn.Module]]] = {
        target: [(n, m) for n, m in model.named_modules() if n == target or n.endswith(f".{target}")]
        for target in targets
    }
    wrong = [target for target, modules in matches.items() if not modules]
    if wrong or not targets:
        linear = sorted({n.rpartition(".")[2] for n, m in _linear_layers(model)})
        what = f"the model has no layer {wrong[0]!r}" if wrong else "it is empty"
        raise ConfigError(f"adapters.target_modules {targets!r}: {what}; its linear layers are {linear}")
    trainable = {name for name, _ in _linear_layers(model)}
    for target, modules in matches.items():
        for name, module in modules:
            if name not in trainable:
                raise ConfigError(
                    f"adapters.target_modules {targets!r}: {target!r} is of type {type(module).__name__}, "
                    "expected linear layers below the head"
                )


def _refuse_packed_experts(model: PreTrainedModel) -> None:
    """Mixtures of experts hold the experts' weights as one tensor of three dimensions, which is no linear layer: `all`
    linear layers would leave out most of the model without a word."""
    packed = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    if packed:
        linear = sorted({n.rpartition(".")[2] for n, _ in _linear_layers(model)})
        raise ConfigError(
            f"adapters.target_modules is 'all-linear', but {packed[0]!r} ({type(model).__name__}) is no linear layer, "
            "as of a mixture of experts, and gets no adapter: name the layers that shall have one, of "
            f"{linear}, or train without adapters"
        )


def _linear_layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """What can get an adapter: all linear layers but the head, of which no logits are ever asked."""
    head = model.get_output_embeddings()
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def select_adapter(model: nn.Module, name: str | None) -> None:
    """Compute with this adapter from now on, or with the base alone. Not between a forward pass and its backward."""
    for layer in _layers(model):
        if name is not None:
            layer.set_adapter(name)
        layer.enable_adapters(name is not None)
        for part in _LORA:
            getattr(layer, part).requires_grad_(True)


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers with adapters (peft.tuners.lora.LoraLayer)."""
    return (module for module in model.modules() if hasattr(module, "lora_A"))


def is_shared(model: nn.Module) -> bool:
    """Whether adapters were added to a model."""
    return any(True for _ in _layers(model))


def belongs(parameter_name: str, adapter: str) -> bool:
    """Whether a parameter is trained with an adapter: its own ones, and the value head with the PRM's or critic's."""
    is_value_head = parameter_name.startswith("value_head.")
    return f".{adapter}." in parameter_name or (is_value_head and adapter in ("prm", "critic"))


def has_value_head(model: nn.Module, adapter: str) -> bool:
    """Whether outputs with this adapter are those of the value head."""
    return hasattr(model, "value_head") and belongs("value_head.weight", adapter)


def base_name(parameter_name: str) -> str | None:
    """The name that a parameter has in the model without adapters; None for what adapters brought."""
    if "lora_" in parameter_name or parameter_name.startswith("value_head."):
        return None
    return parameter_name.replace(".base_layer.", ".")


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Start values as in Hu et al. 2021: A uniform, B zero, so that every adapter is the base at first; a value head
    is zero, so every reward is 0. They depend on the seed and the parameter's name only, not on how it is sharded."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = 1.0 / math.sqrt(parameter.shape[1])
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            _local(parameter).copy_(_part(values, parameter))
        elif base_name(name) is None:
            _local(parameter).zero_()


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _part(values: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a sharded parameter with these values."""
    if not isinstance(parameter, DTensor):
        return values
    where = local_slices(parameter)
    return values.new_empty(parameter.to_local().shape) if where is None else values[where]


@torch.no_grad()
def merged_weights(model: PreTrainedModel, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the model without adapters, whole, with `adapter` worked into them, which makes them float32:
    in the base's own type a small adapter would be rounded away. Where the model is sharded, every process has to go
    through all of them."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    for name, parameter in model.named_parameters():
        plain = base_name(name)
        if plain is None:
            continue
        value = whole(parameter.detach())
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if adapter is not None and layer is not None and adapter in layer.lora_A:
            a, b = (whole(part[adapter].weight.detach()) for part in (layer.lora_A, layer.lora_B))
            update = b.float() @ a.float()
            # GPT-2's layers hold their weights the other way round.
            value = value.float() + layer.scaling[adapter] * (update.T if layer.fan_in_fan_out else update)
        yield plain, value
