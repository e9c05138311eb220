"""Policy and PRM of a checkpoint as plain Hugging Face models that say of themselves how they are used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

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

from repirl.adapter_export import save_adapter
from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import check_format, resolve_checkpoint
from repirl.config import Config, ConfigError
from repirl.configfile import load_config
from repirl.distributed.world import World
from repirl.fused import fuse
from repirl.hub import repository
from repirl.learner import Learner
from repirl.modelcard import Model, metrics_until, model_card
from repirl.models import build_model, load_tokenizer, quiet_transformers, save_tokenizer
from repirl.output_path import check_folder
from repirl.prm import FORMAT, PRMDescription, PromptFormat, ReferenceModel, StepRule
from repirl.run import PRM_TEMPERATURE, build_learners
from repirl.serving import take_probe
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
    adapter_only: bool = False,
    hub: str | None = None,
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
        adapter_only: write the LoRA adapters of the run as folders of peft, without their base; `repirl.json` there
            says what config.json says otherwise.
        hub: the name OWNER/NAME under which the folders will be pushed to the hub (hub.push), for what names another
            model there.

    Returns:
        The folders written.

    Raises:
        ConfigError: where the checkpoint is missing, damaged, or not one, has weights that `dtype` cannot hold, or has
            no adapters and those alone are asked for; where the output is a file, or would replace the checkpoint or
            the model that the run started from.
    """
    quiet_transformers()
    folder = resolve_checkpoint(checkpoint)
    config = load_config(folder / "config.yaml")
    if adapter_only and config.adapters is None:
        raise ConfigError(f"{str(folder)!r} holds whole models, no adapters: export it without --adapter-only")
    _check_output(output, folder, config, adapter_only)
    policy = repository(hub, "policy") if hub is not None else str(Path(output) / "policy")
    step = int(check_format(folder)["step"])
    metrics = metrics_until(folder.parent.parent, step)
    written = []
    for name, learner in _learners(folder, config).items():
        described = describe_prm(config, step_separator, policy) if name == "prm" else None
        target = Path(output) / name
        target.mkdir(parents=True, exist_ok=True)
        if adapter_only:
            architecture = _write_adapter(learner, folder / name, target, config, dtype)
            says = describe_policy(config) if described is None else described.model_dump(mode="json")
            (target / "repirl.json").write_text(json.dumps(says, indent=2) + "\n")
        else:
            model = learner.model if config.adapters is None else _merged(learner, folder / name)
            architecture = type(model).__name__
            _write_model(model, folder / name, target, described or describe_policy(config), dtype)
        card = Model(name, config, architecture, described, step, metrics, adapter_only)
        (target / "README.md").write_text(model_card(card))
        written.append(target)
    return written


def _check_output(output: str | os.PathLike, checkpoint: Path, config: Config, adapter_only: bool) -> None:
    """ConfigError where the export would replace what it is made from, or mix with one of another kind."""
    names = [name for name in EXPORTED if (checkpoint / name).is_dir()]
    starts = [model for model in (config.policy.model, config.prm.model) if model is not None]
    check_folder(output, names, [*starts, *(checkpoint / name for name in names)])
    for name in names:
        target = Path(output) / name
        if (target / ("config.json" if adapter_only else "adapter_config.json")).exists():
            there = "a whole model" if adapter_only else "adapters alone"
            raise ConfigError(f"{str(target)!r} holds {there} of another export: choose another --output")


def _write_model(
    model: PreTrainedModel,
    source: Path,
    target: Path,
    described: PRMDescription | dict[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """source: the checkpoint's folder of the model."""
    tokenizer, is_prm = load_tokenizer(str(source)), isinstance(described, PRMDescription)
    if dtype is not None:
        _round(model, source.name, dtype)
    # transformers keeps keys that it does not know; one of a model that this one was trained from is replaced.
    model.config.repirl = described.model_dump(mode="json") if isinstance(described, PRMDescription) else described
    settings = _generation_settings(source, tokenizer)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    if not is_prm:
        # Others may be what transformers does not like to save, and are written below.
        model.generation_config = GenerationConfig(**{key: settings.get(key) for key in special})
    model.save_pretrained(target)
    if not is_prm and len(settings) > len(special):
        (target / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_tokenizer(tokenizer, target)
    if isinstance(described, PRMDescription) and described.reward == "value":
        take_probe(model if hasattr(model, "packs") else fuse(model)).save(target)


def _write_adapter(learner: Learner, source: Path, target: Path, config: Config, dtype: torch.dtype | None) -> str:
    """Returns the class that the base is loaded as."""
    head, architecture = None, type(learner.model).__name__
    if learner.reads_values:
        with torch.device("meta"):
            classifier = _classifier(source)
        head, architecture = head_name(classifier), type(classifier).__name__
    save_adapter(learner, target, config.start_of(source.name)[0], head, dtype)
    save_tokenizer(load_tokenizer(str(source)), target)
    return architecture


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


def _learners(folder: Path, config: Config) -> dict[str, Learner]:
    """The learners that are exported, with their weights."""
    learners = {}
    if config.adapters is None:
        for name in EXPORTED:
            if (folder / name).is_dir():
                learners[name] = Learner(build_model(folder / name), None, tokens_per_microbatch=1)
    else:
        # Options of training, which may ask for a GPU, do not matter here.
        plain = {"gradient_checkpointing": False, "activation_offload": False}
        sections = {name: section.model_copy(update=plain) for name, section in config.trained_sections.items()}
        world = World(torch.device("cpu"))
        # Nobody asks for a critic after training.
        names = tuple(name for name in config.system.trains if name in EXPORTED)
        learners = build_learners(config.model_copy(update=sections), world, Work(), names)
    for name, learner in learners.items():
        load_weights(folder, name, learner)
    return learners


def _classifier(source: Path) -> PreTrainedModel:
    """A token classifier with one output, of the family in a checkpoint's folder, with random weights."""
    config = AutoConfig.from_pretrained(source)
    add_value_head(config)
    # A small adapter would be rounded away in bfloat16.
    model: PreTrainedModel = AutoModelForTokenClassification.from_config(config, dtype=torch.float32)
    return model


def _merged(learner: Learner, source: Path) -> PreTrainedModel:
    """A plain model with a learner's adapter worked into its weights."""
    weights = dict(learner.weights())
    output = next(key for key, m in learner.model.named_modules() if m is learner.model.get_output_embeddings())
    if learner.reads_values:
        model, head = _classifier(source), cast(nn.Linear, learner.model.value_head)
        weights = {key: weight for key, weight in weights.items() if not key.startswith(f"{output}.")}
        own = head_name(model)
        weights |= {f"{own}.weight": head.weight.detach(), f"{own}.bias": head.bias.detach()}
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Tied heads have no weights of their own.
    assert not unexpected, unexpected
    assert set(missing) <= {f"{output}.weight"}, missing
    return model
