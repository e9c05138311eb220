"""Limits on a process, and what a tree of processes uses."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Any, NamedTuple

_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """processes: with threads · memory: resident bytes, shared ones counted for each · cpu: seconds."""

    processes: int
    memory: int
    cpu: float


def limit_process(limits: dict[str, Any], threads_of_user: int) -> None:
    """Limit this process and each that it starts.

    Args:
        limits: the fields of `sandbox.Limits`.
        threads_of_user: that the user has already, where they count for the limit on processes.
    """
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else contextlib.nullcontext() as file:
        own = int(file.read().split()[0]) * _PAGE if file else 64 << 20
    cpu = int(limits["cpu_seconds"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, own + (limits["memory_mb"] << 20)),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, threads_of_user + limits["processes"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def descendants(proc: int, root: int) -> dict[int, list[str]]:
    """The processes below one, without itself, with the fields of their `stat` from the state on.

    Args:
        proc: descriptor of a /proc folder.
        root: the number of the process there.
    """
    fields: dict[int, list[str]] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields[int(name)] = _read(proc, f"{name}/stat").rpartition(")")[2].split()
    below: dict[int, list[str]] = {}
    parents = {root}
    while parents:
        parents = {pid for pid, values in fields.items() if int(values[1]) in parents and pid not in below}
        below |= {pid: fields[pid] for pid in parents}
    return below


def usage(processes: dict[int, list[str]]) -> Usage:
    """What `descendants` use, the time of those included that have ended and been waited for."""
    values = processes.values()
    return Usage(
        sum(int(fields[17]) for fields in values),
        sum(int(fields[21]) for fields in values) * _PAGE,
        sum(int(number) for fields in values for number in fields[11:15]) / _TICKS,
    )


def _read(folder: int, name: str) -> str:
    descriptor = os.open(name, os.O_RDONLY, dir_fd=folder)
    try:
        return os.read(descriptor, 4096).decode("utf-8", "replace")
    finally:
        os.close(descriptor)
