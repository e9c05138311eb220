"""Policy and PRM of a checkpoint as plain Hugging Face models that say of themselves how they are used."""

from __future__ import annotations

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
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import Config, ConfigError
from repirl.configfile import load_config
from repirl.distributed.world import World
from repirl.learner import Learner
from repirl.modelcard import model_card
from repirl.models import build_model, load_tokenizer, quiet_transformers, save_tokenizer
from repirl.prm import FORMAT, PRMDescription, PromptFormat, ReferenceModel, StepRule
from repirl.run import PRM_TEMPERATURE, build_learners
from repirl.value_head import add_value_head, head_name
from repirl.work import Work

# The learners of which an export has a folder.
EXPORTED = ("policy", "prm")


def export_checkpoint(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    step_separator: str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Export policy and PRM of a checkpoint into OUTPUT/policy and OUTPUT/prm.

    Plain `AutoModelForCausalLM` and `AutoModelForTokenClassification` load them back, and `prm.load_prm` the PRM: its
    config.json says under `repirl` how its rewards are read. Adapters are worked into the weights of their base, which
    has to be where the run found it.

    Args:
        checkpoint: a run's folder or a step_N folder.
        output: gets a folder for each model.
        step_separator: what ends a step of a response, for whoever scores steps by the PRM; None for the run's
            `data.step_separator`.
        dtype: of the weights written; by default as they were trained.

    Returns:
        The folders written.

    Raises:
        ConfigError: where the checkpoint is missing, damaged, or not one, or has weights that `dtype` cannot hold.
    """
    quiet_transformers()
    folder = resolve_checkpoint(checkpoint)
    config = load_config(folder / "config.yaml")
    models = _merged(folder, config) if config.adapters is not None else _whole(folder)
    written = []
    for name, model in models.items():
        tokenizer, target = load_tokenizer(str(folder / name)), Path(output) / name
        if dtype is not None:
            _round(model, name, dtype)
        # transformers keeps keys that it does not know; one of a model that this one was trained from is replaced.
        described = describe_prm(config, step_separator, str(Path(output) / "policy")) if name == "prm" else None
        model.config.repirl = describe_policy(config) if described is None else described.model_dump(mode="json")
        settings = _generation_settings(folder / name, tokenizer)
        if described is None:
            # Others may be what transformers does not like to save, and are written below.
            special = ("bos_token_id", "eos_token_id", "pad_token_id")
            model.generation_config = GenerationConfig(**{key: settings.get(key) for key in special})
        model.save_pretrained(target)
        if described is None and len(settings) > len(special):
            (target / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_tokenizer(tokenizer, target)
        (target / "README.md").write_text(model_card(name, config, type(model).__name__, described))
        written.append(target)
    return written


def _generation_settings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How the policy generates: as the model that it was trained from, of which a checkpoint keeps the file; but
    training ended responses with the tokenizer's end token, whatever a single one in the model's files said."""
    file = folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    ends, end = settings.get("eos_token_id"), tokenizer.eos_token_id
    settings["eos_token_id"] = end
    if isinstance(ends, list) and len(ends) > 1:
        settings["eos_token_id"] = [*ends, *[end] * (end not in ends)]
    own = {"bos_token_id": tokenizer.bos_token_id}
    # A missing one is the end token while training, and missing again here.
    own["pad_token_id"] = None if tokenizer.__dict__.get("pad_is_borrowed") else tokenizer.pad_token_id
    return settings | {key: settings.get(key) if value is None else value for key, value in own.items()}


def _round(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    for key, parameter in model.named_parameters():
        if float(parameter.detach().abs().max()) > largest:
            raise ConfigError(
                f"{dtype} cannot hold the weights of the {name}: {key!r} has values beyond {largest:g}; export it as "
                "bfloat16 or float32"
            )
    nn.Module.to(model, dtype)


def describe_prm(config: Config, step_separator: str | None = None, policy: str | None = None) -> PRMDescription:
    """What the PRM of a run says of itself. policy: where the run's policy is exported, if it is."""
    reference = None
    if config.prm_reads_reference:
        reference = ReferenceModel(model=config.policy.model, gguf_file=config.policy.gguf_file)
    elif config.prm.reward == "implicit" and policy is not None:
        reference = ReferenceModel(model=policy, gguf_file=None)
    return PRMDescription(
        reward=config.prm.reward,
        beta=config.prm.beta,
        gamma=config.prm.gamma,
        temperature=PRM_TEMPERATURE,
        reference=reference,
        steps=_step_rule(config, step_separator or config.data.step_separator),
        prompt=_prompt_format(config),
    )


def _step_rule(config: Config, separator: str) -> StepRule:
    if "steps" in config.system.data:
        # It has learned one number for each step, a logit at the step's last token.
        return StepRule(rule="separator", separator=separator, score="end", aggregate="min")
    return StepRule(rule="separator", separator=separator)


def describe_policy(config: Config) -> dict[str, Any]:
    """What the policy of a run says of itself: the temperature that it was sampled and trained at, and its prompts."""
    return {
        "format": FORMAT,
        "role": "policy",
        "temperature": config.policy_temperature,
        "prompt": _prompt_format(config).model_dump(),
    }


def _prompt_format(config: Config) -> PromptFormat:
    return PromptFormat(**config.data.model_dump(include=set(PromptFormat.model_fields)))


def _whole(folder: Path) -> dict[str, PreTrainedModel]:
    models = {}
    for name in EXPORTED:
        if (folder / name).is_dir():
            models[name] = build_model(folder / name)
            load_weights(folder, name, Learner(models[name], None, tokens_per_microbatch=1))
    return models


def _merged(folder: Path, config: Config) -> dict[str, PreTrainedModel]:
    # Options of training, which may ask for a GPU, do not matter here.
    plain = {"gradient_checkpointing": False, "activation_offload": False}
    sections = {name: section.model_copy(update=plain) for name, section in config.trained_sections.items()}
    world = World(torch.device("cpu"))
    # Nobody asks for a critic after training.
    names = tuple(name for name in config.system.trains if name in EXPORTED)
    learners = build_learners(config.model_copy(update=sections), world, Work(), names)
    models = {}
    for name, learner in learners.items():
        load_weights(folder, name, learner)
        weights = dict(learner.weights())
        output = next(key for key, m in learner.model.named_modules() if m is learner.model.get_output_embeddings())
        plain_config = AutoConfig.from_pretrained(folder / name)
        factory: Any = AutoModelForCausalLM
        if learner.reads_values:
            add_value_head(plain_config)
            factory = AutoModelForTokenClassification
            weights = {key: weight for key, weight in weights.items() if not key.startswith(f"{output}.")}
            head: Any = learner.model.value_head
        # A small adapter would be rounded away in bfloat16.
        model = factory.from_config(plain_config, dtype=torch.float32)
        if learner.reads_values:
            own = head_name(model)
            weights |= {f"{own}.weight": head.weight.detach(), f"{own}.bias": head.bias.detach()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # Tied heads have no weights of their own.
        assert not unexpected, unexpected
        assert set(missing) <= {f"{output}.weight"}, missing
        models[name] = model
    return models
