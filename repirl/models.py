"""Loading models, the fused head, and export.

A model keeps its Hugging Face class's parameters, `save_pretrained` and `generate`; only its `forward` learns
one more way to be called: on packed sequences, returning what the trainer needs and never the logits.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from repirl_kernels import linear_token_stats
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from repirl.attention import PACKED, PackedLayout
from repirl.batch import PackedBatch
from repirl.config import ConfigError
from repirl.distributed.shard import find_nonfinite
from repirl.model_checks import add_value_head, check_loaded, check_shapes, refuse_nonfinite
from repirl.model_files import explained, find_file, read_json, read_model_config, weight_tensors


class FusedHead(nn.Linear):
    """An lm_head that, given targets, returns token statistics instead of logits."""

    def forward(self, input: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            return super().forward(input)
        return linear_token_stats(input, self.weight, targets, bias=self.bias, **options)


def _hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: PackedLayout) -> Tensor:
    backbone = getattr(model, model.base_model_prefix)
    output = backbone(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, packed_layout=layout)
    return output.last_hidden_state[0]


class PackedCausalLM:
    """Mixed into a causal LM's class: `forward(..., packed_layout=, targets=)` returns TokenStats."""

    def forward(
        self,
        input_ids: Tensor,
        *args: Any,
        packed_layout: PackedLayout | None = None,
        response_index: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        reads_values: bool = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Packed: input_ids [T], response_index [R], targets [R] -> TokenStats of [R], for the token at
        response_index given everything before it in its sequence. Only those R rows reach the head.

        reads_values: the outputs [R] float32 of `value_head`, which a PRM on a shared base has, instead."""
        if packed_layout is None:
            return super().forward(input_ids, *args, position_ids=position_ids, **kwargs)  # type: ignore[misc]
        hidden = _hidden(self, input_ids, position_ids, packed_layout)  # type: ignore[arg-type]
        if reads_values:
            head = self.value_head  # type: ignore[attr-defined]
            return head(hidden[response_index].to(head.weight.dtype))[:, 0].float()
        softcap = getattr(self.config, "final_logit_softcapping", None)  # type: ignore[attr-defined]
        # The state of action t is the hidden state one token earlier.
        return self.lm_head(hidden[response_index - 1], targets, temperature=temperature, softcap=softcap)  # type: ignore


class PackedTokenClassifier:
    """Mixed into a token classifier's class: `forward(..., packed_layout=)` returns one value a response token."""

    def forward(
        self,
        input_ids: Tensor,
        *args: Any,
        packed_layout: PackedLayout | None = None,
        response_index: Tensor | None = None,
        reads_values: bool = True,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Packed: input_ids [T], response_index [R] -> values [R] float32, w . h_t + b at the token itself."""
        if packed_layout is None:
            return super().forward(input_ids, *args, position_ids=position_ids, **kwargs)  # type: ignore[misc]
        hidden = _hidden(self, input_ids, position_ids, packed_layout)  # type: ignore[arg-type]
        return self.score(hidden[response_index])[:, 0].float()  # type: ignore[attr-defined]


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Teach a loaded causal LM or token classifier the packed forward, in place; returns it.

    ConfigError where the model has neither an `lm_head` nor a `score` layer that is an nn.Linear.
    """
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear):
        head.__class__ = FusedHead
        mixin: type = PackedCausalLM
    elif isinstance(getattr(model, "score", None), nn.Linear):
        mixin = PackedTokenClassifier
    else:
        raise ConfigError(
            f"{type(model).__name__} has no linear `lm_head` or `score` layer; supported are decoder models with "
            "Llama's structure (Llama, Qwen2, Qwen3, SmolLM2, Mistral, ...)"
        )
    model.__class__ = type(type(model).__name__, (mixin, type(model)), {"__module__": type(model).__module__})
    model.config._attn_implementation = PACKED
    return model


def embedding_weight(model: PreTrainedModel) -> Tensor:
    """The table [V, D] of input embeddings."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def forward_flops(model: PreTrainedModel, batch: PackedBatch, reads_values: bool) -> list[float]:
    """Floating-point operations of one forward pass over each sequence, causal attention counted by half and the head
    for response tokens only: model FLOPs, which recomputation does not add to."""
    backbone = getattr(model, model.base_model_prefix)
    config = model.config
    head_size = config.hidden_size if reads_values else model.lm_head.weight.numel()
    embeddings = embedding_weight(model).numel()
    per_token = 2 * (sum(p.numel() for p in backbone.parameters()) - embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Two products (scores, and values weighted by them), two operations each, half of it masked.
    per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
    lengths, responses = batch.lengths.double(), batch.response_cu_seqlens.diff()
    return (per_token * lengths + per_pair * lengths**2 + 2 * head_size * responses).tolist()


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model runs padded batches with a KV cache (PyTorch's attention), as for generation."""
    before, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def quiet_transformers() -> None:
    """No bars and advice of transformers between the lines of a run's own display."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_tokenizer(name: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ConfigError where it cannot be loaded or has no end token."""
    with explained("tokenizer", name, gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
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
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """Load and fuse. kind: "causal" (a head over the vocabulary), "value" (a one-output head, which starts at 0 where
    the files hold none, so every reward is 0 at first) or "trained value" (such a head, which has to be there).

    ConfigError where the name leads to no model, or its files do not hold all of it.
    """
    model: Any
    needs_head, kind = kind == "trained value", kind.removeprefix("trained ")
    config = read_model_config(name, gguf_file)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    options |= {"config": config, "ignore_mismatched_sizes": True}
    if kind == "value":
        add_value_head(config)
    tensors = None
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    else:
        # No pickles, which may run any code.
        options["use_safetensors"] = True
        if (tensors := weight_tensors(name)) is not None:
            check_shapes(name, config, kind, tensors)
    factory: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForTokenClassification
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
    if kind == "causal":
        check_packed(model, name, device, dtype)
    return model


@torch.no_grad()
def check_packed(model: PreTrainedModel, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """ConfigError where the fused head does not say what the model itself says: some architectures scale logits
    or attention in ways of their own, and would train on wrong numbers without a word."""
    ids = torch.arange(8, device=device) % model.config.vocab_size
    training = model.training
    model.eval()
    with ordinary_attention(model):
        table = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
    layout, index = PackedLayout(torch.tensor([0, 8]), device), torch.arange(1, 8, device=device)
    positions = torch.arange(8, device=device)
    stats = model(ids, position_ids=positions, packed_layout=layout, response_index=index, targets=ids[1:])
    model.train(training)
    if not table.isfinite().all():
        raise ConfigError(
            f"model {name!r} computes logits that are not finite, from weights that are finite: they are too large for "
            f"{str(dtype).removeprefix('torch.')}. Was it trained in another type, or is it a run's that diverged?"
        )
    difference = float((stats.logprob - table.gather(1, ids[1:, None])[:, 0]).abs().max())
    if not difference < (1e-2 if dtype == torch.float32 else 0.5):
        raise ConfigError(
            f"model {name!r} ({type(model).__name__}) computes its logits in a way that the fused head does not know: "
            f"log-probabilities differ by {difference:.3g}; supported are Llama, Qwen2, Qwen3, SmolLM2 and their like"
        )


def check_window(model: PreTrainedModel, name: str, longest: int) -> None:
    """ConfigError where a layer looks back over fewer tokens than the longest sequence may have: packed attention has
    no sliding window."""
    window, kinds = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
    if window is None or (kinds and "sliding_attention" not in kinds) or window >= longest:
        return
    raise ConfigError(
        f"model {name!r} attends to the last {window} tokens only, and a sequence may have {longest} (a prompt and the "
        "longest response or solution): packed attention has no sliding window, so lower data.max_prompt_tokens, "
        "rollout.max_response_tokens or data.max_expert_tokens"
    )


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
    factory = AutoModelForTokenClassification if is_value else AutoModelForCausalLM
    return fuse(factory.from_config(config, dtype=config.dtype, attn_implementation="sdpa"))
