"""Checkpoints that survive a kill at any moment, and go on with any number of processes.

A checkpoint is a folder `step_N`: tensors by torch.distributed.checkpoint (sharded, loaded into whatever sharding
there is), `run.pt` for the rest of the run's state, `trainer.json` for what people read, each model's configuration
and tokenizer, and `manifest.json` with every file's size and checksum. It is written as `step_N.tmp`, flushed to disk
and renamed, and only then are older ones pruned: whatever happens, the last complete one stays.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerBase

from repirl.config import CheckpointConfig, ConfigError, RunError
from repirl.distributed.world import World
from repirl.learner import Learner
from repirl.models import save_description

logger = logging.getLogger(__name__)
# One process is what is meant here, not an oversight to be warned of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


# A file's name in the checkpoint -> its size and checksum.
Manifest = dict[str, tuple[int, int]]


class CheckpointError(RunError):
    """A checkpoint could not be written; the ones before it are untouched."""


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Complete checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [(int(m.group(1)), p) for p in Path(folder).glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint folder itself, or the newest sound one of a run's folder. ConfigError where there is none."""
    path = Path(path)
    if any((path / name).is_file() for name in ("manifest.json", "trainer.json")):
        if (problem := find_damage(path)) is not None:
            raise ConfigError(f"checkpoint {str(path)!r} is damaged: {problem}")
        return path
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            return newest_sound(folder)
    raise ConfigError(f"no checkpoint at {str(path)!r}: expected a step_N folder, or a run's folder that holds some")


def newest_sound(folder: str | os.PathLike, world: World | None = None) -> Path:
    """The newest checkpoint whose files are all as they were written; says which newer ones are not. Where a world is
    given, its processes look at a share of the files each, and all get the same answer.

    ConfigError where there is none: starting anew by itself would hide that a run was lost.
    """
    world = world or World(torch.device("cpu"))
    [found] = world.gather([list_checkpoints(folder)] if world.is_main else [])
    damaged: dict[str, str] = {}
    for path in reversed(found):
        problems = [p for p in world.gather([find_damage(path, world.rank, world.size)]) if p is not None]
        if not problems:
            if world.is_main:
                for name, problem in damaged.items():
                    logger.warning("checkpoint %s in %s is damaged (%s); using %s", name, folder, problem, path.name)
            return path
        damaged[path.name] = problems[0]
    told = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
    raise ConfigError(f"none of the checkpoints in {str(folder)!r} is sound ({told})")


