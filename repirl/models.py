"""Loading and describing models and tokenizers."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from repirl.config import ConfigError, first_line
from repirl.distributed.precision import compute_in
from repirl.distributed.shard import find_nonfinite
from repirl.fused import fuse
from repirl.model_checks import check_loaded, check_shapes, refuse_nonfinite
from repirl.model_files import explained, find_file, read_json, read_model_config, weight_tensors
from repirl.packing import check_packed
from repirl.value_head import add_value_head, own_attention, register_classifier


def quiet_transformers() -> None:
    """No bars and advice of transformers between the lines of a run's own display."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ConfigError where it cannot be loaded, cannot be used or has no end token."""
    with explained("tokenizer", name, gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
    try:
        tokenizer.decode(tokenizer("1 + 1").input_ids, skip_special_tokens=True)
    except Exception as error:
        # A setting of the wrong type is loaded without an error, and fails where it is first read.
        raise ConfigError(
            f"the tokenizer of {name!r} is loaded, but cannot be used: {first_line(error)}; look at its "
            "tokenizer_config.json and tokenizer.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name!r} has no end-of-sequence token; responses could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.__dict__["pad_is_borrowed"] = True
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer as it was loaded: a padding token that was missing is missing again."""
    borrowed = tokenizer.__dict__.get("pad_is_borrowed", False)
    if borrowed:
        tokenizer.pad_token = None
    try:
        tokenizer.save_pretrained(folder)
    finally:
        if borrowed:
            tokenizer.pad_token = tokenizer.eos_token


def keep_generation_settings(model: PreTrainedModel, name: str) -> None:
    """Remember generation_config.json as it stands in a model's files, for checkpoints and exports."""
    file = find_file(name, "generation_config.json")
    model.__dict__["generation_settings"] = None if file is None else read_json(file)


def load_model(
    name: str,
    *,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """Load and fuse. kind: "causal" (a head over the vocabulary), "value" (a one-output head, which starts at 0 where
    the files hold none, so every reward is 0 at first) or "trained value" (such a head, which has to be there).
    compute_dtype: of products and activations; None: that of the parameters.

    ConfigError where the name leads to no model, or its files do not hold all of it.
    """
    model: Any
    needs_head, kind = kind == "trained value", kind.removeprefix("trained ")
    config = read_model_config(name, gguf_file)
    if kind == "value":
        add_value_head(config)
    factory: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForTokenClassification
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": own_attention(factory, config)}
    options |= {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    tensors = None
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    else:
        # No pickles, which may run any code.
        options["use_safetensors"] = True
        if (tensors := weight_tensors(name)) is not None:
            check_shapes(name, config, kind, tensors)
    with explained("model", name, gguf_file):
        model, info = factory.from_pretrained(name, **options)
    check_loaded(model, name, info, kind=kind, needs_head=needs_head)
    keep_generation_settings(model, name)
    for key in info["missing_keys"]:
        # Only a value head can be missing by now; one that has weights and no bias keeps them.
        nn.init.zeros_(model.get_parameter(key))
    if gguf_file is not None:
        # What GGUF loading leaves behind would make save_pretrained refuse a model that is plain float by now.
        model.hf_quantizer = None
        model.is_quantized = False
        model.config.__dict__.pop("quantization_config", None)
    # Rotary frequencies are buffers that `.to(bfloat16)` would round, hence dtype= above and only a device here.
    model = fuse(model.to(device))
    refuse_nonfinite(name, find_nonfinite(model.named_parameters()), tensors)
    if compute_dtype not in (None, dtype):
        compute_in(model, compute_dtype)
    check_packed(model, name, device, compute_dtype or dtype)
    return model


def save_description(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model's configuration and tokenizer, all that `build_model` needs besides the weights."""
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    if (settings := model.__dict__.get("generation_settings")) is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings))


def build_model(folder: Path) -> PreTrainedModel:
    """A fused model on the CPU with the configuration in `folder` and weights yet to be loaded."""
    config = AutoConfig.from_pretrained(folder)
    is_value = any(name.endswith("ForTokenClassification") for name in config.architectures or [])
    if is_value:
        register_classifier(config)
    factory = AutoModelForTokenClassification if is_value else AutoModelForCausalLM
    return fuse(factory.from_config(config, dtype=config.dtype, attn_implementation=own_attention(factory, config)))
