"""Sizes of a model, from its configuration alone, and what autograd saves of each operation of a decoder layer.

Symbols: D features of hidden states; H query heads with d features each; V tokens in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from repirl.config import ConfigError, first_line
from repirl.model_files import read_model_config

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QKV, _OUT = tuple(f"self_attn.{x}_proj" for x in "qkv"), "self_attn.o_proj"
_GATE_UP, _DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
LINEAR = (*_QKV, _OUT, *_GATE_UP, _DOWN)
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """The shapes of a decoder's weights, all of whose layers are alike."""

    # Of one layer, by name.
    layer: dict[str, Sizes]
    # [V, D].
    embeddings: Sizes
    # Of the output embeddings; None where they are tied to the input's.
    head: Sizes | None
    num_layers: int
    num_heads: int

    @property
    def hidden(self) -> int:
        return self.embeddings[1]

    @property
    def vocab(self) -> int:
        return self.embeddings[0]

    @property
    def intermediate(self) -> int:
        return self.layer[f"{_DOWN}.weight"][1]

    @property
    def query(self) -> int:
        """Features of all query heads, H d."""
        return self.layer[f"{_QKV[0]}.weight"][0]

    @property
    def key(self) -> int:
        """Features of all key heads; the value heads have as many."""
        return self.layer[f"{_QKV[1]}.weight"][0]

    @property
    def head_dim(self) -> int:
        return self.query // self.num_heads

    @property
    def has_head_norms(self) -> bool:
        return _HEAD_NORMS[0] in self.layer

    @property
    def layer_values(self) -> int:
        """Numbers in the weights of one layer."""
        return sum(map(math.prod, self.layer.values()))

    @property
    def num_values(self) -> int:
        """Numbers in all weights of the causal language model."""
        return sum(map(math.prod, self.weights()))

    def weights(self, reads_values: bool = False) -> list[Sizes]:
        """Every weight's shape. reads_values: of a model with a one-output head in place of the output embeddings."""
        heads: list[Sizes] = [(1, self.hidden), (1,)] if reads_values else [self.head] if self.head else []
        return [*list(self.layer.values()) * self.num_layers, self.embeddings, (self.hidden,), *heads]


def read_shape(config: PreTrainedConfig) -> Shape:
    """The shape of a configuration's causal language model.

    Raises:
        ConfigError: for anything but Llama's structure; it names the weights that are missing or not known here.
    """
    name = config.model_type
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"model type {name!r} is not understood: {first_line(error)}") from error
    weights = {key: tuple(p.shape) for key, p in model.named_parameters()}
    prefix, count = f"{model.base_model_prefix}.layers.", getattr(config, "num_hidden_layers", 0)
    layers = [_below(weights, f"{prefix}{i}.") for i in range(count)]
    others = {key: shape for key, shape in weights.items() if not key.startswith(prefix)}
    known = {*_NORMS, *_HEAD_NORMS, *(f"{x}.{part}" for x in LINEAR for part in ("weight", "bias"))}
    needed = {*_NORMS, *(f"{x}.weight" for x in LINEAR)}
    embeddings, norm = (f"{model.base_model_prefix}.{x}.weight" for x in ("embed_tokens", "norm"))
    present = set().union(*layers)
    missing = sorted((needed - present) | ({embeddings, norm} - set(others)))
    unknown = sorted((present - known) | (set(others) - {embeddings, norm, "lm_head.weight"}))
    if missing or unknown:
        parts = [f"it has no {missing}"] * bool(missing) + [f"it has {unknown}, which is not known here"] * bool(
            unknown
        )
        raise ConfigError(
            f"the memory of model type {name!r} cannot be planned: {' and '.join(parts)}; supported are decoder models "
            "with Llama's structure (Llama, Qwen2, Qwen3, SmolLM2, Mistral, ...)"
        )
    if any(layer != layers[0] for layer in layers):
        raise ConfigError(f"the memory of model type {name!r} cannot be planned: its layers differ from each other")
    return Shape(layers[0], weights[embeddings], others.get("lm_head.weight"), count, config.num_attention_heads)


def load_shape(name: str, gguf_file: str | None = None) -> Shape:
    """The shape of a model, read from its `config.json` alone.

    Raises:
        ConfigError: where that file cannot be read, or as of `read_shape`.
    """
    return read_shape(read_model_config(name, gguf_file))


