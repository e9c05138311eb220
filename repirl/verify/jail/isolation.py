"""What keeps a program to itself, by kind: "namespaces", "bubblewrap", "landlock", "none"."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from . import limits as limiting


class Isolation:
    """No protection: limits only."""

    kind = "none"

    def __init__(self) -> None:
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.own_pid = os.getpid()

    def report(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def fork(self) -> int:
        return os.fork()

    def kill(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)

    def wipe(self) -> None:
        """Remove what the program left in files."""

    def ran_out_of_memory(self) -> bool:
        return False

    def enter(self, limits: dict[str, Any]) -> None:
        """In the program's first process, which is trusted."""
        os.setsid()

    def confine(self, limits: dict[str, Any]) -> None:
        """In the process of the program itself, right before it."""
        limiting.limit_process(limits, 4096)
