"""Processes that run functions as the ranks of gloo process groups, for the tests of sharded weights.

They are started once for a module of tests, as each start takes seconds. After a failure they are ended, since ranks
may wait in different collectives, and the next use starts new ones.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# A collective that waits for longer fails; the answer of a test may take a little more.
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
ANSWER_SECONDS = 100.0


class RankProcesses:
    """Processes, which run a function as the ranks of the group of all of them, or of the last two."""

    def __init__(self, world_size: int = 3) -> None:
        self._world_size = world_size
        self._processes: list[multiprocessing.context.SpawnProcess] = []
        self._connections: list[Connection] = []
        self._directory: tempfile.TemporaryDirectory | None = None

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(group, *args)`` on each rank; the results in rank order.

        A group of 2 of 3 has the global ranks 1 and 2: a rank within the group must not be taken for a global one.
        """
        if not self._processes:
            self._start()
        connections = self._connections[self._world_size - num_ranks :]
        # Plain bytes: tensors in shared memory would have to outlive their process.
        message = pickle.dumps((num_ranks, function, args))
        for connection in connections:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        while len(results) < num_ranks:
            waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
            # The first failure to arrive is the one to tell of: other ranks fail later, for want of this one.
            ready = wait(waiting, ANSWER_SECONDS)
            failure = "" if ready else f"no answer within {ANSWER_SECONDS:.0f} s"
            for connection in ready:
                rank = connections.index(connection)
                try:
                    results[rank], error = pickle.loads(connection.recv_bytes())
                except EOFError:
                    error = "the process ended"
                if error:
                    failure += f"rank {rank}: {error}\n"
            if failure:
                self.end()
                raise AssertionError(failure)
        return [results[rank] for rank in range(num_ranks)]

    def end(self) -> None:
        """End the processes, by force where they do not answer."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        if self._directory is not None:
            self._directory.cleanup()
        self._processes, self._connections, self._directory = [], [], None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        init_file = os.path.join(self._directory.name, "rendezvous")
        # Triton decides at import whether it interprets, and does so only where it is asked for CPU tensors.
        environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # the loopback device, whatever the host's name resolves to
        with mock.patch.dict(os.environ, environment):
            for rank in range(self._world_size):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self._world_size, init_file, there), daemon=True)
                process.start()
                there.close()
                self._processes.append(process)
                self._connections.append(here)


def _serve(rank: int, world_size: int, init_file: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    groups = {world_size: dist.group.WORLD}
    if world_size > 2:
        groups[2] = dist.new_group([world_size - 2, world_size - 1], timeout=COLLECTIVE_TIMEOUT)
    with contextlib.suppress(EOFError, ConnectionError):  # the tests are over, or another rank has failed
        while True:
            num_ranks, function, args = pickle.loads(connection.recv_bytes())
            result, failure = None, ""
            try:
                result = function(groups[num_ranks], *args)
            except Exception:
                failure = traceback.format_exc()
            connection.send_bytes(pickle.dumps((result, failure)))
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo have been seen to abort an interpreter that ends in the ordinary way


@contextlib.contextmanager
def rank_processes(world_size: int = 3) -> Iterator[RankProcesses]:
    """The processes, ended on leaving."""
    processes = RankProcesses(world_size)
    try:
        yield processes
    finally:
        processes.end()
