"""Runs programs that a model wrote, and that nobody has read, so that they do no harm and cannot fake a verdict.

Each program has its own tree of processes, which is ended as a whole; it has no network, sees Python's standard library
and the system's shared libraries and nothing else, read-only, and has an empty folder of its own. Limits hold for its
time, memory, processes, files and output. What is right never enters its process: values cross as plain data, and are
compared here; assertions run in another process (jail/program.py).

    kind          what holds a program
    bubblewrap    bubblewrap builds the view of files; namespaces for each program; seccomp
    namespaces    the same, where bubblewrap is not installed
    landlock      Landlock and seccomp, where the kernel lets this user make no namespaces
    none          limits, and seccomp; only with `allow_unsandboxed`

It does not protect from faults of the kernel, nor from what a program learns by the time that things take (caches,
load). It does not keep a program from slowing down others on the same cores within its limits. Without control groups,
the memory of several processes together is measured every 20 ms, and may be over the limit for as long. A solution that
has learnt the right outputs by heart passes. docs/sandbox.md says more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import queue
import secrets
import socket
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from repirl.config import ConfigError, RunError
from repirl.verify.jail import plain
from repirl.verify.jail.program import read_message
from repirl.verify.sandbox_worker import Outcome, Worker, WorkerLost

KINDS = ("bubblewrap", "namespaces", "landlock")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use, with all that it starts.

    wall_seconds: from its start to its end · cpu_seconds: of all its processes · memory_mb: MiB of all its processes ·
    processes: with threads · open_files: of each process · file_mb: MiB of a file, and of all that it leaves in its
    folder · output_kb: KiB of stdout, of stderr, and of what its functions return, each.
    """

    wall_seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_mb: int = 512
    processes: int = 16
    open_files: int = 64
    file_mb: int = 16
    output_kb: int = 1024

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_whole = not field.name.endswith("_seconds")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if is_whole else int | float)
                or not 0 < value < 1e9
            ):
                what = "whole number" if is_whole else "number"
                raise ConfigError(f"limit {field.name} is {value!r}; expected a positive {what}")


@dataclasses.dataclass(frozen=True)
class Execution:
    """What came of a program, a call or a test.

    status: "ok" · "error" (an exception, an exit code other than 0, a result that is no plain data) · "wrong" (an
    assertion of the test failed) · "compile_error" · "timeout" · "memory" · "processes" (too many) · "output" (too
    much) · "killed" (by a signal, or for an unknown reason).
    exit_code: of the process, negative for a signal, None where it was ended or is not known.
    value: what a function returned. seconds: of the whole program.
    """

    status: str
    exit_code: int | None
    stdout: str
    stderr: str
    value: Any
    seconds: float


