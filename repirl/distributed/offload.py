"""Moves the parameters and optimiser states of idle models off the device, and back when they are needed."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from repirl.config import RunError

# Smaller storages stay on the device: moving them would save too little.
_SMALLEST_BYTES = 1 << 16
# PyTorch rounds the size of pinned memory up to a power of two. Pieces of this size waste nothing, and another learner
# can use them again.
_PIECE_BYTES = 1 << 26

# What moves together. Moments are needed only where the optimiser steps, or is saved or loaded.
Group = Literal["weights", "moments"]
_GROUPS: tuple[Group, ...] = ("weights", "moments")


class Resident(Protocol):
    """The parts of learner.Learner that this module uses."""

    residency: Residency | None
    # Increases when the weights change.
    version: int

    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def device(self) -> torch.device: ...


class Streams:
    """The two streams of a GPU on which models move, one for each direction. They work beside the one that computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.leaving, self.coming = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def computing(self) -> torch.cuda.Stream:
        """The stream on which everything else runs."""
        return torch.cuda.current_stream(self._device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """A context in which copies are issued on a stream."""
        return torch.cuda.stream(stream)

    def keep_until_done(self, place: Tensor, stream: torch.cuda.Stream) -> None:
        """See to it that the memory of a tensor is given to nobody else before the stream has done what is issued."""
        place.record_stream(stream)


@dataclass
class Away:
    """A group of storages that is in host memory, or was. done: on a GPU, an event after which all of it is there."""

    version: int
    parts: list[Parked]
    done: Any = None

    def is_of(self, storages: list[torch.UntypedStorage], version: int) -> bool:
        """Whether it holds what the storages hold, if these have not changed since that version."""
        return version == self.version and [x._cdata for x in storages] == [part.identity for part in self.parts]


class Residency:
    """Keeps the tensors of at most one learner on the device.

    `use` moves the other learners' tensors away: from a GPU into pinned host memory, from a CPU into a file for each
    learner and group. The files have no names, so they end with the process, and no other process can meet them.
    Storages are emptied and filled again in place, so all references to them stay valid, also FSDP's views.

    On a GPU nothing waits for a model that leaves: it is copied on a stream of its own while another one comes and
    computes; the host does not wait at all. What has not changed since it came is not copied again.

    Args:
        folder: where the files go.

    Raises:
        RunError: in all methods, where a file cannot be written or read. What was to be moved away is still there then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._away: dict[tuple[int, Group], Away] = {}
        # On a GPU: what has come back, with the copies that it came from.
        self._copies: dict[tuple[int, Group], Away] = {}
        self._learners: list[Resident] = []
        self._streams: Streams | None = None

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
        elif self._streams is None:
            self._streams = Streams(learner.device)
        self._park(learner)

    def use(self, learner: Resident | None, *, moments: bool = True) -> None:
        """Move the tensors of all other learners away, then this learner's to the device; None moves all away.

        moments: whether the optimiser's state is needed. Otherwise it stays where it is.
        """
        for other in self._learners:
            if other is not learner:
                self._park(other)
        if learner is not None:
            self._restore(learner, _GROUPS if moments else ("weights",))

    def use_all(self) -> None:
        """Bring all learners' tensors to the device, to save or load them."""
        for learner in self._learners:
            self._restore(learner, _GROUPS)

    def close(self) -> None:
        """Bring all learners' tensors to the device, and remove the folder."""
        self.use_all()
        self._copies.clear()
        with suppress(OSError):
            # It may hold what is not ours.
            self._folder.rmdir()

    def _park(self, learner: Resident) -> None:
        for group in _GROUPS:
            key = (id(learner), group)
            if key in self._away or not (storages := _storages(learner, group)):
                continue
            copied = self._copies.pop(key, None)
            if copied is not None and copied.is_of(storages, learner.version):
                away = copied
            elif self._streams is not None:
                # Its memory is free before there is a new copy.
                copied = None
                away = self._issue(storages, learner.version, self._streams)
            else:
                away = self._write(storages, learner.version)
            # Only now that all are written.
            for part in away.parts:
                part.empty()
            self._away[key] = away

    def _write(self, storages: list[torch.UntypedStorage], version: int) -> Away:
        with self._explained():
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
            away = Away(version, [Parked(storage, file) for storage in storages])
            file.flush()
        return away

    def _issue(self, storages: list[torch.UntypedStorage], version: int, streams: Streams) -> Away:
        """Copy into host memory, as soon as the GPU has done what was asked of it before."""
        memory = HostMemory(pinned=storages[0].device.type == "cuda")
        streams.leaving.wait_stream(streams.computing)
        with streams.on(streams.leaving):
            away = Away(version, [Parked(storage, memory) for storage in storages])
        for storage in storages:
            streams.keep_until_done(_bytes(storage), streams.leaving)
        away.done = streams.leaving.record_event()
        return away

    def _restore(self, learner: Resident, groups: tuple[Group, ...]) -> None:
        for group in groups:
            key = (id(learner), group)
            if key not in self._away:
                continue
            away, streams = self._away[key], self._streams
            for part in away.parts:
                part.make_room()
            if streams is None:
                with self._explained():
                    for part in away.parts:
                        part.fill()
            else:
                # The room may be memory that is still computed with, and the copies may still be on their way.
                streams.coming.wait_stream(streams.computing)
                streams.coming.wait_event(away.done)
                with streams.on(streams.coming):
                    for part in away.parts:
                        part.fill()
                streams.computing.wait_stream(streams.coming)
                self._copies[key] = away
            # A file ends with what refers to it.
            del self._away[key]

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

    From and to a GPU it is copied on the current stream, and the host does not wait.

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
                part.copy_(place, non_blocking=True)
        else:
            self._file, self._start = away, away.tell()
            away.write(_view(storage))

    @property
    def identity(self) -> int:
        """Of the storage, however many objects in Python refer to it."""
        return self._storage._cdata

    def _places(self) -> tuple[Tensor, ...]:
        """The parts of the storage that belong to the parts of the copy."""
        return _bytes(self._storage).split([part.numel() for part in self._copy])

    def empty(self) -> None:
        """Free the storage's memory."""
        self._storage.resize_(0)

    def restore(self) -> None:
        """Fill the storage again. OSError where the file cannot be read."""
        self.make_room()
        self.fill()

    def make_room(self) -> None:
        """Give the storage memory again."""
        self._storage.resize_(self._size)

    def fill(self) -> None:
        """Copy the content into the storage. OSError where the file cannot be read."""
        if self._file is None:
            for part, place in zip(self._copy, self._places(), strict=True):
                place.copy_(part, non_blocking=True)
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


def _storages(learner: Resident, group: Group) -> list[torch.UntypedStorage]:
    """The storages of a learner's parameters or of its optimiser's state, each once, even if several tensors share
    it."""
    storages: dict[int, torch.UntypedStorage] = {}
    tensors: list[Tensor] = []
    if group == "weights":
        tensors += learner.model.parameters()
    elif learner.optimizer is not None:
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
