"""Models that compute packed sequences, with a head that never makes logits.

A model keeps its Hugging Face class's parameters, `save_pretrained` and `generate`; only its `forward` learns
one more way to be called: on packed sequences, returning what the trainer needs and never the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from repirl_kernels import linear_token_stats
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from repirl.attention import PACKED, PackedLayout
from repirl.batch import PackedBatch
from repirl.config import ConfigError
from repirl.value_head import head_name


class FusedHead(nn.Linear):
    """An lm_head that, given targets, returns token statistics instead of logits."""

    def forward(self, input: Tensor, targets: Tensor | None = None, **options: Any) -> Any:
        if targets is None:
            return super().forward(input)
        return linear_token_stats(input, self.weight, targets, bias=self.bias, **options)


def _hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, layout: PackedLayout) -> Tensor:
    """Hidden states [T, D] of packed sequences: in one pass over all of them, or by groups, as padded batches.

    Padding stands behind each sequence, where no token of a causal model looks at it, whatever its attention is.
    """
    backbone = getattr(model, model.base_model_prefix)
    if model.packs:
        positions = position_ids[None]
        output = backbone(input_ids=input_ids[None], position_ids=positions, use_cache=False, packed_layout=layout)
        hidden = output.last_hidden_state[0]
    else:
        parts = (backbone(input_ids=input_ids[index], use_cache=False).last_hidden_state for index in layout.groups)
        hidden = torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, layout.inverse)
    assert isinstance(hidden, Tensor)
    return hidden


def layout_for(model: PreTrainedModel, cu_seqlens: Tensor, device: torch.device) -> PackedLayout:
    """The layout of packed sequences that begin and end at cu_seqlens [S + 1], for a fused model on a device."""
    # All processes of a sharded model have to make the same number of passes.
    one_group = isinstance(model, FSDPModule) and not model.packs
    return PackedLayout(cu_seqlens, device, one_group=one_group)


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
        config = self.config  # type: ignore[attr-defined]
        options: dict[str, Any] = {"temperature": temperature * _logit_divisor(config)}
        options["softcap"] = getattr(config, "final_logit_softcapping", None)
        # The state of action t is the hidden state one token earlier.
        states = hidden[response_index - 1]  # type: ignore[operator]
        return self.get_output_embeddings()(states, targets, **options)  # type: ignore[attr-defined]


def _logit_divisor(config: PretrainedConfig) -> float:
    """What a model divides its logits by: Granite by `logits_scaling`, and Cohere multiplies them by `logit_scale`."""
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    return (divisor or 1.0) / (factor if isinstance(factor, float | int) and factor else 1.0)


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
        head = getattr(self, head_name(self))  # type: ignore[arg-type]
        return head(hidden[response_index])[:, 0].float()


# Kinds of layers (`layer_types` in config.json) that let tokens mix by attention only.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """Teach a loaded causal LM or token classifier the packed forward, and switch off what is random in it, in place;
    returns it.

    `model.packs` says how it computes packed sequences: in one pass, by this package's attention, or as padded batches
    with its own, where it takes no other.

    ConfigError where the model has no linear head over the vocabulary or of one output, or is no language model alone.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if model.config.get_text_config(decoder=True) is not model.config:
        raise ConfigError(
            f"{name} is more than a language model (it also reads images or sound): save its language model alone, as "
            "a causal language model of its own, and give that"
        )
    if isinstance(head, nn.Linear):
        head.__class__ = FusedHead
        mixin: type = PackedCausalLM
    elif head_name(model) is not None:
        mixin = PackedTokenClassifier
    else:
        raise ConfigError(
            f"{name} has no linear head: a causal language model of transformers whose logits come from one linear "
            "layer is expected"
        )
    model.__class__ = type(name, (mixin, type(model)), {"__module__": type(model).__module__})
    _switch_off_noise(model)
    layers = set(getattr(model.config, "layer_types", None) or ())
    model.__dict__["own_attention"] = model.config._attn_implementation
    model.__dict__["packs"] = model._supports_attention_backend and layers <= _ATTENTION and not model._is_stateful
    if model.packs:
        model.config._attn_implementation = PACKED
    return model


def _switch_off_noise(model: PreTrainedModel) -> None:
    """No dropout, of activations or of whole layers, and no jitter of routers: rollouts and updates must use the same
    distribution. Most models have them as modules, some as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or "jitter" in key):
                setattr(module, key, 0.0)


def pad(model: PreTrainedModel) -> None:
    """Let a fused model compute packed sequences as padded batches, with its own attention, from now on."""
    model.__dict__["packs"] = False
    model.config._attn_implementation = str(model.own_attention)


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
    head_size = config.hidden_size if reads_values else model.get_output_embeddings().weight.numel()
    embeddings = embedding_weight(model).numel()
    per_token = 2 * (sum(p.numel() for p in backbone.parameters()) - embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Two products (scores, and values weighted by them), two operations each, half of it masked.
    per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim
    lengths, responses = batch.lengths.double(), batch.response_cu_seqlens.diff()
    return (per_token * lengths + per_pair * lengths**2 + 2 * head_size * responses).tolist()


@contextmanager
def ordinary_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model runs padded batches with a KV cache (its own attention), as for generation."""
    before, model.config._attn_implementation = model.config._attn_implementation, str(model.own_attention)
    try:
        yield
    finally:
        model.config._attn_implementation = before
