"""Whether a model's files hold the model that its config.json describes, and whether a run can use it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from repirl.config import ConfigError, first_line
from repirl.model_files import FILE_ERRORS, StoredTensor, refuse_quantised, shown
from repirl.value_head import HEAD_NAMES, head_name, own_attention

logger = logging.getLogger(__name__)

# Heads that read a number, or a class, off the hidden state, by the names that they have in public models.
HEADS = (*HEAD_NAMES, "v_head", "value_head", "reward_head", "regression_head")
_HEAD_WEIGHTS = tuple(f"{name}.weight" for name in HEAD_NAMES)
# Buffers of older versions that files may still hold and models compute themselves.
OLD_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias", ".position_ids")


def check_shapes(name: str, config: PretrainedConfig, kind: str, tensors: dict[str, StoredTensor]) -> None:
    """ConfigError where no model can be built as config.json says, or the files hold tensors of other shapes.

    config: with `add_value_head` where kind is "value". tensors: of the safetensors files (weight_tensors).
    """
    refuse_quantised(name, tensors)
    factory = AutoModelForCausalLM if kind == "causal" else AutoModelForTokenClassification
    try:
        with torch.device("meta"):
            model = factory.from_config(config, attn_implementation=own_attention(factory, config))
    except FILE_ERRORS as error:
        raise ConfigError(
            f"model {name!r} cannot be built as its config.json says ({type(error).__name__}: {first_line(error)})"
        ) from error
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, shape in expected.items():
        if key in tensors and tensors[key].shape != shape:
            refuse_shape(name, key, tensors[key].shape, shape)


def refuse_shape(name: str, key: str, shape: Iterable[int], expected: Iterable[int]) -> None:
    """ConfigError for a tensor whose shape is not what config.json says."""
    shape, expected = tuple(shape), tuple(expected)
    if key in _HEAD_WEIGHTS and shape[1:] == expected[1:]:
        raise ConfigError(
            f"the head {key!r} of model {name!r} has {shape[0]} outputs, and a reward is read off one: a classifier of "
            "steps into classes is another kind of PRM; start from a causal language model, or from a head with one "
            "output"
        )
    raise ConfigError(
        f"the files of model {name!r} hold {key!r} with shape {list(shape)}, its config.json says {list(expected)}: "
        "they do not belong together"
    )


class NonFiniteWeights(ConfigError):
    """Weights that are NaN or infinite."""


def refuse_nonfinite(name: str, keys: list[str], files: dict[str, StoredTensor] | None) -> None:
    """NonFiniteWeights where there are any.

    Args:
        name: of the model.
        keys: names of tensors that are not finite.
        files: where tensors are (weight_tensors); None where that is not known.
    """
    if not keys:
        return
    places = sorted({files[key].path for key in keys if key in files}) if files is not None else []
    where = f" (in {shown(places, 2)})" if places else ""
    raise NonFiniteWeights(
        f"model {name!r} holds NaN or infinity in {shown(keys)}{where}: nothing can be computed with it; download or "
        "save it again, or take an earlier checkpoint of the run that it comes from"
    )


def check_loaded(model: PreTrainedModel, name: str, info: dict[str, Any], *, kind: str, needs_head: bool) -> None:
    """That a loaded model holds what the files hold, and nothing else.

    Args:
        model: just loaded.
        name: folder or hub id, for messages.
        info: what transformers says of the loading (output_loading_info).
        kind: "causal" or "value".
        needs_head: whether a value head has to be in the files; otherwise a new one, and only that, may be missing.

    Raises:
        ConfigError: where weights are missing or left over so that the model is not the one of the files.
    """
    for key, shape, expected in info["mismatched_keys"]:
        refuse_shape(name, key, shape, expected)
    missing, unexpected = set(info["missing_keys"]), sorted(info["unexpected_keys"])
    check_names(model, name, missing, unexpected, kind=kind, needs_head=needs_head)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if kind == "causal" and tied and head is not None and head.weight is not embeddings.weight:
        raise ConfigError(
            f"config.json of model {name!r} says tie_word_embeddings: true, but its files hold a head with other "
            "values than the embeddings: set it to false"
        )


def check_names(
    model: PreTrainedModel, name: str, missing: set[str], unexpected: list[str], *, kind: str, needs_head: bool
) -> None:
    """See check_loaded. missing, unexpected: names of tensors."""
    expected = set(model.state_dict())
    unexpected = [key for key in unexpected if not key.endswith(OLD_BUFFERS)]
    _refuse_prefix(name, unexpected, expected)
    heads, own = [key for key in unexpected if key.split(".")[0] in HEADS], head_name(model)
    if kind == "causal" and heads:
        raise ConfigError(
            f"model {name!r} is no language model: its files hold the head {heads[0]!r}, which gives numbers of its "
            "own; a language model's head (lm_head) is expected here. Its rewards are read by prm.reward: value"
        )
    if kind == "value" and heads:
        raise ConfigError(
            f"the files of model {name!r} hold the head {shown(heads)}, which is not the one that rewards are read "
            f"off (one linear layer {own!r} with one output), and would be left out: a head of several layers, or of "
            "another name, cannot be used; start from a causal language model"
        )
    if kind == "value":
        head = {key for key in missing if key.startswith(f"{own}.")}
        if needs_head and f"{own}.weight" in head:
            raise ConfigError(
                f"the files of {name!r} hold no head {own!r} that a reward could be read off, and a new one would give "
                "0 everywhere: it is no trained PRM of kind 'value'"
            )
        missing -= head
    if missing:
        left = f"; they hold {shown(unexpected)} instead" if unexpected else ""
        raise ConfigError(
            f"the files of model {name!r} lack {shown(sorted(missing))}, which would stay random{left}: the files are "
            "not complete, or not of the model in config.json"
        )
    inner = [key for key in unexpected if key.startswith(f"{model.base_model_prefix}.")]
    if inner:
        raise ConfigError(
            f"the files of model {name!r} hold {shown(inner)}, which the model of its config.json "
            f"({type(model).__name__}) does not have and would compute without: config.json is not the one of the files"
        )
    others = [key for key in unexpected if kind == "causal" or not key.startswith(("lm_head.", "embed_out."))]
    if others:
        logger.warning("%s: its files hold %s, which the model does not have; left out", name, shown(others))


def _refuse_prefix(name: str, unexpected: list[str], expected: set[str]) -> None:
    """Names that would be right without their first parts: a wrapper was saved instead of the model."""
    for key in unexpected:
        parts = key.split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in expected:
                prefix = ".".join(parts[:count]) + "."
                raise ConfigError(
                    f"the files of model {name!r} hold {key!r}, expected {key.removeprefix(prefix)!r}: the names have "
                    f"the prefix {prefix!r}, as a wrapper around the model leaves it; save the model without it"
                )


# What a run asks of a model.


def longest_position(config: PretrainedConfig) -> tuple[int, str] | None:
    """Tokens that a sequence may have for a model's positions, and the option in config.json that says so; None where
    nothing limits them. RoPE scaling of kinds whose frequencies do not depend on the batch extends them."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [scaling] if "rope_type" in scaling or "factor" in scaling else scaling.values()
    limits = [_scaled(limit, kind) for kind in kinds if isinstance(kind, dict)]
    return min(limits, default=(limit, "max_position_embeddings"))


