"""Reading checkpoints, onto any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from repirl.checkpoint.errors import reason
from repirl.checkpoint.manifest import check_format
from repirl.checkpoint.reader import Planner, Reader
from repirl.checkpoint.rng import set_rng_state
from repirl.config import ConfigError
from repirl.distributed.world import World
from repirl.learner import Learner
from repirl.model_files import shown


def load_checkpoint(path: Path, learners: dict[str, Learner], world: World) -> tuple[int, dict[str, Any]]:
    """Restore learners and random generators in place.

    Args:
        path: a checkpoint's folder.
        learners: those that are trained, by name.
        world: the processes of this run, as many as there may be.

    Returns:
        Finished steps, and what else the run had put there (save.Checkpointer.save).

    Raises:
        ConfigError: where it is of another format, or of other models.
    """
    content = check_format(path)
    missing = sorted(set(learners) - set(content["learners"]))
    if missing:
        raise ConfigError(f"checkpoint {str(path)!r} has no {missing[0]!r}; it holds {sorted(content['learners'])}")
    for name, learner in learners.items():
        state = learner.state_dict()
        del state["counters"]
        _read(state, path / name / "tensors")
        learner.load_state_dict(state | {"counters": content["learners"][name]})
        _refuse_nonfinite(path, name, learner)
    rest = torch.load(path / "run.pt", weights_only=True)
    set_rng_state(rest["rng"][world.rank % len(rest["rng"])])
    return content["step"], rest["run"]


def load_weights(path: Path, name: str, learner: Learner) -> None:
    """Fill a model with the weights that a checkpoint holds under `name` ("policy" or "prm")."""
    check_format(path)
    state = {"model": learner.model_state()}
    _read(state, path / name / "tensors")
    learner.load_model_state(state["model"])
    _refuse_nonfinite(path, name, learner)


def _refuse_nonfinite(path: Path, name: str, learner: Learner) -> None:
    if names := learner.find_nonfinite():
        raise ConfigError(
            f"checkpoint {str(path)!r} holds weights of {name!r} that are not finite (NaN or infinity in "
            f"{shown(names)}): take an earlier one; to go on from that, rename this one"
        )


def _read(state: dict[str, Any], folder: Path) -> None:
    try:
        dcp.load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        for failure, _ in (error.failures or {}).values():
            if isinstance(failure, ConfigError):
                raise failure from error
        raise ConfigError(
            f"checkpoint {str(folder)!r} does not fit the configured models: {reason(error).splitlines()[-1]}"
        ) from error
    stored = {key for key in Reader(folder).read_metadata().state_dict_metadata if key.startswith("model.")}
    if lost := sorted(stored - {f"model.{name}" for name in state["model"]}):
        # Nothing else would say that these weights are left out.
        raise ConfigError(
            f"checkpoint {str(folder)!r} does not fit the configured models: it holds {shown(lost)}, and they do not"
        )