def find_damage(path: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, None if they are as they were written; of every `num_shares`-th file
    only, from number `share` on, where several processes look."""
    try:
        content = json.loads((path / "manifest.json").read_text())
        files = [(path / name, int(size), int(checksum)) for name, (size, checksum) in content.items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    if not files:
        return "manifest.json names no files"
    for file, size, checksum in files[share::num_shares]:
        name = file.relative_to(path)
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
            if _checksum(file) != checksum:
                return f"{name} has other content than was written"
        except OSError as error:
            # A disk that fails gives back errors, not other bytes.
            return f"{name} cannot be read: {error}"
    return None


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _tensors(learner: Learner) -> dict[str, Any]:
    model = learner.model_state()
    assert learner.optimizer is not None
    never_stepped = not learner.optimizer.state
    optimizer = get_optimizer_state_dict(learner.model, learner.optimizer)
    if never_stepped:
        # To have moments to write, PyTorch has made a step with gradients of zero: it must not count.
        for state in learner.optimizer.state.values():
            state["step"].zero_()
    return {"model": model, "optimizer": optimizer}


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), *rest],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _flush(paths: Sequence[Path]) -> None:
    """Force files, and the names in folders, to disk, so that the rename never points at missing bytes."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Checkpointer:
    """Writes the checkpoints of one run into `folder`, all processes together, and prunes them.

    With `config.asynchronous` a checkpoint is copied to host memory and written while training goes on; it becomes
    complete at one of the next calls of `poll`, at the latest in `finish`.
    """

    def __init__(self, folder: str | os.PathLike, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = Path(folder), config, world
        self._pending: tuple[int, Future] | None = None
        # Writing beside training needs a group of its own: its messages would mix with the training's.
        self._group = self._thread = None
        if config.asynchronous:
            if world.mesh is not None:
                self._group = dist.new_group(backend="gloo", timeout=world.timeout)
            # A thread starts on the first GPU, and would hold memory there.
            on_device = (torch.cuda.set_device, (world.device,)) if world.device.type == "cuda" else (None, ())
            self._thread = ThreadPoolExecutor(1, "checkpoint", *on_device)

    def choose(self) -> Path:
        """The checkpoint to go on from. Damaged newer ones are renamed to step_N.damaged, so that they do not stand in
        the way of a run that goes on. ConfigError as newest_sound."""
        chosen = newest_sound(self.folder, self.world)
        if self.world.is_main:
            found = list_checkpoints(self.folder)
            for path in found[found.index(chosen) + 1 :]:
                shutil.rmtree(target := path.with_name(f"{path.name}.damaged"), ignore_errors=True)
                path.rename(target)
        return chosen

    def save(
        self,
        step: int,
        learners: dict[str, Learner],
        run_state: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        description: str = "",
        score: float | None = None,
    ) -> None:
        """Write step_`step`. run_state: what else the run needs to go on, of plain types and tensors, equal on all
        processes · description: the resolved configuration · score: what `keep_best` goes by.

        CheckpointError, on every process, where any of them could not write (a full disk); what was written of this
        checkpoint is removed then, and the ones before are untouched.
        """
        self.finish()
        temporary = self.folder / f"step_{step}.tmp"
        rng = self.world.gather([_rng_state()])

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What a killed run left half done may take the room that is needed now.
            self._clear()
            temporary.mkdir()
            for name, learner in learners.items():
                save_description(learner.model, tokenizer, temporary / name)
            counts = {
                name: {
                    "num_updates": learner.scheduler.last_epoch,
                    "num_skipped_updates": learner.num_skipped_updates,
                    "num_skipped_in_a_row": learner.num_skipped_in_a_row,
                }
                for name, learner in learners.items()
            }
            content = {"step": step, "score": score, "processes": self.world.size, "learners": counts}
            (temporary / "trainer.json").write_text(json.dumps(content))
            (temporary / "config.yaml").write_text(description)
            # Through a file of Python's: that one says why it cannot be written.
            with open(temporary / "run.pt", "wb") as file:
                torch.save({"rng": rng, "run": run_state}, file)

        self._together(step, prepare if self.world.is_main else _nothing)
        # One after the other: idle ones may be away from the device, and there need not be room for all.
        rank = self.world.rank
        if self._thread is None:
            written: Manifest = {}
            for name, learner in learners.items():
                write = functools.partial(_write, {name: _tensors(learner)}, temporary, rank, None)
                written |= self._together(step, write)
            self._complete(step, written)
        else:
            copies = {name: _copied(_tensors(learner)) for name, learner in learners.items()}
            self._pending = (step, self._thread.submit(_write, copies, temporary, rank, self._group))

    def poll(self) -> None:
        """Complete a checkpoint that is being written, if all processes are done with it. Every process has to call."""
        if self._pending is None:
            return
        step, future = self._pending
        if self.world.sum(torch.tensor(float(future.done()))) == self.world.size:
            self._pending = None
            self._complete(step, self._together(step, future.result))

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, and complete it."""
        if self._pending is not None:
            self._pending[1].exception()
            self.world.barrier()
            self.poll()

    def _complete(self, step: int, written: Manifest) -> None:
        written = dict(self.world.gather(list(written.items())))
        temporary, final = self.folder / f"step_{step}.tmp", self.folder / f"step_{step}"

        def complete() -> None:
            rest = (p for p in temporary.rglob("*") if p.is_file() and str(p.relative_to(temporary)) not in written)
            manifest = written | _manifest(temporary, rest)
            (temporary / "manifest.json").write_text(json.dumps(manifest))
            _flush([*temporary.rglob("*"), temporary])
            if final.exists():
                # Only after resuming from an older one; the name is freed in one step, too.
                final.rename(self.folder / f"step_{step}.replaced.tmp")
            temporary.rename(final)
            _flush([self.folder])

        self._together(step, complete if self.world.is_main else _nothing)
        if self.world.is_main:
            try:
                self._prune()
            except OSError as error:
                # The checkpoint itself is complete; the next one tries again.
                logger.warning("older checkpoints in %s could not be removed: %s", self.folder, error)

    def _prune(self) -> None:
        found = list_checkpoints(self.folder)
        kept = set(found[-self.config.keep_last :])
        scores = {path: _score(path) for path in found}
        # Among equals the older one is kept: it took fewer steps.
        ranked = sorted((p for p in found if scores[p] is not None), key=lambda p: -scores[p])
        kept |= set(ranked[: self.config.keep_best])
        for path in found:
            if path not in kept:
                # Renamed first: a kill while it is being removed must not leave half of it under its name.
                path.rename(path.with_name(f"{path.name}.pruned.tmp"))
        self._clear()

    def _clear(self) -> None:
        """Remove what is half written and half removed; nothing may be being written."""
        for leftover in self.folder.glob("step_*.tmp"):
            shutil.rmtree(leftover)

    def _together(self, step: int, action: Callable[[], Any]) -> Any:
        """Run an action that may fail on some processes only, and fail on all of them then; returns its result."""
        problem = result = cause = None
        try:
            result = action()
        except (Exception, CheckpointException) as error:
            # Of any kind: a tokenizer that meets a full disk raises a bare Exception.
            problem, cause = _reason(error), error
        problems = [p for p in self.world.gather([problem]) if p is not None]
        if problems:
            if self.world.is_main:
                shutil.rmtree(self.folder / f"step_{step}.tmp", ignore_errors=True)
            # The first process that ends takes the others with it, the one that is removing files too.
            self.world.barrier()
            found = list_checkpoints(self.folder)
            newest = f"{found[-1].name}, go on from there with --resume" if found else "none before this one"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written into {str(self.folder)!r}: {problems[0]}. "
                f"The newest complete one is {newest}"
            ) from cause
        return result


def _nothing() -> None:
    """What the other processes do while the main one writes."""


def _write(states: dict[str, Any], folder: Path, rank: int, group: dist.ProcessGroup | None) -> Manifest:
    """Write tensors; returns what the manifest is to say of the files that this process wrote, which are the large
    ones: each process reads its own again, beside the training where the writing is."""
    written: Manifest = {}
    for name, state in states.items():
        target = folder / name / "tensors"
        dcp.save(state, storage_writer=_Writer(target), process_group=group, no_dist=not dist.is_initialized())
    # Only then: a process that fails to read while others save would leave them waiting.
    for name in states:
        written |= _manifest(folder, (folder / name / "tensors").glob(f"__{rank}_*.distcp"))
    return written


class _Writer(dcp.FileSystemWriter):
    """Tells why it could not write, which PyTorch's zip writer hides behind an error of its own; only the message of
    an error reaches the other processes."""

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().write_data(*arguments, **options)
        except RuntimeError as error:
            raise _root(error) from error


def _root(error: BaseException) -> BaseException:
    """The operating system's error that led to this one, or else this one."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen or error


def _manifest(folder: Path, files: Iterable[Path]) -> Manifest:
    return {str(p.relative_to(folder)): (p.stat().st_size, _checksum(p)) for p in sorted(files)}


def _copied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    if not isinstance(state, torch.Tensor):
        return state
    state = state.detach()
    if hasattr(state, "__tensor_flatten__"):
        # Part by part: asked for a copy as a whole, quantised moments on the CPU go on sharing their memory.
        names, context = state.__tensor_flatten__()
        parts = {name: _copied(getattr(state, name)) for name in names}
        return type(state).__tensor_unflatten__(parts, context, state.size(), state.stride())
    return state.to("cpu", copy=True)


def _score(path: Path) -> float | None:
    """A checkpoint's score; None without one, and where it cannot be read: damage to an old checkpoint is told when a
    run resumes, and must not end one that does not need it."""
    try:
        return json.loads((path / "trainer.json").read_text())["score"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reason(error: BaseException) -> str:
    """The message behind the wrapping of torch.distributed.checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        return "; ".join(f"{type(f[0]).__name__}: {f[0]}" for f in error.failures.values())
    root = _root(error)
    return f"{type(root).__name__}: {root}"


def load_checkpoint(path: Path, learners: dict[str, Learner], world: World) -> tuple[int, dict[str, Any]]:
    """Restore learners and RNGs in place, onto any number of processes; returns (step, run_state).

    The optimiser's options and the learning rate's schedule stay those of the learners, so that a run can go on with
    others than it began with. ConfigError where the checkpoint is of other models.
    """
    content = json.loads((path / "trainer.json").read_text())
    missing = sorted(set(learners) - set(content["learners"]))
    if missing:
        raise ConfigError(f"checkpoint {str(path)!r} has no {missing[0]!r}; it holds {sorted(content['learners'])}")
    for name, learner in learners.items():
        options = [_options(group) for group in learner.optimizer.param_groups]
        state = _tensors(learner)
        _read(state, path / name / "tensors")
        learner.load_model_state(state["model"])
        set_optimizer_state_dict(learner.model, learner.optimizer, state["optimizer"])
        for group, mine in zip(learner.optimizer.param_groups, options, strict=True):
            group |= mine
        saved = content["learners"][name]
        learner.set_num_updates(saved["num_updates"])
        learner.num_skipped_updates = saved["num_skipped_updates"]
        learner.num_skipped_in_a_row = saved["num_skipped_in_a_row"]
    rest = torch.load(path / "run.pt", weights_only=True)
    _set_rng_state(rest["rng"][world.rank % len(rest["rng"])])
    return content["step"], rest["run"]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _read(state: dict[str, Any], folder: Path) -> None:
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise ConfigError(
            f"checkpoint {str(folder)!r} does not fit the configured models: {_reason(error).splitlines()[-1]}"
        ) from error


def load_weights(path: Path, name: str, learner: Learner) -> None:
    """Fill a model with the weights that a checkpoint holds under `name` ("policy" or "prm")."""
    state = {"model": learner.model_state()}
    _read(state, path / name / "tensors")
    learner.load_model_state(state["model"])
