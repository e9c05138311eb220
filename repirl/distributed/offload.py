"""Moves the parameters and optimiser states of idle models off the device, and back when they are needed."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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

    `use` moves the other learners' tensors away: from a GPU into pinned host memory, from a CPU into files. Storages
    are emptied and filled again in place, so all references to them stay valid, also FSDP's views.

    Args:
        folder: where the files go.
        name: the beginning of the files' names; different for each process.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
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
        self._park(learner)

    def use(self, learner: Resident | None) -> None:
        """Move the tensors of all other learners away, then this learner's to the device; None moves all away."""
        for other in self._learners:
            if other is not learner and id(other) not in self._away:
                self._park(other)
        for parked in self._away.pop(id(learner), []):
            parked.restore()

    def use_all(self) -> None:
        """Bring all learners' tensors to the device, to save or load them."""
        for learner in self._learners:
            for parked in self._away.pop(id(learner), []):
                parked.restore()

    def close(self) -> None:
        """Bring all learners' tensors to the device, and remove the files."""
        self.use_all()
        with suppress(OSError):
            # Other processes' files may still be there.
            self._folder.rmdir()

    def _park(self, learner: Resident) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        number = self._learners.index(learner)
        host_memory = None if learner.device.type == "cpu" else HostMemory()
        self._away[id(learner)] = [
            Parked(storage, self._folder / f"{self._name}_{number}_{i}.bin", host_memory)
            for i, storage in enumerate(_storages(learner))
        ]


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
    """The content of one storage that was moved away: in host memory, or (`host_memory` None) in the file `path`."""

    def __init__(self, storage: torch.UntypedStorage, path: Path, host_memory: HostMemory | None) -> None:
        self._storage, self._size, self._path = storage, storage.nbytes(), path
        self._copy: list[Tensor] = []
        if host_memory is None:
            with open(path, "wb") as file:
                file.write(_view(storage))
        else:
            self._copy = host_memory.take(self._size)
            for part, place in zip(self._copy, self._places(), strict=True):
                part.copy_(place)
        storage.resize_(0)

    def _places(self) -> tuple[Tensor, ...]:
        """The parts of the storage that belong to the parts of the copy."""
        return _bytes(self._storage).split([part.numel() for part in self._copy])

    def restore(self) -> None:
        """Fill the storage again, and delete the file if there is one."""
        self._storage.resize_(self._size)
        if self._copy:
            for part, place in zip(self._copy, self._places(), strict=True):
                place.copy_(part)
            return
        with open(self._path, "rb") as file:
            num_read = file.readinto(_view(self._storage))
        if num_read != self._size:
            raise RuntimeError(f"{self._path} holds {num_read} of the {self._size} bytes that were put there")
        self._path.unlink()


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
