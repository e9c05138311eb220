"""Control groups: the kernel's own account of memory and processes of a program, where this user may make any."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_PREFIX = "repirl-"
# The zygote is in the group as well, and pages of files that are read and written count. While it starts, it is
# several processes.
_EXTRA_MB, _EXTRA_PROCESSES = 48, 3


class Group:
    """The groups of one worker: its zygote enters them, and its programs are born there. To move a process takes longer
    than all else that is done for a program.

    oom: descriptor of the file that counts processes killed for memory, -1 for none.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.oom = -1

    def enter(self) -> None:
        """Be in the groups, with all that this process starts."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text("0")

    def remove(self) -> None:
        """Remove the groups; their processes are gone, or will be in a moment."""
        for folder in self.folders:
            for _ in range(200):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)


def create(memory_mb: int, processes: int) -> Group | None:
    """The groups for programs of such limits; None where this user may not make them."""
    group = Group()
    try:
        for controllers, parent in _parents():
            folder = parent / f"{_PREFIX}{os.getpid()}"
            _sweep(parent)
            folder.mkdir()
            group.folders.append(folder)
            is_unified = (parent / "cgroup.controllers").exists()
            if "memory" in controllers:
                limit = (folder / "memory.max") if is_unified else (folder / "memory.limit_in_bytes")
                limit.write_text(str((memory_mb + _EXTRA_MB) << 20))
                counter = folder / ("memory.events" if is_unified else "memory.oom_control")
                group.oom = os.open(counter, os.O_RDONLY)
            if "pids" in controllers:
                (folder / "pids.max").write_text(str(processes + _EXTRA_PROCESSES))
    except OSError:
        group.remove()
        return None
    return group if group.folders else None


def _parents() -> list[tuple[set[str], Path]]:
    """Where groups may be made below this process's own, with the controllers that work there."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    places = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for _, mounted, kind, options, *_ in mounts:
            own = Path(mounted + path)
            if names and kind == "cgroup" and set(names.split(",")) <= set(options.split(",")):
                wanted = {"memory", "pids"} & set(names.split(","))
            elif not names and kind == "cgroup2":
                control = own / "cgroup.subtree_control"
                enabled = control.read_text().split() if control.exists() else []
                wanted = {"memory", "pids"} & set(enabled)
            else:
                continue
            if wanted and os.access(own, os.W_OK):
                places.append((wanted, own))
                break
    return places


def killed_for_memory(oom: int) -> int:
    """How many processes of the group the kernel has killed so far."""
    for line in os.pread(oom, 4096, 0).decode().splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def _sweep(parent: Path) -> None:
    """Remove what processes left that were killed before they could."""
    for folder in parent.glob(f"{_PREFIX}*"):
        number = folder.name.removeprefix(_PREFIX)
        if number.isdigit() and not os.path.exists(f"/proc/{number}"):
            with contextlib.suppress(OSError):
                folder.rmdir()
