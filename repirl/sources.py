"""The models that a configuration names, checked before data is read and weights are loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from repirl.config import Config, ConfigError
from repirl.model_checks import check_positions, check_same_tokenizer, check_shapes, check_vocabulary
from repirl.model_files import find_file, of_same_export, read_model_config, weight_tensors
from repirl.models import load_tokenizer
from repirl.value_head import add_value_head

# Any of these makes a folder one with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def check_sources(config: Config) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, after all models that a run starts from have been looked at.

    Raises:
        ConfigError: where the files of one are damaged, of another kind, or do not fit the options or each other.
    """
    policy, prm = config.policy, config.prm
    described = check_source(policy.model, policy.gguf_file, "causal")
    tokenizer = load_tokenizer(policy.model, policy.gguf_file)
    _check_use(config, policy.model, described, tokenizer)
    _check_role(policy.model, described, None)
    if prm.model is not None and config.system.has_prm:
        described = check_source(prm.model, prm.gguf_file, "value" if prm.reward == "value" else "causal")
        _check_use(config, prm.model, described, tokenizer)
        _check_role(prm.model, described, prm.reward)
        check_tokenizers(tokenizer, policy.model, prm.model, prm.gguf_file)
    critic = config.critic
    if critic.model is not None and "critic" in config.system.trains:
        _check_use(config, critic.model, check_source(critic.model, critic.gguf_file, "value"), tokenizer)
        check_tokenizers(tokenizer, policy.model, critic.model, critic.gguf_file)
    return tokenizer


def _check_use(config: Config, name: str, described: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    check_positions(described, name, config.longest_sequence)
    check_vocabulary(described, name, tokenizer, config.policy.model)


def _check_role(name: str, config: PretrainedConfig, reward: str | None) -> None:
    """ConfigError where an exported PRM is to be a policy (reward None), or a PRM of another kind."""
    described = getattr(config, "repirl", None)
    if not isinstance(described, dict) or described.get("role") != "prm":
        return
    if reward is None:
        raise ConfigError(
            f"policy.model {name!r} is the PRM of an export (config.json, key `repirl`): "
            f"{of_same_export(name, 'policy')}"
        )
    if described.get("reward") != reward:
        raise ConfigError(
            f"prm.model {name!r} is an exported PRM whose rewards are of kind {described.get('reward')!r}, and "
            f"prm.reward is {reward!r}, which would read other numbers off it: set prm.reward to its kind, or start "
            "from a model that is no PRM"
        )


def check_source(name: str, gguf_file: str | None, kind: str) -> PretrainedConfig:
    """The model's configuration; ConfigError where its files cannot be what they should be. No weights are read."""
    config = read_model_config(name, gguf_file)
    tensors = weight_tensors(name) if gguf_file is None else None
    if tensors is not None:
        if kind == "value":
            add_value_head(config)
        check_shapes(name, config, kind, tensors)
    return config


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, whose: str, other: str, gguf_file: str | None = None) -> None:
    """ConfigError where the model `other` comes with a tokenizer that maps text to other ids. A model without any
    tokenizer is taken as it is."""
    if Path(other) == Path(whose):
        return
    if gguf_file is None and not any(find_file(other, file) for file in TOKENIZER_FILES):
        return
    check_same_tokenizer(tokenizer, whose, load_tokenizer(other, gguf_file), other)