def _scaled(limit: int, scaling: dict[str, Any]) -> tuple[int, str]:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    factor = scaling.get("factor") or 1.0
    original = scaling.get("original_max_position_embeddings")
    if kind == "linear":
        return int(limit * factor), f"max_position_embeddings times the factor of its {kind} RoPE scaling"
    if kind == "yarn":
        return max(limit, int((original or limit) * factor)), f"{kind} RoPE scaling"
    if kind == "longrope" and original:
        # Beyond it the frequencies are others, for every sequence that happens to share a forward pass with a long one.
        return min(limit, original), "original_max_position_embeddings of its longrope scaling"
    return limit, "max_position_embeddings"


def check_positions(config: PretrainedConfig, name: str, longest: int) -> None:
    """ConfigError where the longest sequence may be longer than the model's positions."""
    limit = longest_position(config)
    if limit is not None and limit[0] < longest:
        raise ConfigError(
            f"model {name!r} has positions for {limit[0]} tokens ({limit[1]} in its config.json), and a sequence may "
            f"have {longest} (a prompt and the longest response or solution): lower data.max_prompt_tokens, "
            "rollout.max_response_tokens or data.max_expert_tokens, or set the RoPE scaling in config.json that the "
            "model is made for"
        )


def check_vocabulary(config: PretrainedConfig, name: str, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """ConfigError where a tokenizer (of `whose`) has ids that the model has no embedding for."""
    size = getattr(config, "vocab_size", None)
    if size is None:
        return
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=lambda t: vocabulary[t])
    if vocabulary[token] >= size:
        raise ConfigError(
            f"the tokenizer of {whose!r} has the token {token!r} with id {vocabulary[token]}, but model {name!r} has "
            f"embeddings for {size} tokens only (vocab_size): give the tokenizer that the model was made with, or "
            "resize the model's embeddings"
        )


def check_same_tokenizer(
    ours: PreTrainedTokenizerBase, whose: str, theirs: PreTrainedTokenizerBase, other: str
) -> None:
    """ConfigError where two models that read the same token ids take them for different text. The second one may know
    more tokens."""
    first, second = ours.get_vocab(), theirs.get_vocab()
    differing = sorted(token for token, number in first.items() if second.get(token) != number)
    if not differing:
        return
    token = min(differing, key=lambda t: first[t])
    meant = f"{second[token]}" if token in second else "no id at all"
    raise ConfigError(
        f"the tokenizers of {whose!r} and {other!r} differ in {len(differing)} of {len(first)} tokens (sizes "
        f"{len(first)} and {len(second)}): {token!r} has id {first[token]} in the first and {meant} in the second. "
        "Both models read the same token ids, so both need the same tokenizer: take two models of one family"
    )
