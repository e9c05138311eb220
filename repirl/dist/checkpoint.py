"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `step_N`: tensors by torch.distributed.checkpoint, `trainer.json` for everything else,
and each model's configuration and tokenizer. It is written as `step_N.tmp`, flushed to disk and renamed, and
only then are older ones pruned: whatever happens, the last complete one stays.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.models import save_description

logger = logging.getLogger(__name__)
# One process is what is meant here, not an oversight to be warned of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Complete checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [(int(m.group(1)), p) for p in Path(folder).glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint folder itself, or the newest one of a run's folder. ConfigError where there is none."""
    path = Path(path)
    if (path / "trainer.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := list_checkpoints(folder):
            return found[-1]
    raise ConfigError(f"no checkpoint at {str(path)!r}: expected a step_N folder, or a run's folder that holds some")


def _tensors(learners: dict[str, Learner]) -> dict[str, Any]:
    return {
        name: {
            "model": get_model_state_dict(learner.model),
            "optimizer": get_optimizer_state_dict(learner.model, learner.optimizer),
        }
        for name, learner in learners.items()
    }


def _flush(folder: Path) -> None:
    """Force a folder's files and names to disk, so that the rename never points at missing bytes."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    learners: dict[str, Learner],
    trainer_state: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_last: int,
) -> Path:
    """Write `folder`/step_`step` and prune to the newest `keep_last`. trainer_state must be JSON's types."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f"step_{step}.tmp", folder / f"step_{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    state = _tensors(learners)
    state["rng"] = {"torch": torch.get_rng_state()}
    dcp.save(state, checkpoint_id=temporary / "tensors", no_dist=True)
    for name, learner in learners.items():
        save_description(learner.model, tokenizer, temporary / name)
    schedulers = {
        name: {"scheduler": learner.scheduler.state_dict(), "num_skipped_updates": learner.num_skipped_updates}
        for name, learner in learners.items()
    }
    version, internal, gauss = random.getstate()
    python_rng = [version, list(internal), gauss]
    content = {"step": step, "learners": schedulers, "python_rng": python_rng, "trainer": trainer_state}
    (temporary / "trainer.json").write_text(json.dumps(content))
    _flush(temporary)
    if final.exists():
        # Only after resuming from an older one; the name is freed in one step, too.
        final.rename(folder / f"step_{step}.replaced.tmp")
    temporary.rename(final)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    for leftover in folder.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    return final


def load_checkpoint(path: Path, learners: dict[str, Learner]) -> tuple[int, dict[str, Any]]:
    """Restore learners and RNGs in place; returns (step, trainer_state)."""
    content = json.loads((path / "trainer.json").read_text())
    missing = sorted(set(learners) - set(content["learners"]))
    if missing:
        raise ConfigError(f"checkpoint {str(path)!r} has no {missing[0]!r}; it holds {sorted(content['learners'])}")
    state = _tensors(learners)
    state["rng"] = {"torch": torch.get_rng_state()}
    try:
        dcp.load(state, checkpoint_id=path / "tensors", no_dist=True)
    except CheckpointException as error:
        raise ConfigError(
            f"checkpoint {str(path)!r} does not fit the configured models: {str(error).strip().splitlines()[-1]}"
        ) from error
    for name, learner in learners.items():
        set_model_state_dict(learner.model, state[name]["model"])
        set_optimizer_state_dict(learner.model, learner.optimizer, state[name]["optimizer"])
        learner.scheduler.load_state_dict(content["learners"][name]["scheduler"])
        learner.num_skipped_updates = content["learners"][name]["num_skipped_updates"]
    torch.set_rng_state(state["rng"]["torch"])
    version, internal, gauss = content["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    return content["step"], content["trainer"]


def load_weights(path: Path, name: str, model: PreTrainedModel) -> None:
    """Fill a model with the weights that a checkpoint holds under `name` ("policy" or "prm")."""
    state = {name: {"model": get_model_state_dict(model)}}
    dcp.load(state, checkpoint_id=path / "tensors", no_dist=True)
    set_model_state_dict(model, state[name]["model"])
