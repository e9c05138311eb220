"""The processes of a run: who they are, how weights are laid over them, and what they tell each other.

`torchrun` starts several, anything else one. Every process holds the whole batch (token ids and streams are small,
and live on the CPU) and computes its share of it; what it found is then summed or gathered, so that every process
goes on with the same numbers and the code above knows nothing of ranks.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from repirl.config import Config, ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """rank of size processes; device of this one; mesh: where weights are sharded (None: they are not); timeout: how
    long one waits for the others."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    timeout: datetime.timedelta = datetime.timedelta(minutes=30)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows what is written and shown once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a CPU tensor, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, value: float) -> float:
        """The largest of all processes' values."""
        return max(self.gather([value]))

    def gather(self, items: Sequence[T]) -> list[T]:
        """Everybody's items, by rank, on every process."""
        if self.size == 1:
            return list(items)
        parts: list[Sequence[T]] = [()] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def pick_device(config: Config) -> torch.device:
    """The device that the configuration asks for; ConfigError where it asks for CUDA and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but PyTorch sees no GPU here; use device: cpu or device: auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def join_world(config: Config) -> World:
    """Take this process's place among those that torchrun started, or be the only one.

    ConfigError where the number of processes does not fit `parallel.replicate`, or a process has no GPU of its own.
    """
    device = pick_device(config)
    if dist.is_initialized():
        size, rank = dist.get_world_size(), dist.get_rank()
    else:
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    replicate = config.parallel.replicate
    if size % replicate:
        raise ConfigError(
            f"parallel.replicate is {replicate}, but there are {size} processes: it has to divide their number"
        )
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"process {rank} would use GPU {device.index}, but there are {torch.cuda.device_count()}: start at "
                "most one process a GPU (torchrun --nproc-per-node), or set device: cpu"
            )
        torch.cuda.set_device(device)
    # One process shards its weights too where only a sharded model can do what is asked for: computing in another
    # type than that of the parameters, or keeping these in host memory.
    # (Adapters keep a type of their own without that.)
    alone = size == 1
    same_type = config.computes_in == config.dtype or config.adapters is not None
    if alone and same_type and not config.parallel.cpu_offload:
        return World(device)
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        options: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group(backend, timeout=timeout, **options)
    if replicate == 1:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        # A mesh of two dimensions would make groups that do not know the timeout.
        ranks = torch.arange(size).view(replicate, -1)
        groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (ranks.T, ranks)]
        mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    return World(device, rank, size, mesh, timeout)


def leave_world() -> None:
    """End the process group, where there is one: its threads have been seen to abort an interpreter that ends."""
    if dist.is_initialized():
        dist.destroy_process_group()
