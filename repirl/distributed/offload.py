"""The idle side of the loop leaves the device: parameters and optimiser state of models that do not work now."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What is smaller is not worth a copy.
_SMALLEST_BYTES = 1 << 16
# PyTorch rounds pinned memory up to a power of two: pieces of such a size waste none of it, and fit whoever comes next.
_PIECE_BYTES = 1 << 26


class Resident(Protocol):
    """A model with its optimiser, as far as it matters here (learner.Learner)."""

    residency: Residency | None

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def device(self) -> torch.device: ...


class Residency:
    """At most one learner's tensors are on the device; `use` brings them there and sends the others away: into
    pinned host memory from a GPU, into files under `folder` from a CPU.

    Storages are emptied and refilled in place, so whatever refers to them, FSDP's views included, stays valid.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._away: dict[int, list[Parked]] = {}
        self._learners: list[Resident] = []

    def add(self, learner: Resident) -> None:
        """From now on the learner asks for its place before it works; it starts away."""
        learner.residency = self
        for parameter in learner.model.parameters():
            # Weights that lie in a file mapped into memory cannot give it back.
            if not isinstance(parameter, DTensor) and not parameter.untyped_storage().resizable():
                parameter.data = parameter.data.clone()
        self._learners.append(learner)
        self._park(learner)

    def use(self, learner: Resident | None) -> None:
        """Bring this learner's tensors to the device, after everybody else's have left; None: all leave."""
        for other in self._learners:
            if other is not learner and id(other) not in self._away:
                self._park(other)
        for parked in self._away.pop(id(learner), []):
            parked.restore()

    def use_all(self) -> None:
        """Bring everything back, to save or to load it."""
        for learner in self._learners:
            for parked in self._away.pop(id(learner), []):
                parked.restore()

    def close(self) -> None:
        """Bring everything back and remove the files."""
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
    """Memory that a GPU copies to and from (pinned), dealt out without gaps."""

    def __init__(self, *, pinned: bool = True) -> None:
        self._pinned = pinned
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> list[Tensor]:
        """Stretches of bytes, as long together as asked for; what they lie in lives as long as they do."""
        taken = []
        while num_bytes > 0:
            if self._rest.numel() == 0:
                self._rest = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
            part, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
            taken.append(part)
            num_bytes -= part.numel()
        return taken


class Parked:
    """The content of one storage, elsewhere: in host memory, or without any in the file `path`."""

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
        """Of the copy's parts in the storage."""
        return _bytes(self._storage).split([part.numel() for part in self._copy])

    def restore(self) -> None:
        self._storage.resize_(self._size)
        if self._copy:
            for part, place in zip(self._copy, self._places(), strict=True):
                place.copy_(part)
            return
        with open(self._path, "rb") as file:
            found = file.readinto(_view(self._storage))
        if found != self._size:
            raise RuntimeError(f"{self._path} holds {found} of the {self._size} bytes that were put there")
        self._path.unlink()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _view(storage: torch.UntypedStorage) -> memoryview:
    # Not by NumPy: a storage that was lent to it can never be resized again.
    return memoryview((ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr()))


def _storages(learner: Resident) -> list[torch.UntypedStorage]:
    """Every storage of parameters and optimiser state once, whether several tensors share it or not."""
    found: dict[int, torch.UntypedStorage] = {}
    tensors: list[Tensor] = list(learner.model.parameters())
    if learner.optimizer is not None:
        for state in learner.optimizer.state.values():
            for value in state.values():
                tensors += _parts(value)
    for tensor in tensors:
        local = tensor.detach()
        storage = (local.to_local() if isinstance(local, DTensor) else local).untyped_storage()
        if storage.nbytes() >= _SMALLEST_BYTES and storage.device == learner.device:
            found[storage.data_ptr()] = storage
    return list(found.values())


def _parts(value: object) -> list[Tensor]:
    """The plain tensors in an optimiser's state; a quantised moment is made of several."""
    if isinstance(value, DTensor):
        return _parts(value.to_local())
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(value, name))]
    return [value] if isinstance(value, Tensor) else []