def _below(weights: dict[str, Sizes], prefix: str) -> dict[str, Sizes]:
    return {key.removeprefix(prefix): shape for key, shape in weights.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Micro:
    """The numbers of a micro-batch that its memory depends on."""

    tokens: int
    # Response tokens among them.
    responses: int
    # Sequences, and tokens of the longest, of each group that attention pads where it has no packed kernel.
    groups: tuple[tuple[int, int], ...]

    @property
    def slots(self) -> int:
        """Positions that padded attention computes."""
        return sum(rows * longest for rows, longest in self.groups)


@dataclass(frozen=True)
class Precision:
    """How many bytes the values of a pass take, and how attention and linear layers compute with them."""

    # Of parameters and their gradients.
    kept: int
    # Of activations and gathered weights.
    computed: int
    # Of adapters in products; None where all weights are trained.
    adapted: int | None = None
    # The linear layers that have an adapter, and its rank.
    adapters: tuple[str, ...] = ()
    rank: int = 0
    # Attention runs on packed sequences, without padding.
    kernel: bool = False
    # Attention needs keys and values repeated for every query head.
    repeated: bool = False


def layer_saved_bytes(shape: Shape, micro: Micro, precision: Precision) -> int:
    """Bytes that autograd saves of one decoder layer, as transformers computes it."""
    width, wide, query, key = shape.hidden, shape.intermediate, shape.query, shape.key
    size, trains_all = precision.computed, precision.adapted is None

    def inputs(features: int, layers: Sequence[str]) -> int:
        """The saved input, for a token, that these linear layers have in common: gradients of their weights need it."""
        if precision.adapted is None:
            return size * features
        adapted = [x for x in layers if x in precision.adapters]
        if not adapted:
            return 0
        # An adapter of another type has a copy of its input for itself.
        copies = 1 if precision.adapted == size else len(adapted)
        return precision.adapted * (features * copies + precision.rank * len(adapted))

    def norm(features: int, count: int = 1) -> int:
        # The input in float32 and one factor for each norm; also what the weight multiplies, for its gradient.
        return 4 * (features + count) + (size * features if trains_all else 0)

    each = 2 * norm(width) + inputs(width, _QKV) + inputs(query, [_OUT]) + inputs(width, _GATE_UP)
    # The gate before and after its activation, what it is multiplied with, and the product.
    each += 3 * size * wide + inputs(wide, [_DOWN])
    if shape.has_head_norms:
        each += norm(query, shape.num_heads) + norm(key, key // shape.head_dim)
    attention = (2 * query + 2 * (query if precision.repeated else key)) * size + 4 * shape.num_heads
    if precision.kernel:
        # The next linear layer saves this output as its input, unless it makes a copy.
        shared = size * query if trains_all or (precision.adapted == size and _OUT in precision.adapters) else 0
        return micro.tokens * (each + attention - shared)
    return micro.tokens * each + micro.slots * attention


def saved_bytes(shape: Shape, micro: Micro, precision: Precision, *, checkpointing: bool, reads_values: bool) -> int:
    """Bytes that autograd has saved after a forward pass over a micro-batch."""
    width, size = shape.hidden, precision.computed
    layer = layer_saved_bytes(shape, micro, precision)
    trains_all = precision.adapted is None
    # The last norm, rotary factors, token and position ids.
    each = 4 * (width + 1) + size * (width if trains_all else 0) + 2 * size * shape.head_dim + 16
    total = micro.tokens * each
    if not precision.kernel:
        total += 8 * (micro.slots + micro.tokens)
    if checkpointing:
        total += shape.num_layers * size * width * micro.tokens
    else:
        total += shape.num_layers * layer
        if not trains_all:
            # Nothing before the first layer's adapters is trained, so that its first norm saves nothing.
            total -= micro.tokens * 4 * (width + 1)
    rows = size * width + 8 if reads_values else size * width + 28
    return total + micro.responses * rows


def recomputed_bytes(shape: Shape, micro: Micro, precision: Precision) -> int:
    """Bytes that backward holds of the layer that it computes again, with gradient checkpointing."""
    # In float32 the layer's input is among what was saved.
    shared = 4 * shape.hidden * micro.tokens if precision.computed == 4 else 0
    return layer_saved_bytes(shape, micro, precision) - shared


def forward_bytes(shape: Shape, micro: Micro, precision: Precision) -> int:
    """The most bytes that a forward pass without gradients holds at a time, weights left out."""
    width, wide, size = shape.hidden, shape.intermediate, precision.computed
    # Embeddings, the layer's input, the residual and the normed input; in the MLP both projections and their product.
    held = 4 * size * width
    mlp = 3 * size * wide
    if precision.adapted is not None:
        # The adapter's share, and its sum with the layer's output.
        mlp = 4 * max(size, precision.adapted) * wide
        held += precision.adapted * width if precision.adapted != size else 0
    # Queries, keys and values; where there is no kernel the same in padded groups, too; and the output.
    attention = size * (shape.query + 2 * shape.key) * micro.tokens
    if precision.kernel:
        attention += size * shape.query * micro.tokens
    elif precision.repeated:
        attention += size * (2 * shape.query * micro.tokens + 4 * shape.query * micro.slots)
    else:
        attention += size * (2 * shape.query + 2 * shape.key) * micro.slots
    return held * micro.tokens + max(mlp * micro.tokens, attention)


def backward_bytes(shape: Shape, micro: Micro, precision: Precision) -> int:
    """The most bytes that backward holds beyond what is saved: gradients of the MLP's three products."""
    if precision.adapted is not None and precision.adapted != precision.computed:
        return 3 * precision.adapted * shape.intermediate * micro.tokens
    # One of them is freed before the last is made.
    return 2 * precision.computed * shape.intermediate * micro.tokens
