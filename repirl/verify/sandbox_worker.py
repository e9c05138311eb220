"""The trainer's side of one sandboxed worker: a job goes in, and what came of it is read, as bytes that nobody
trusts."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repirl.config import RunError
from repirl.verify.jail import plain

# The start of a process on a slow shared disk can take a while.
_START_SECONDS = 60.0
# A worker that has not ended a program so long after its time is given up.
_GRACE_SECONDS = 20.0
_CHUNK = 1 << 16
_BOOT = (
    "import sys; sys.path.append(sys.argv[1]); from jail.launcher import main; sys.path.pop(); "
    "main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    # The same order of sets whenever a program is judged.
    "PYTHONHASHSEED": "0",
    # Each further one reserves address space, which is limited.
    "MALLOC_ARENA_MAX": "1",
}


class Outcome(NamedTuple):
    """What came of a job.

    status: "exited", "timeout", "memory", "processes", "output" (too much), "killed" (the worker is gone), "broken" (a
    fault of the sandbox: the program did not begin) · code: how the process ended, as of `os.waitstatus_to_exitcode`;
    None where it is not known · result: its messages, cut off where there were too many.
    """

    status: str
    code: int | None
    stdout: bytes
    stderr: bytes
    result: bytes
    seconds: float


class WorkerLost(Exception):
    """The worker is gone, or does not answer: it has to be replaced."""


class Worker:
    """A process of launcher and sandbox. Not for several threads."""

    def __init__(self, kind: str, limits: dict[str, Any]) -> None:
        """Start it, and wait until it is ready.

        Args:
            kind: of the sandbox.
            limits: the fields of `sandbox.Limits`.

        Raises:
            RunError: it does not start; with its last line.
        """
        options = {"kind": kind, "memory_mb": limits["memory_mb"], "processes": limits["processes"]}
        if kind == "bubblewrap":
            options["bwrap"] = shutil.which("bwrap")
            if options["bwrap"] is None:
                raise RunError("it is not installed")
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        trainer = os.pidfd_open(os.getpid()) if hasattr(os, "pidfd_open") else -1
        numbers = [theirs.fileno(), *([trainer] if trainer >= 0 else [])]
        folder = Path(__file__).resolve().parent
        command = [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", _BOOT, str(folder)]
        command += [str(theirs.fileno()), str(trainer), json.dumps(options)]
        try:
            # In a session of its own: an interrupt from the keyboard is the trainer's to handle.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=numbers, env=_ENVIRONMENT, start_new_session=True
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()
            if trainer >= 0:
                os.close(trainer)
        self._control.settimeout(_START_SECONDS)
        try:
            self.report: dict[str, Any] = self._message()
        except BaseException as error:
            self.end()
            if isinstance(error, WorkerLost):
                raise RunError(f"the sandbox does not start: {error}") from None
            raise
        if "failed" in self.report:
            self.end()
            raise RunError(f"the sandbox does not start: {self.report['failed']}")

    def _message(self) -> dict[str, Any]:
        try:
            received = self._control.recv(_CHUNK)
        except OSError as error:
            raise WorkerLost(str(error)) from None
        if not received:
            raise WorkerLost("its process has ended")
        message: dict[str, Any] = json.loads(received)
        return message

    def run(
        self, job: dict[str, Any], stdin: str, limits: dict[str, Any], peer: socket.socket | None = None
    ) -> Outcome:
        """Run a job to its end.

        Args:
            job: as in `jail.program`.
            stdin: of the program.
            limits: the fields of `sandbox.Limits`.
            peer: the socket to another job; closed here.

        Raises:
            WorkerLost: what came of it is not known.
        """
        pipes: list[tuple[int, int]] = []
        given: list[int] = []
        try:
            if peer is not None:
                given.append(peer.detach())
            given[:0] = [_memory(plain.encode(job)), _memory(stdin.encode("utf-8", "replace"))]
            pipes = [os.pipe() for _ in range(3)]
            given[2:2] = [write for _, write in pipes]
            try:
                socket.send_fds(self._control, [json.dumps(limits).encode()], given)
            except OSError as error:
                raise WorkerLost(str(error)) from None
            finally:
                for descriptor in given:
                    os.close(descriptor)
                given, pipes_read = [], [read for read, _ in pipes]
            return self._collect(pipes_read, limits)
        finally:
            for descriptor in (*given, *(read for read, _ in pipes)):
                os.close(descriptor)

    def _collect(self, pipes: Sequence[int], limits: dict[str, Any]) -> Outcome:
        """Read what the program writes until it has ended."""
        texts = {descriptor: bytearray() for descriptor in pipes}
        allowed = limits["output_kb"] << 10
        is_too_much = False
        deadline = time.monotonic() + limits["wall_seconds"] + _GRACE_SECONDS
        with selectors.DefaultSelector() as selector:
            for descriptor in pipes:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            selector.register(self._control, selectors.EVENT_READ)
            message = None
            while message is None:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    if key.fileobj is self._control:
                        message = self._message()
                    elif not _drain(key.fd, texts[key.fd], allowed):
                        selector.unregister(key.fd)
                too_much = any(len(text) > allowed for text in texts.values())
                if too_much and not is_too_much and message is None:
                    is_too_much = True
                    with contextlib.suppress(OSError):
                        self._control.send(b"kill")
                if time.monotonic() > deadline:
                    raise WorkerLost("it does not answer")
        # All of the program's processes are gone: what is in the pipes is all that there will be.
        for descriptor in pipes:
            with contextlib.suppress(BlockingIOError):
                while _drain(descriptor, texts[descriptor], allowed):
                    pass
        if any(len(text) > allowed for text in texts.values()):
            is_too_much = True
        stdout, stderr, result = (bytes(texts[descriptor][:allowed]) for descriptor in pipes)
        status = "output" if is_too_much else message["status"]
        return Outcome(status, message["code"], stdout, stderr, result, message["seconds"])

    def end(self) -> None:
        """End it, with all that runs in it."""
        self._control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _memory(data: bytes) -> int:
    """The descriptor of a file in memory, at its beginning."""
    descriptor = os.memfd_create("job")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _drain(descriptor: int, text: bytearray, allowed: int) -> bool:
    """Read from a pipe what is there, and keep a little more than what is allowed; False at the end of the data."""
    data = os.read(descriptor, _CHUNK)
    if len(text) <= allowed:
        text += data
    return bool(data)
