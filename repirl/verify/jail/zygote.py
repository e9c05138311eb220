"""The warm interpreter: a trusted process in the sandbox that forks for each program, watches it, and ends it with all
that it started. It never sees what it runs: the job goes by descriptor from the trainer to the program.

A program's process is a fork of it. Where the program has a process namespace of its own, an idle process is the first
one there, whose end ends all others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from . import limits as limiting
from . import program
from .isolation import Isolation

_TICK_SECONDS = 0.02
# Where the kernel does not tell the end of a process.
_OLD_TICK_SECONDS = 0.002
# On the status pipe: the program is confined, and begins.
_STARTED = b"s"


class Zygote:
    """Serves one trainer, one program at a time.

    control: a socket of whole messages; its end is the trainer's, or says that this process is no longer needed.
    watched: descriptors whose end means the same (trainer's process, launcher).
    """

    def __init__(self, control: int, watched: list[int], isolation: Isolation) -> None:
        self.control = socket.socket(fileno=control)
        self.watched, self.isolation = watched, isolation
        self.proc = isolation.proc

    def serve(self) -> None:
        poll = select.poll()
        for descriptor in (self.control.fileno(), *self.watched):
            poll.register(descriptor, select.POLLIN)
        # It has no use for signals, and what shares its memory must not run their handlers.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._reply({"ready": True, **self.isolation.report()})
        while True:
            for descriptor, _ in poll.poll():
                if descriptor != self.control.fileno():
                    return
            message, descriptors = self._receive()
            if not message:
                return
            # A word to end a program may come when it has ended already.
            if message != b"kill" and not self._run(json.loads(message), descriptors):
                return

    def _receive(self) -> tuple[bytes, list[int]]:
        try:
            message, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
        except OSError:
            return b"", []
        return message, descriptors

    def _reply(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(message).encode())

    def _run(self, limits: dict[str, Any], descriptors: list[int]) -> bool:
        """Run a program; whether the trainer is still there.

        Args:
            limits: as of `sandbox.Limits`.
            descriptors: job, stdin, stdout, stderr, result, and the socket to another program, if any.
        """
        began = time.monotonic()
        status_read, status_write = os.pipe()
        try:
            pid = self.isolation.fork()
        except OSError as error:
            for descriptor in (*descriptors, status_read, status_write):
                os.close(descriptor)
            sys.excepthook(type(error), error, error.__traceback__)
            self._reply({"status": "broken", "code": None, "seconds": 0.0})
            return True
        if not pid:
            self._program(limits, descriptors, status_write)
        for descriptor in (*descriptors, status_write):
            os.close(descriptor)
        status, is_wanted = self._watch(limits, pid, began)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if status == "exited" else None
        self.isolation.kill(pid if code is None else None)
        self.isolation.wipe()
        has_started = os.read(status_read, 1) == _STARTED
        os.close(status_read)
        if status == "exited" and not has_started:
            status = "broken"
        elif status == "exited" and self.isolation.ran_out_of_memory():
            status = "memory"
        self._reply({"status": status, "code": code, "seconds": time.monotonic() - began})
        return is_wanted

    def _watch(self, limits: dict[str, Any], pid: int, began: float) -> tuple[str, bool]:
        """Wait for the end of the program's process: why it is to end, and whether the trainer is still there. It is
        still to be waited for."""
        poll, end = select.poll(), _end_of(pid)
        try:
            for descriptor in (end, self.control.fileno(), *self.watched):
                if descriptor >= 0:
                    poll.register(descriptor, select.POLLIN)
            return self._watch_by(poll, limits, pid, end, began)
        finally:
            if end >= 0:
                os.close(end)

    def _watch_by(
        self, poll: select.poll, limits: dict[str, Any], pid: int, end: int, began: float
    ) -> tuple[str, bool]:
        wait = _TICK_SECONDS
        while True:
            left = began + limits["wall_seconds"] - time.monotonic()
            if left <= 0:
                return "timeout", True
            events = dict(poll.poll(1000 * min(left, wait if end >= 0 else _OLD_TICK_SECONDS) + 1))
            if end in events or (end < 0 and _has_ended(pid)):
                return "exited", True
            if self.control.fileno() in events:
                message, _ = self._receive()
                return "stopped", bool(message)
            if events:
                return "stopped", False
            started = time.monotonic()
            used = limiting.usage(limiting.descendants(self.proc, self.isolation.own_pid), self.isolation.own_memory)
            # A long list of processes is not to be read all the time.
            wait = max(_TICK_SECONDS, 20 * (time.monotonic() - started))
            # The kernel may have ended one of several processes before their sum was seen here.
            if used.memory > limits["memory_mb"] << 20 or self.isolation.ran_out_of_memory():
                return "memory", True
            if used.cpu > limits["cpu_seconds"]:
                return "timeout", True
            # The first one of a namespace is not the program's.
            if used.processes > limits["processes"] + (1 if self.isolation.is_shared else 2):
                return "processes", True

    def _arrange(self, descriptors: list[int], status: int) -> None:
        """0 to 4: stdin, stdout, stderr, result, the other program; 5, 6: job, status; 7: what the isolation keeps.
        Nothing else stays open."""
        job, *standard = descriptors
        numbers = dict(enumerate(standard)) | {5: job, 6: status}
        if self.isolation.kept >= 0:
            numbers[7], self.isolation.kept = self.isolation.kept, 7
        high = {number: fcntl.fcntl(descriptor, fcntl.F_DUPFD, 32) for number, descriptor in numbers.items()}
        for number in range(8):
            if number in high:
                os.dup2(high[number], number)
            else:
                with contextlib.suppress(OSError):
                    os.close(number)
        os.closerange(8, 1 << 16)

    def _program(self, limits: dict[str, Any], descriptors: list[int], status: int) -> None:
        """The process of the program: never returns."""
        code = 255
        try:
            self.control.detach()
            self.isolation.enter(limits)
            self._arrange(descriptors, status)
            self.isolation.confine(limits)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(6, _STARTED)
            os.close(6)
            code = program.run(5)
        except BaseException:
            with contextlib.suppress(BaseException):
                sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)


def _end_of(pid: int) -> int:
    """A descriptor that tells the end of a child; -1 before Linux 5.3."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
