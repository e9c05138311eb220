"""Writing checkpoints, all processes together."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerBase

from repirl.checkpoint.errors import reason, root_cause
from repirl.checkpoint.manifest import FORMAT, Manifest, list_checkpoints, make_manifest, newest_sound
from repirl.checkpoint.rng import rng_state
from repirl.config import RunError
from repirl.distributed.world import World
from repirl.learner import Learner
from repirl.models import save_description
from repirl.options import CheckpointConfig
from repirl.version import __version__

logger = logging.getLogger(__name__)
# One process is what is meant here, not an oversight to be warned of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RunError):
    """A checkpoint could not be written; the ones before it are untouched."""


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

    def newest(self) -> str:
        """For messages: the newest complete checkpoint, and how to go on from there."""
        checkpoints = list_checkpoints(self.folder)
        if not checkpoints:
            return f"there is no complete checkpoint in {str(self.folder)!r} to go on from"
        newest = f"of the checkpoints the newest complete one is {checkpoints[-1].name}, go on from there with --resume"
        before = [path.name for path in checkpoints if not _skips_updates(path)]
        if before and before[-1] != checkpoints[-1].name:
            newest += f" (updates were skipped since {before[-1]}: rename the later ones to go on from that one)"
        return newest

    def choose(self) -> Path:
        """The checkpoint to go on from. Damaged newer ones are renamed to step_N.damaged, so that they do not stand in
        the way of a run that goes on. ConfigError as newest_sound."""
        chosen = newest_sound(self.folder, self.world)
        if self.world.is_main:
            checkpoints = list_checkpoints(self.folder)
            for path in checkpoints[checkpoints.index(chosen) + 1 :]:
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
        fingerprints: dict[str, str] | None = None,
        score: float | None = None,
    ) -> None:
        """Write step_`step`.

        Args:
            step: finished steps.
            learners: those that are trained, by name.
            run_state: what else the run needs to go on, of plain types and tensors, equal on all processes.
            tokenizer: saved beside each model.
            description: the resolved configuration.
            fingerprints: of the run's models and data (fingerprints.take_fingerprints).
            score: what `keep_best` goes by.

        Raises:
            CheckpointError: on every process, where any of them could not write (a full disk). What was written of
                this checkpoint is removed then, and the ones before are untouched.
        """
        self.finish()
        temporary = self.folder / f"step_{step}.tmp"
        rest = {"rng": self.world.gather([rng_state()]), "run": run_state}
        content = {
            "format": FORMAT,
            "repirl": __version__,
            "step": step,
            "score": score,
            "fingerprints": fingerprints or {},
            "processes": self.world.size,
            "learners": {name: learner.counters for name, learner in learners.items()},
        }

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What a killed run left half done may take the room that is needed now.
            self._clear()
            temporary.mkdir()
            for name, learner in learners.items():
                save_description(learner.model, tokenizer, temporary / name)
            (temporary / "trainer.json").write_text(json.dumps(content))
            (temporary / "config.yaml").write_text(description)
            # Through a file of Python's: that one says why it cannot be written.
            with open(temporary / "run.pt", "wb") as file:
                torch.save(rest, file)

        self._together(step, prepare if self.world.is_main else _nothing)
        self._write_tensors(step, learners, temporary)

    def _write_tensors(self, step: int, learners: dict[str, Learner], folder: Path) -> None:
        """Write now, or from a copy while training goes on. One learner after the other: idle ones may be away from the
        device, and there need not be room for all."""
        rank = self.world.rank
        if self._thread is not None:
            copies = {name: _copied(_tensors(learner)) for name, learner in learners.items()}
            self._pending = (step, self._thread.submit(_write, copies, folder, rank, self._group))
            return
        written: Manifest = {}
        for name, learner in learners.items():
            write = functools.partial(_write, {name: _tensors(learner)}, folder, rank, None)
            written |= self._together(step, write)
        self._complete(step, written)

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
            manifest = written | make_manifest(temporary, rest)
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
        checkpoints = list_checkpoints(self.folder)
        kept = set(checkpoints[-self.config.keep_last :])
        # After a divergence updates are skipped until the run ends; checkpoints from before it are kept meanwhile.
        if _skips_updates(checkpoints[-1]):
            kept |= set([path for path in checkpoints if not _skips_updates(path)][-self.config.keep_last :])
        scores = {path: score for path in checkpoints if (score := _score(path)) is not None}
        # Among equals the older one is kept: it took fewer steps.
        ranked = sorted(scores, key=lambda path: -scores[path])
        kept |= set(ranked[: self.config.keep_best])
        for path in checkpoints:
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
            problem, cause = reason(error), error
        problems = [p for p in self.world.gather([problem]) if p is not None]
        if problems:
            if self.world.is_main:
                shutil.rmtree(self.folder / f"step_{step}.tmp", ignore_errors=True)
            # The first process that ends takes the others with it, the one that is removing files too.
            self.world.barrier()
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written into {str(self.folder)!r}: {problems[0]}; "
                f"{self.newest()}"
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
        written |= make_manifest(folder, (folder / name / "tensors").glob(f"__{rank}_*.distcp"))
    return written


class _Writer(dcp.FileSystemWriter):
    """Tells why it could not write, which PyTorch's zip writer hides behind an error of its own; only the message of
    an error reaches the other processes."""

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().write_data(*arguments, **options)
        except RuntimeError as error:
            raise root_cause(error) from error


def _tensors(learner: Learner) -> dict[str, Any]:
    return {name: part for name, part in learner.state_dict().items() if name != "counters"}


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


def _skips_updates(path: Path) -> bool:
    """Whether the last update of some learner before this checkpoint was skipped; damage as in `_score`."""
    try:
        learners = json.loads((path / "trainer.json").read_text())["learners"]
        return any(counters["num_skipped_in_a_row"] > 0 for counters in learners.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _flush(paths: Sequence[Path]) -> None:
    """Force files, and the names in folders, to disk, so that the rename never points at missing bytes."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
