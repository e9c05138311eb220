"""Policy and PRM of a checkpoint as plain Hugging Face models."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import Config
from repirl.configfile import build_config
from repirl.distributed.world import World
from repirl.learner import Learner
from repirl.models import add_value_head, build_model, load_tokenizer, quiet_transformers
from repirl.run import build_learners
from repirl.work import Work


def export_checkpoint(checkpoint: str | os.PathLike, output: str | os.PathLike) -> list[Path]:
    """Export policy and PRM of a checkpoint into OUTPUT/policy and OUTPUT/prm; returns the folders written.

    Plain `AutoModelForCausalLM` and `AutoModelForTokenClassification` load them back. Adapters are worked into the
    weights of their base, which has to be where the run found it.
    ConfigError where the checkpoint is missing, damaged, or not one.
    """
    quiet_transformers()
    folder = resolve_checkpoint(checkpoint)
    config = build_config(yaml.safe_load((folder / "config.yaml").read_text()))
    models = _merged(folder, config) if config.adapters is not None else _whole(folder)
    written = []
    for name, model in models.items():
        model.save_pretrained(Path(output) / name)
        load_tokenizer(str(folder / name)).save_pretrained(Path(output) / name)
        written.append(Path(output) / name)
    return written


def _whole(folder: Path) -> dict[str, PreTrainedModel]:
    models = {}
    for name in ("policy", "prm"):
        if (folder / name).is_dir():
            models[name] = build_model(folder / name)
            load_weights(folder, name, Learner(models[name], None, tokens_per_microbatch=1))
    return models


def _merged(folder: Path, config: Config) -> dict[str, PreTrainedModel]:
    # Options of training, which may ask for a GPU, do not matter here.
    plain = {"gradient_checkpointing": False, "activation_offload": False}
    sections = {name: section.model_copy(update=plain) for name, section in config.trained_sections.items()}
    world = World(torch.device("cpu"))
    learners = build_learners(config.model_copy(update=sections), world, Work(), config.system.trains)
    models = {}
    for name, learner in learners.items():
        load_weights(folder, name, learner)
        weights = dict(learner.weights())
        plain_config = AutoConfig.from_pretrained(folder / name)
        factory = AutoModelForCausalLM
        if learner.reads_values:
            add_value_head(plain_config)
            factory = AutoModelForTokenClassification
            weights.pop("lm_head.weight", None)
            head = learner.model.value_head
            weights |= {"score.weight": head.weight.detach(), "score.bias": head.bias.detach()}
        # A small adapter would be rounded away in bfloat16.
        model = factory.from_config(plain_config, dtype=torch.float32)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # Tied heads have no weights of their own.
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        models[name] = model
    return models
