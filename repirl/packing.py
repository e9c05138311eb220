"""Whether a model computes for packed sequences what it computes for each alone, and what is done where it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from repirl.attention import NoLayoutError, PackedLayout
from repirl.config import ConfigError, first_line
from repirl.fused import PackedCausalLM, layout_for, ordinary_attention, pad
from repirl.model_files import FILE_ERRORS
from repirl.value_head import head_name

logger = logging.getLogger(__name__)

# Names in config.json of the number of tokens that a layer looks back over at most.
_WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk")

# What to do about a model that cannot be trained.
OTHERS = "take a causal language model of another family, such as Llama, Qwen3, Gemma, OLMo or Mistral"


@torch.no_grad()
def check_packed(model: PreTrainedModel, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """See that a fused model computes for packed sequences, as it is trained, what the model itself computes for each
    alone. Where packing changes that, it pads from now on.

    ConfigError where that does not help: some architectures scale logits in ways of their own, and would train on
    wrong numbers without a word.
    """
    ids = torch.arange(8, device=device) % model.config.vocab_size
    try:
        expected = _plain_outputs(model, [ids[:5], ids[5:]])
    except FILE_ERRORS as error:
        raise ConfigError(
            f"model {name!r} ({type(model).__name__}) does not run as transformers has it ({type(error).__name__}: "
            f"{first_line(error)}); {OTHERS}"
        ) from error
    if not expected.isfinite().all():
        raise ConfigError(
            f"model {name!r} computes outputs that are not finite from weights that are finite: they are too large for "
            f"{str(dtype).removeprefix('torch.')}. Was it trained in another type, or is it a run's that diverged?"
        )
    allowed = 1e-2 if dtype == torch.float32 else 0.5
    if model.packs and not _packs_right(model, ids, expected, allowed):
        logger.info("%s: the model does not compute packed sequences as each alone; they are padded instead", name)
        pad(model)
    layout = layout_for(model, torch.tensor([0, 5, 8]), ids.device)
    difference = _difference(_packed_outputs(model, ids, layout), expected)
    if not difference < allowed:
        what = "log-probabilities" if isinstance(model, PackedCausalLM) else "hidden states"
        raise ConfigError(
            f"model {name!r} ({type(model).__name__}) computes its outputs in a way that the trainer does not know: "
            f"{what} differ by {difference:.3g}; {OTHERS}"
        )


def _packs_right(model: PreTrainedModel, ids: Tensor, expected: Tensor, allowed: float) -> bool:
    layout = layout_for(model, torch.tensor([0, 5, 8]), ids.device)
    try:
        actual = _packed_outputs(model, ids, layout)
    except NoLayoutError:
        # Arguments of the model's forward do not reach its attention.
        return False
    return not layout.unknown and _difference(actual, expected) < allowed


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


def _plain_outputs(model: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    """What check_packed compares, by the model itself: log-probabilities of all tokens but each sequence's first, or
    what goes into a value head, in units of the largest number in it."""
    training = model.training
    model.eval()
    with ordinary_attention(model):
        if isinstance(model, PackedCausalLM):
            tables = [model(ids[None]).logits[0, :-1].float().log_softmax(-1) for ids in sequences]
            chosen = [table.gather(1, ids[1:, None])[:, 0] for table, ids in zip(tables, sequences, strict=True)]
        else:
            with _head_inputs(model) as hidden:
                for ids in sequences:
                    model(ids[None])
            chosen = [rows[0, 1:] for rows in hidden]
    model.train(training)
    return torch.cat(chosen) if isinstance(model, PackedCausalLM) else _scaled(torch.cat(chosen))


def _packed_outputs(model: PreTrainedModel, ids: Tensor, layout: PackedLayout) -> Tensor:
    """The same by the packed forward, in training mode."""
    cu = layout.cu_seqlens.long()
    starts = cu[:-1].repeat_interleave(cu.diff())
    positions = torch.arange(len(ids), device=ids.device) - starts
    index = (positions > 0).nonzero()[:, 0]
    inputs = {"position_ids": positions, "packed_layout": layout, "response_index": index}
    training = model.training
    model.train()
    try:
        if isinstance(model, PackedCausalLM):
            logprob: Tensor = model(ids, targets=ids[index], **inputs).logprob
            return logprob
        with _head_inputs(model) as hidden:
            model(ids, **inputs)
        return _scaled(hidden[0])
    finally:
        model.train(training)


def _scaled(hidden: Tensor) -> Tensor:
    return hidden.float() / hidden.float().abs().max().clamp_min(1e-30)


@contextmanager
def _head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what a token classifier's head gets. ConfigError where it has another size than the head takes."""
    collected: list[Tensor] = []
    head = getattr(model, head_name(model) or "")

    def collect(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        size = inputs[0].shape[-1]
        if size != head.in_features:
            raise ConfigError(
                f"{type(model).__name__}: hidden states have {size} numbers and a value head takes {head.in_features} "
                "(hidden_size in config.json): such a model can be a PRM by prm.reward: logit, soft_q, logprob or "
                "implicit"
            )
        collected.append(inputs[0])

    hook = head.register_forward_pre_hook(collect)
    try:
        yield collected
    finally:
        hook.remove()


def fit_window(model: PreTrainedModel, name: str, longest: int) -> None:
    """Let a model pad where a layer looks back over fewer tokens than the longest sequence may have: packed attention
    has no window."""
    kinds = getattr(model.config, "layer_types", None)
    windows = [window for key in _WINDOWS if isinstance(window := getattr(model.config, key, None), int)]
    if not model.packs or not windows or min(windows) >= longest or (kinds and set(kinds) == {"full_attention"}):
        return
    logger.info(
        "%s: a layer attends to the last %d tokens only, and a sequence may have %d: sequences are padded, not packed",
        name,
        min(windows),
        longest,
    )
    pad(model)