class Sandbox:
    """Runs programs, `workers` at a time. For several threads.

    kind: what it uses: "bubblewrap", "namespaces", "landlock" or "none" · missing: in one line, what protection is
    not there; empty where all is.
    """

    def __init__(
        self, limits: Limits | None = None, workers: int = 1, allow_unsandboxed: bool = False, kind: str | None = None
    ) -> None:
        """Start the first worker; the others start when they are needed.

        Args:
            limits: of each program.
            workers: how many run at a time.
            allow_unsandboxed: run them with limits only where the system has no sandbox, with a warning.
            kind: this one only, instead of the best that there is.

        Raises:
            ConfigError: there is no sandbox on this system.
        """
        if workers < 1:
            raise ConfigError(f"{workers} workers; expected at least 1")
        self.limits = limits or Limits()
        first, self.kind, self.missing = _first_worker(self._fields(), kind, allow_unsandboxed)
        if self.kind == "none":
            warnings.warn(self.missing, stacklevel=2)
        # A candidate and its test run beside each other, in workers of their own.
        self._idle: queue.LifoQueue[_Slot] = queue.LifoQueue()
        self._slots = [_Slot(self.kind, self._fields()) for _ in range(workers)]
        self._slots[-1].workers["candidate"] = first
        for slot in self._slots:
            self._idle.put(slot)
        self._tests = ThreadPoolExecutor(workers, "sandbox-test")

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, when they are done with what they run."""
        slots, self._slots = self._slots, []
        for _ in slots:
            self._idle.get().end()
        self._tests.shutdown()

    def run_program(self, source: str, stdin: str = "", limits: Limits | None = None) -> Execution:
        """Run a whole program.

        Args:
            source: of it.
            stdin: what it reads there.
            limits: of this program, instead of the sandbox's; not more memory or processes than those.
        """
        with self._slot() as slot:
            outcome = slot.run("candidate", {"kind": "program", "source": source}, self._fields(limits), stdin)
        return _execution(outcome, _messages(outcome))

    def call_functions(
        self, source: str, name_path: str, calls: Sequence[Sequence[Any]], limits: Limits | None = None
    ) -> list[Execution]:
        """Call a function of a program several times, in one process. The limits are for all calls together.

        Args:
            source: of the program.
            name_path: "f", or "Solution.f" for a method of an object that is made without arguments.
            calls: the arguments of each, plain data.
            limits: as of `run_program`.

        Returns:
            What came of each; with the output of all of them.

        Raises:
            PlainError: an argument is no plain data.
        """
        job = {"kind": "calls", "source": source, "name": name_path, "calls": [list(call) for call in calls]}
        with self._slot() as slot:
            outcome = slot.run("candidate", job, self._fields(limits))
        return _call_executions(outcome, len(calls))

    def run_assertions(
        self, source: str, test: str, entry_point: str | Sequence[str], limits: Limits | None = None
    ) -> Execution:
        """Run tests on functions of a program. The tests run in another process, which the program cannot see.

        Args:
            source: of the program, which nobody trusts.
            test: assertions, or a function `check(candidate)`, which are trusted. Other functions that they use have
                to stand in it.
            entry_point: the function that the tests call by its name or as `candidate`, or several.
            limits: as of `run_program`; the test has as many for itself.

        Returns:
            Status "ok" where the test passed.
        """
        fields = self._fields(limits)
        names = [entry_point] if isinstance(entry_point, str) else list(entry_point)
        nonce = secrets.token_bytes(16)
        ours, theirs = socket.socketpair()
        served = {"kind": "serve", "source": source}
        checked = {"kind": "test", "source": test, "names": names, "nonce": nonce}
        # Closed by whoever hands them on. Where one is not handed on, its end tells the other side.
        with self._slot() as slot, ours, theirs:
            # Its start is not to take of the candidate's time.
            slot.worker("test")
            later = self._tests.submit(slot.run, "test", checked, fields, "", ours)
            try:
                candidate = slot.run("candidate", served, fields, "", theirs)
            finally:
                theirs.close()
                tested = later.result()
        return _assertion_execution(candidate, tested, nonce)

    def _fields(self, limits: Limits | None = None) -> dict[str, Any]:
        own = dataclasses.asdict(self.limits)
        if limits is None:
            return own
        return dataclasses.asdict(limits) | {
            name: min(own[name], getattr(limits, name)) for name in ("memory_mb", "processes")
        }

    @contextlib.contextmanager
    def _slot(self) -> Any:
        if not self._slots:
            raise RunError("the sandbox is closed")
        slot = self._idle.get()
        try:
            yield slot
        finally:
            self._idle.put(slot)


class _Slot:
    """What runs one program: a worker for candidates, and one for tests, which know what is right."""

    def __init__(self, kind: str, limits: dict[str, Any]) -> None:
        self.kind, self.limits = kind, limits
        self.workers: dict[str, Worker] = {}

    def worker(self, role: str) -> Worker:
        """The worker for candidates or for tests, which starts if there is none."""
        if role not in self.workers:
            self.workers[role] = Worker(self.kind, self.limits)
        return self.workers[role]

    def run(
        self, role: str, job: dict[str, Any], limits: dict[str, Any], stdin: str = "", peer: socket.socket | None = None
    ) -> Outcome:
        try:
            outcome = self.worker(role).run(job, stdin, limits, peer)
            if outcome.status == "broken":
                raise RunError("the sandbox cannot start a program any more; the reason stands above")
            return outcome
        except WorkerLost as error:
            self.workers.pop(role).end()
            return Outcome("killed", None, b"", str(error).encode(), b"", 0.0)
        except BaseException:
            # It may still run something.
            if role in self.workers:
                self.workers.pop(role).end()
            raise

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()
        self.workers = {}


def _first_worker(limits: dict[str, Any], kind: str | None, allow_unsandboxed: bool) -> tuple[Worker, str, str]:
    """A worker of the best kind that works here, its kind, and what is missing."""
    reasons = []
    for name in KINDS if kind is None else (kind,):
        try:
            worker = _tried_worker(name, limits)
            return worker, name, worker.report["missing"]
        except RunError as error:
            reasons.append(f"{name}: {error}")
    if not allow_unsandboxed:
        raise ConfigError(
            "there is no sandbox on this system for programs that a model wrote: "
            + "; ".join(reasons)
            + ". Install bubblewrap, or allow user namespaces; or pass --allow-unsandboxed where this machine holds "
            "nothing of value"
        )
    worker = _tried_worker("none", limits)
    return worker, "none", worker.report["missing"]


def _tried_worker(kind: str, limits: dict[str, Any]) -> Worker:
    """A worker that has run a program.

    Raises:
        RunError: it cannot.
    """
    worker = Worker(kind, limits)
    try:
        outcome = worker.run({"kind": "program", "source": "print(1)"}, "", limits)
    except WorkerLost as error:
        worker.end()
        raise RunError(f"it does not run a program: {error}") from None
    if outcome.stdout != b"1\n" or outcome.status != "exited":
        worker.end()
        raise RunError(f"it does not run a program: {outcome.status}")
    return worker


def _messages(outcome: Outcome) -> list[tuple[bytes, bytes]]:
    file, messages = io.BytesIO(outcome.result), []
    while message := read_message(file):
        messages.append(message)
    return messages


def _status(outcome: Outcome, messages: list[tuple[bytes, bytes]]) -> str:
    """Of the whole program."""
    if outcome.status != "exited":
        return outcome.status
    tags = [tag for tag, _ in messages[:1]]
    if outcome.code == -24:
        return "timeout"
    if tags == [b"C"]:
        return "compile_error"
    if any(tag == b"M" for tag, _ in messages):
        return "memory"
    if outcome.code is None or outcome.code < 0:
        return "killed"
    return "ok" if outcome.code == 0 else "error"


def _execution(outcome: Outcome, messages: list[tuple[bytes, bytes]]) -> Execution:
    status = _status(outcome, messages)
    stderr = outcome.stderr.decode("utf-8", "replace")
    if status == "compile_error":
        stderr += messages[0][1].decode("utf-8", "replace")
    code = outcome.code if outcome.status == "exited" else None
    return Execution(status, code, outcome.stdout.decode("utf-8", "replace"), stderr, None, outcome.seconds)


def _call_executions(outcome: Outcome, num_calls: int) -> list[Execution]:
    messages = _messages(outcome)
    whole = _execution(outcome, messages)
    results = [_call_execution(whole, message) for message in messages if message[0] != b"C"][:num_calls]
    # The program ended before the others.
    status = "error" if whole.status == "ok" else whole.status
    rest = dataclasses.replace(whole, status=status)
    return results + [rest] * (num_calls - len(results))


def _call_execution(whole: Execution, message: tuple[bytes, bytes]) -> Execution:
    tag, data = message
    status, value, reason = "error", None, ""
    try:
        if tag == b"V":
            status, value = "ok", plain.decode(data)
        elif tag == b"M":
            status = "memory"
        elif tag == b"X":
            reason = _raised(data)
        else:
            reason = data.decode("utf-8", "replace")
    except plain.PlainError as error:
        status, reason = "error", f"no plain data: {error}"
    return dataclasses.replace(whole, status=status, value=value, stderr=whole.stderr + reason)


def _raised(data: bytes) -> str:
    """The text of an exception's message; empty where a program has written something else there.

    Raises:
        PlainError: it is no plain data.
    """
    value = plain.decode(data)
    # A number is not made a text: that fails for long ones.
    return value[1] if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str) else ""


def _assertion_execution(candidate: Outcome, tested: Outcome, nonce: bytes) -> Execution:
    messages, verdicts = _messages(candidate), _messages(tested)
    whole = _execution(candidate, messages)
    if tested.status == "exited" and tested.code == 0 and verdicts == [(b"P", nonce)]:
        return dataclasses.replace(whole, status="ok")
    if whole.status not in ("ok", "error"):
        return whole
    status, reason = "error", ""
    for tag, data in verdicts[-1:]:
        if tag == b"A":
            status, reason = "wrong", "AssertionError: " + data.decode("utf-8", "replace")
        elif tag == b"X":
            reason = _raised(data)
    if tested.status != "exited":
        status, reason = tested.status, "the test was ended"
    return dataclasses.replace(whole, status=status, stderr=whole.stderr + reason)
