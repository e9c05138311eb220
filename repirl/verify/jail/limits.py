"""Limits on a process, and what a tree of processes uses."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Any, NamedTuple

_PAGE = resource.getpagesize()
# Below 128 MiB, which the kernel keeps free for it.
_STACK = 64 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """processes: with threads · memory: resident bytes, shared ones counted for each · cpu: seconds."""

    processes: int
    memory: int
    cpu: float


def limit_process(limits: dict[str, Any], own_bytes: int, threads: int) -> None:
    """Limit this process and each that it starts.

    Args:
        limits: the fields of `sandbox.Limits`.
        own_bytes: of address space that the interpreter takes itself.
        threads: that count for the limit on processes, and are not the program's.
    """
    for kind, value in (
        (resource.RLIMIT_AS, own_bytes + (limits["memory_mb"] << 20)),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, threads + limits["processes"]),
        # With 0, a handler of cores that the system has would still run.
        (resource.RLIMIT_CORE, 1),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    # Deep recursion by way of C functions, such as functools.cache, needs more than the usual 8 MiB.
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY:
        wanted = max(soft, _STACK)
        resource.setrlimit(
            resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    # The watch ends it earlier, unless it is kept from running. The first limit can be told from other ends.
    seconds = int(limits["cpu_seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def descendants(proc: int, root: int) -> dict[int, list[str]]:
    """The processes below one, without itself, with the fields of their `stat` from the state on.

    Args:
        proc: descriptor of a /proc folder.
        root: the number of the process there.
    """
    below: dict[int, list[str]] = {}
    try:
        parents = [root]
        while parents:
            children = [child for pid in parents for child in _children(proc, pid)]
            parents = [pid for pid in children if pid not in below]
            for pid in parents:
                with contextlib.suppress(OSError):
                    below[pid] = _stat(proc, pid)
        return below
    except FileNotFoundError:
        # The kernel keeps no lists of children: it is to be seen from the parents of all.
        return _search(proc, root)


def _children(proc: int, pid: int) -> list[int]:
    numbers = []
    try:
        threads = _list(proc, f"{pid}/task")
    except OSError:
        # It has ended meanwhile.
        return []
    for thread in threads:
        try:
            numbers += _read(proc, f"{pid}/task/{thread}/children").split()
        except OSError:
            if os.access(f"{pid}/task/{thread}", os.F_OK, dir_fd=proc):
                raise FileNotFoundError from None
    return [int(number) for number in numbers]


def _search(proc: int, root: int) -> dict[int, list[str]]:
    fields: dict[int, list[str]] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields[int(name)] = _stat(proc, int(name))
    below: dict[int, list[str]] = {}
    parents = {root}
    while parents:
        parents = {pid for pid, values in fields.items() if int(values[1]) in parents and pid not in below}
        below |= {pid: fields[pid] for pid in parents}
    return below


def usage(processes: dict[int, list[str]], own_memory: int) -> Usage:
    """What `descendants` use, the time of those included that have ended and been waited for.

    Args:
        processes: as `descendants` returns them.
        own_memory: bytes that the interpreter takes itself, which its forks share.
    """
    values = processes.values()
    return Usage(
        sum(int(fields[17]) for fields in values),
        sum(max(0, int(fields[21]) * _PAGE - own_memory) for fields in values),
        sum(int(number) for fields in values for number in fields[11:15]) / _TICKS,
    )


def address_space(proc: int) -> int:
    """Bytes of this process."""
    return int(_read(proc, "self/statm").split()[0]) * _PAGE


def resident(proc: int) -> int:
    """Bytes of this process in memory."""
    return int(_read(proc, "self/statm").split()[1]) * _PAGE


def threads_of_user(proc: int) -> int:
    """How many threads this process's user has, as far as it is to be seen."""
    count = 0
    for name in os.listdir(proc):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(name, dir_fd=proc).st_uid == os.getuid():
                    count += int(_stat(proc, int(name))[17])
    return count


def _stat(proc: int, pid: int) -> list[str]:
    return _read(proc, f"{pid}/stat").rpartition(")")[2].split()


def _list(folder: int, name: str) -> list[str]:
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        return os.listdir(descriptor)
    finally:
        os.close(descriptor)


def write(folder: int, name: str, text: str) -> None:
    """Write to a file of a /proc folder."""
    descriptor = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _read(folder: int, name: str) -> str:
    descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    finally:
        os.close(descriptor)
