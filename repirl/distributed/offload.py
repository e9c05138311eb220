"""Moves the parameters and optimiser states of idle models off the device, and back when they are needed."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from repirl.config import RunError

# Smaller storages stay on the device: moving them would save too little.
_SMALLEST_BYTES = 1 << 16
# PyTorch rounds the size of pinned memory up to a power of two. Pieces of this size waste nothing, and another learner
# can use them again.
_PIECE_BYTES = 1 << 26


class Resident(Protocol):
    """The parts of learner.Learner that this module uses."""

    residency: Residency | None

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def device(self) -> torch.device: ...


class Residency:
    """Keeps the tensors of at most one learner on the device.

    `use` moves the other learners' tensors away: from a GPU into pinned host memory, from a CPU into a file for each
    learner. The files have no names, so they end with the process, and no other process can meet them. Storages are
    emptied and filled again in place, so all references to them stay valid, also FSDP's views.

    Args:
        folder: where the files go.

    Raises:
        RunError: in all methods, where a file cannot be written or read. What was to be moved away is still there then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._away: dict[int, list[Parked]] = {}
        self._learners: list[Resident] = []

    def add(self, learner: Resident) -> None:
        """Move the learner's tensors away. From now on the learner calls `use` before it computes."""
        learner.residency = self
        for parameter in learner.model.parameters():
            # Weights in a memory-mapped file cannot be resized, so copy them into ordinary memory.
            if not isinstance(parameter, DTensor) and not parameter.untyped_storage().resizable():
                parameter.data = parameter.data.clone()
        self._learners.append(learner)
        if learner.device.type == "cpu":
            with self._explained():
                self._folder.mkdir(parents=True, exist_ok=True)
        self._park(learner)

    def use(self, learner: Resident | None) -> None:
        """Move the tensors of all other learners away, then this learner's to the device; None moves all away."""
        for other in self._learners:
            if other is not learner and id(other) not in self._away:
                self._park(other)
        if learner is not None:
            self._restore(learner)

    def use_all(self) -> None:
        """Bring all learners' tensors to the device, to save or load them."""
        for learner in self._learners:
            self._restore(learner)

    def close(self) -> None:
        """Bring all learners' tensors to the device, and remove the folder."""
        self.use_all()
        with suppress(OSError):
            # It may hold what is not ours.
            self._folder.rmdir()

    def _park(self, learner: Resident) -> None:
        away: HostMemory | IO[bytes] = HostMemory()
        with self._explained():
            if learner.device.type == "cpu":
                away = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            parked = [Parked(storage, away) for storage in _storages(learner)]
            if not isinstance(away, HostMemory):
                away.flush()
        # Only now that all are written.
        for part in parked:
            part.empty()
        self._away[id(learner)] = parked

    def _restore(self, learner: Resident) -> None:
        with self._explained():
            for parked in self._away.get(id(learner), []):
                parked.restore()
        # The file ends with what refers to it.
        self._away.pop(id(learner), None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"an idle model cannot be kept in a file in {str(self._folder)!r} (offload_idle): "
                f"{error.strerror or error}. Make room on that disk or choose another output_dir, or leave out "
                "offload_idle; --resume goes on from the newest checkpoint"
            ) from error


class HostMemory:
    """Allocates parts of large pieces of pinned host memory, without gaps between the parts."""

    def __init__(self, *, pinned: bool = True) -> None:
        self._pinned = pinned
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> list[Tensor]:
        """Allocate memory.

        Returns:
            Tensors of bytes with `num_bytes` bytes in all. The memory is freed when no tensor refers to it any more.
        """
        taken = []
        while num_bytes > 0:
            if self._rest.numel() == 0:
                self._rest = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
            part, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
            taken.append(part)
            num_bytes -= part.numel()
        return taken


class Parked:
    """The content of one storage that is moved away, into host memory or to the end of a file.

    Args:
        storage: is copied now, and stays as it is until `empty`.
        away: where to.
    """

    def __init__(self, storage: torch.UntypedStorage, away: HostMemory | IO[bytes]) -> None:
        self._storage, self._size = storage, storage.nbytes()
        self._copy: list[Tensor] = []
        self._file: IO[bytes] | None = None
        if isinstance(away, HostMemory):
            self._copy = away.take(self._size)
            for part, place in zip(self._copy, self._places(), strict=True):
                part.copy_(place)
        else:
            self._file, self._start = away, away.tell()
            away.write(_view(storage))

    def _places(self) -> tuple[Tensor, ...]:
        """The parts of the storage that belong to the parts of the copy."""
        return _bytes(self._storage).split([part.numel() for part in self._copy])

    def empty(self) -> None:
        """Free the storage's memory."""
        self._storage.resize_(0)

    def restore(self) -> None:
        """Fill the storage again. OSError where the file cannot be read."""
        self._storage.resize_(self._size)
        if self._file is None:
            for part, place in zip(self._copy, self._places(), strict=True):
                place.copy_(part)
            return
        self._file.seek(self._start)
        num_read = self._file.readinto(_view(self._storage))  # type: ignore[attr-defined]
        if num_read != self._size:
            raise OSError(f"it holds {num_read} of the {self._size} bytes that were put there")


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _view(storage: torch.UntypedStorage) -> memoryview:
    # Not through NumPy: a storage that NumPy has a view of can never be resized again.
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr()))


def _storages(learner: Resident) -> list[torch.UntypedStorage]:
    """The storages of all parameters and optimiser states, each once, even if several tensors share it."""
    storages: dict[int, torch.UntypedStorage] = {}
    tensors: list[Tensor] = list(learner.model.parameters())
    if learner.optimizer is not None:
        for state in learner.optimizer.state.values():
            for value in state.values():
                tensors += _parts(value)
    for tensor in tensors:
        local = tensor.detach()
        storage = (local.to_local() if isinstance(local, DTensor) else local).untyped_storage()
        if storage.nbytes() >= _SMALLEST_BYTES and storage.device == learner.device:
            storages[storage.data_ptr()] = storage
    return list(storages.values())


def _parts(value: object) -> list[Tensor]:
    """The plain tensors of a value in an optimiser's state; a quantised moment consists of several."""
    if isinstance(value, DTensor):
        return _parts(value.to_local())
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(value, name))]
    return [value] if isinstance(value, Tensor) else []
