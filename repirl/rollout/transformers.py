"""Sampling with the training model itself: no second copy of the weights, any device, exact log-probs.

Each distinct prompt is prefilled once, rows that ended leave the batch, and every sequence draws from a
its own random generator. So a response does not depend on the others that are sampled with it, except for rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.rollout.engine import Response, Sampling


class TransformersEngine:
    """Samples with the policy's own model.

    A sharded model is gathered during a call of `generate`, so that the processes need not sample equally many tokens.

    Args:
        policy: the learner whose model samples.
        pad_id: fills up shorter prompts in a batch.
        max_sequences: the largest number of responses that are decoded in one batch.

    Raises:
        ConfigError: the model has layers whose state is no KV cache.
    """

    def __init__(self, policy: Learner, *, pad_id: int, max_sequences: int) -> None:
        self.policy = policy
        self.pad_id = pad_id
        self.max_sequences = max_sequences
        layers = DynamicCache(config=policy.model.config).layers
        if any(not hasattr(layer, "batch_select_indices") for layer in layers):
            raise ConfigError(
                f"{type(policy.model).__name__} has recurrent layers, whose state cannot be cached here while several "
                "prompts are sampled at once: it cannot be sampled from in this process; choose another "
                "rollout.engine, or another model"
            )

    # They are the policy's own.
    has_weights = True

    def update_weights(self, policy: Learner) -> None:
        """Nothing to do: the engine samples with the policy's own model."""

    def sleep(self) -> None:
        """Nothing to free: the weights are the trainer's, and a cache exists only during a call of `generate`."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """See Engine.generate.

        Raises:
            ValueError: a prompt is empty, or there are not as many seeds as prompts.
            ConfigError: the model's `forward` takes no KV cache.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"one seed a prompt is needed, got {len(prompts)} prompts and {len(seeds)} seeds")
        if any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("a prompt has no tokens; sampling needs at least one")
        # Put prompts of similar length into one batch: that needs little padding.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
        responses: dict[int, Response] = {}
        with self.policy.ordinary_model() as model:
            for start in range(0, len(order), self.max_sequences):
                chunk = order[start : start + self.max_sequences]
                decoded = self._decode(model, [prompts[i] for i in chunk], [seeds[i] for i in chunk], sampling)
                responses.update(zip(chunk, decoded, strict=True))
        return [responses[i] for i in range(len(prompts))]

    def _decode(
        self, model: PreTrainedModel, prompts: list[Sequence[int]], seeds: list[int], sampling: Sampling
    ) -> list[Response]:
        device = self.policy.device
        limit = sampling.max_response_tokens
        unique = list(dict.fromkeys(map(tuple, prompts)))
        longest = max(map(len, unique))
        ids = torch.tensor([[self.pad_id] * (longest - len(p)) + list(p) for p in unique], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique], device=device)
        cache = _growing_cache(model)
        options: dict[str, Any] = {cache_argument(type(model)): cache, "use_cache": True, "logits_to_keep": 1}
        logits = _forward(model, ids, mask, options)
        rows = torch.tensor([unique.index(tuple(p)) for p in prompts], device=device)
        cache.batch_select_indices(rows)
        logits, mask = logits[rows], mask[rows]

        uniforms = torch.stack(
            [torch.rand(limit, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        ).to(device)
        end_ids = torch.tensor(sampling.end_ids, device=device)
        tokens = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(len(prompts), limit, device=device)
        lengths = torch.full((len(prompts),), limit, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        alive = torch.arange(len(prompts), device=device)
        for step in range(limit):
            chosen, logprob = _sample(logits, uniforms[alive, step], sampling.temperature)
            tokens[alive, step], logprobs[alive, step] = chosen, logprob
            done = torch.isin(chosen, end_ids)
            ended[alive[done]] = True
            lengths[alive[done]] = step + 1
            if bool(done.all()) or step + 1 == limit:
                break
            if bool(done.any()):
                keep = (~done).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, mask, chosen = alive[keep], mask[keep], chosen[keep]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            logits = _forward(model, chosen[:, None], mask, options)
        return [
            Response(tokens[i, :n].tolist(), logprobs[i, :n].tolist(), e)
            for i, (n, e) in enumerate(zip(lengths.tolist(), ended.tolist(), strict=True))
        ]


def cache_argument(model_class: type) -> str:
    """The name of the argument through which a model's `forward` takes its KV cache.

    It is `cache`, or `past_key_values` in older releases and models. With the wrong name `forward` would put the cache
    into its **kwargs without an error, and each token would be sampled without the tokens before it.

    Raises:
        ConfigError: `forward` has neither argument.
    """
    for base in model_class.__mro__:
        # The first `forward` in the MRO that names it: a mixin's `forward` may only pass on **kwargs.
        if (forward := vars(base).get("forward")) is not None:
            parameters = inspect.signature(forward).parameters
            for name in ("cache", "past_key_values"):
                if name in parameters:
                    return name
    raise ConfigError(
        f"{model_class.__name__}.forward takes no KV cache, neither as `cache` nor as `past_key_values`: it cannot be "
        "sampled from in this process; choose another rollout.engine, or another model"
    )


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    positions = (mask.cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1]


# Further tokens for which a cache has room when its tensors have to grow.
CACHE_ROOM = 64


class _GrowingLayer(DynamicLayer):
    """A layer's cache in tensors with room for further tokens; DynamicLayer copies the whole cache for each token."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[Tensor] = []  # keys and values, [B, heads, tokens and room, size]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See DynamicLayer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, new = self.get_seq_length(), (key_states, value_states)
        length = old + key_states.shape[-2]
        if not self._tensors or self._tensors[0].shape[-2] < length:
            shapes = [(*states.shape[:-2], length + CACHE_ROOM, states.shape[-1]) for states in new]
            grown = [states.new_empty(shape) for states, shape in zip(new, shapes, strict=True)]
            for tensor, before in zip(grown, self._tensors, strict=False):
                tensor[:, :, :old] = before[:, :, :old]
            self._tensors = grown
        for tensor, states in zip(self._tensors, new, strict=True):
            tensor[:, :, old:length] = states
        return self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See DynamicLayer."""
        if self._tensors:  # of a layer that uses another one's keys there are none
            self._tensors = [tensor.index_select(0, indices) for tensor in self._tensors]
            self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (tensor[:, :, :length] for tensor in self._tensors)
        self.keys, self.values = keys, values
        return keys, values


def _growing_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache for the model, whose layers of full attention grow in place; those of other kinds are transformers'."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _sample(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniform [B] in [0, 1) -> token [B], its log-probability [B] under the tempered softmax."""
    logits = logits.float()
    if temperature == 0:
        chosen = logits.argmax(-1)
        return chosen, torch.log_softmax(logits, -1).gather(1, chosen[:, None])[:, 0]
    scaled = logits / temperature if temperature != 1.0 else logits
    largest = scaled.amax(-1, keepdim=True)
    # Sample by inverting the cumulative distribution. In float64, so that rounding does not lose the tail of a large
    # vocabulary.
    cumulative = (scaled - largest).exp_().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    chosen = chosen.clamp_(max=logits.shape[-1] - 1)
    logprob = (scaled.gather(1, chosen) - largest) - total.log().float()
    return chosen[:, 0], logprob[:, 0]
