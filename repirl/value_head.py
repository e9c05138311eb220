"""The head of one output that a value is read off, in models of any family.

transformers has a class `...ForTokenClassification` for about half of its decoder families. The others get one here,
made of the same parts: the family's own base model, and the generic head of transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PretrainedConfig
from transformers.modeling_layers import GenericForTokenClassification

# The names of this head in transformers' classes.
HEAD_NAMES = ("score", "classifier")


def add_value_head(config: PretrainedConfig) -> None:
    """Let a model's configuration be that of a token classifier with one output, in place, and see to it that
    AutoModelForTokenClassification has a class for it."""
    config.num_labels, config.classifier_dropout = 1, 0.0
    register_classifier(config)


def register_classifier(config: PretrainedConfig) -> None:
    """Give AutoModelForTokenClassification a class for the family of `config`, if transformers has none.

    Nothing happens where the family has no causal language model either: loading says so.
    """
    kind = type(config)
    causal: Any = AutoModelForCausalLM._model_mapping.get(kind, None)
    if causal is None or has_classifier(config):
        return
    # The class of the whole family is the last one before transformers' own.
    family = next(base for base in causal.__mro__ if base.__name__.endswith("PreTrainedModel"))
    name = causal.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "ForTokenClassification"
    # Weights of the base keep their names, so that a causal language model's files can be read.
    members = {"base_model_prefix": causal.base_model_prefix, "config_class": kind, "__module__": __name__}
    classifier = type(name, (GenericForTokenClassification, family), members)
    # exist_ok, because transformers otherwise ignores new classes for its own configurations, without a word.
    AutoModelForTokenClassification.register(kind, classifier, exist_ok=True)


def has_classifier(config: PretrainedConfig) -> bool:
    """Whether AutoModelForTokenClassification has a class for the family of `config`."""
    return AutoModelForTokenClassification._model_mapping.get(type(config), None) is not None


def own_attention(factory: Any, config: PretrainedConfig) -> str:
    """The attention that a model computes padded batches with: PyTorch's fused one, where its class knows it."""
    model_class = factory._model_mapping.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def head_name(model: nn.Module) -> str | None:
    """The name of a token classifier's linear head; None where it has none."""
    return next((name for name in HEAD_NAMES if isinstance(getattr(model, name, None), nn.Linear)), None)
