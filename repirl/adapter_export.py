"""The LoRA adapters of a run as folders of peft, without the base that they were trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repirl.distributed.shard import whole
from repirl.learner import Learner
from repirl.value_head import HEAD_NAMES

# Before the name of each weight, as peft saves it.
PREFIX = "base_model.model."


def save_adapter(
    learner: Learner, folder: Path, base: str, head: str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a learner's adapter as `peft.PeftModel.from_pretrained(base_model, folder)` loads it.

    Args:
        learner: of a shared model (adapters.add_adapters).
        folder: gets adapter_config.json and adapter_model.safetensors.
        base: folder or hub id of the base.
        head: the name of the head of the base as a token classifier, for a learner whose outputs are a value head's.
        dtype: of the weights; by default as they were trained.
    """
    from peft import LoraConfig

    assert learner.adapter is not None
    assert learner.reads_values == (head is not None)
    part, weights = f".{learner.adapter}.", dict[str, Tensor]()
    for name, parameter in learner.model.named_parameters():
        if "lora_" in name and part in name:
            weights[PREFIX + name.replace(part, ".")] = whole(parameter.detach())
    if head is not None:
        own: Any = learner.model.value_head
        for key, parameter in own.named_parameters():
            weights[f"{PREFIX}{head}.{key}"] = whole(parameter.detach())
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: weight.to("cpu", dtype or weight.dtype).contiguous() for name, weight in weights.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = {n: m for n, m in learner.model.named_modules() if learner.adapter in getattr(m, "lora_A", {})}
    ours = next(iter(layers.values()))
    config = LoraConfig(
        task_type="CAUSAL_LM" if head is None else "TOKEN_CLS",
        base_model_name_or_path=base,
        r=ours.r[learner.adapter],
        lora_alpha=ours.lora_alpha[learner.adapter],
        lora_dropout=0.0,
        target_modules=target_modules(learner.model, layers),
        modules_to_save=None if head is None else [head],
        fan_in_fan_out=ours.fan_in_fan_out,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def target_modules(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The shortest names by which peft gives adapters to these layers and to no others: the last parts of their names,
    or whole names where a layer without an adapter has such a last part, too."""
    chosen = set(layers)
    last = {name.rpartition(".")[2] for name in chosen}
    # A token classifier's head is no target, whatever it is called.
    others = {n for n, m in model.named_modules() if n not in chosen and ".lora_" not in n and n not in HEAD_NAMES}
    is_shared = any(name.rpartition(".")[2] in last for name in others if not name.endswith(".base_layer"))
    return sorted(chosen if is_shared else last)
