"""The processes of a run, the mesh over which weights are sharded, and sums and gathers over the processes.

`torchrun` starts several processes; otherwise there is one. Every process holds the whole batch (token ids and streams
are small, and are on the CPU) and computes a part of it. The results are then summed or gathered, so that all
processes continue with the same numbers. Code that uses this module does not depend on the rank.
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
    """The processes of a run, seen from one of them.

    Args:
        device: the device of this process.
        rank: the number of this process, from 0.
        size: the number of processes.
        mesh: the processes over which weights are sharded; None if weights are not sharded.
        timeout: how long a process waits for the others.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    timeout: datetime.timedelta = datetime.timedelta(minutes=30)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the log and files, and shows the display."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a CPU tensor, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def maximum(self, value: float) -> float:
        """The largest value of all processes."""
        return max(self.gather([value]))

    def gather(self, items: Sequence[T]) -> list[T]:
        """The items of all processes, in the order of ranks, on every process."""
        if self.size == 1:
            return list(items)
        parts: list[Sequence[T]] = [()] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()


def pick_device(config: Config) -> torch.device:
    """The device of this process, as the option `device` says.

    Raises:
        ConfigError: the option is "cuda" and PyTorch finds no GPU.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but PyTorch sees no GPU here; use device: cpu or device: auto")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def own_rank() -> int:
    """The number of this process among those of the run, also before `join_world`."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def join_world(config: Config) -> World:
    """Join the processes that torchrun started, or form a world of one process without torchrun.

    Raises:
        ConfigError: `parallel.replicate` does not divide the number of processes, or there are more processes than
            GPUs.
    """
    device = pick_device(config)
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    rank = own_rank()
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
    # A single process shards its weights, too, if they are kept in host memory, from which FSDP2 fetches them.
    alone = size == 1
    if alone and not config.parallel.cpu_offload:
        return World(device)
    timeout = datetime.timedelta(minutes=config.parallel.timeout_minutes)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        options: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
        dist.init_process_group(backend, timeout=timeout, **options)
    if replicate == 1:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        # init_device_mesh would create these groups without the timeout.
        ranks = torch.arange(size).view(replicate, -1)
        groups = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0] for rows in (ranks.T, ranks)]
        mesh = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))
    return World(device, rank, size, mesh, timeout)


def leave_world() -> None:
    """Destroy the process group if there is one. If it stays, its threads can crash the interpreter at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
