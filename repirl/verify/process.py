"""Verdicts on responses, by worker processes that can be killed: a parser, or a function of the user's, may take any
time and memory for what a model writes, and may crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from repirl.config import ConfigError, RunError
from repirl.options import VerifierConfig
from repirl.verify.explain import Verdict, overlong_reason, plain_verdict
from repirl.verify.math import is_overlong, plain_reward

# The start of a process with its imports; on a slow shared disk that can take a while.
_START_SECONDS = 300.0


class Kind(NamedTuple):
    """A way to judge.

    function: what judges in the workers, as "module:name"; of (response, answer), it returns the reward · quick: the
    reward where it can be told without a worker, else None · is_overlong: whether the answer is too long to be judged,
    and is wrong. The latter two are quick whatever the texts are.
    """

    function: str
    quick: Callable[[str, str], float | None] = lambda response, answer: None
    is_overlong: Callable[[str, str], bool] = lambda response, answer: False


def kind_of(config: VerifierConfig, explain: bool = False) -> Kind:
    """What the configuration asks for; `explain`: with reasons, where that takes another function."""
    if config.kind == "math":
        if explain:
            return Kind("repirl.verify.explain:math_verdict", plain_verdict, is_overlong)
        return Kind("repirl.verify.math:math_reward", plain_reward, is_overlong)
    assert config.function is not None, "Config refuses this"
    return Kind(config.function)


class Verifier:
    """Judges responses, several at a time.

    Workers start when there is something for them, and stay; each takes the next answer when it is done with one, so a
    slow one holds up nobody. A worker that takes longer than `timeout_seconds` for an answer is killed, with all that
    it started, and one that dies (out of memory, a crash in a parser) is replaced: that answer is wrong, and no other.

    A function of the user's (kind: custom) has to return a finite number for whatever a model writes. Where it raises
    or returns something else, the run ends: what is wrong there is the function, and to take it for wrong answers would
    train the policy on noise. It runs with 4 GiB of memory beyond its imports, which is too little for a GPU.

    num_timeouts: answers given up so far, for their time or because the worker died · num_overlong: answers that were
    too long to be judged. All of them count as wrong. reasons: of the last call of `judge`, by index, where one is
    known: of answers given up or too long, and what `explain` and functions of the user's say (attribute `reason` of
    the number).
    """

    def __init__(self, config: VerifierConfig, *, explain: bool = False) -> None:
        """Load the user's function, if there is one; nothing else starts yet.

        Args:
            config: what judges, and how.
            explain: the verifier of mathematical answers gives reasons, in about twice the time.

        Raises:
            ConfigError: the function of kind custom cannot be loaded. Its module may be heavy, or harm the trainer, so
                it is a worker that tries.
            RunError: a worker does not start.
        """
        self.config, self._kind = config, kind_of(config, explain)
        self.reasons: dict[int, str] = {}
        self.num_timeouts = self.num_overlong = 0
        self._workers: list[_Worker] = []
        if config.kind == "custom":
            with self._attended() as selector:
                worker = self._start(selector)
                while not worker.is_ready:
                    self._attend(selector, {})

    @property
    def counts(self) -> Counter[str]:
        """Answers given up and too long ones, for reports."""
        return Counter(timeouts=self.num_timeouts, overlong=self.num_overlong)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Judge responses.

        Args:
            pairs: (response, right answer).

        Returns:
            The reward of each, in order.

        Raises:
            RunError: a function of the user's is at fault, or a worker does not start.
            ConfigError: a function of the user's cannot be loaded any more.
        """
        rewards: dict[int, float] = {}
        self.reasons = {}
        for index, pair in enumerate(pairs):
            quick = self._kind.quick(*pair)
            if quick is None and self._kind.is_overlong(*pair):
                self.num_overlong += 1
                self.reasons[index] = overlong_reason(*pair)
                quick = 0.0
            if isinstance(quick, Verdict):
                self.reasons[index] = quick.reason
            if quick is not None:
                rewards[index] = quick
        waiting = deque(index for index in range(len(pairs)) if index not in rewards)
        if waiting:
            with self._attended() as selector:
                self._deal(selector, pairs, waiting, rewards)
        return [rewards[index] for index in range(len(pairs))]

    def close(self) -> None:
        """End the workers, and whatever they do. More may be judged afterwards, by new ones."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()

    @contextlib.contextmanager
    def _attended(self) -> Iterator[selectors.BaseSelector]:
        """A selector of the workers. Whatever goes wrong meanwhile ends them, an interrupt from the keyboard as well:
        none may be left with an answer that nobody waits for."""
        try:
            with selectors.DefaultSelector() as selector:
                for worker in self._workers:
                    selector.register(worker.socket, selectors.EVENT_READ, worker)
                yield selector
        except BaseException:
            self.close()
            raise

    def _deal(
        self,
        selector: selectors.BaseSelector,
        pairs: Sequence[tuple[str, str]],
        waiting: deque[int],
        rewards: dict[int, float],
    ) -> None:
        """Fill in the rewards of those that wait, until none does and no worker is busy."""
        # One that died while it had nothing to do must not cost an answer.
        self._attend(selector, rewards, wait=False)
        while waiting or self._num_busy:
            while len(self._workers) < min(self.config.processes, self._num_busy + len(waiting)):
                self._start(selector)
            for worker in self._workers:
                if waiting and worker.is_idle:
                    index = waiting.popleft()
                    worker.ask(index, pairs[index], self.config.timeout_seconds)
            self._attend(selector, rewards)

    @property
    def _num_busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _start(self, selector: selectors.BaseSelector) -> _Worker:
        worker = _Worker(self._kind.function, self.config.timeout_seconds)
        self._workers.append(worker)
        selector.register(worker.socket, selectors.EVENT_READ, worker)
        return worker

    def _attend(self, selector: selectors.BaseSelector, rewards: dict[int, float], wait: bool = True) -> None:
        """Write and read what can be written and read now, and part with workers that died or are late.

        Args:
            selector: has all workers.
            rewards: verdicts are entered here.
            wait: until there is something to do.
        """
        for worker in self._workers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.unsent else 0)
            selector.modify(worker.socket, events, worker)
        soonest = min((worker.deadline for worker in self._workers), default=0.0)
        # Only idle workers have none, and then another one is busy or starts.
        seconds = max(0.0, soonest - time.monotonic()) if wait else 0.0
        for key, events in selector.select(seconds):
            worker = key.data
            try:
                message = worker.exchange(events)
            except (OSError, EOFError):
                self._part_with(worker, selector, rewards)
                continue
            if message is not None:
                self._take(worker, message, rewards)
        # After reading: what came in time counts, however late this process looks at it.
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline < now]:
            self._part_with(worker, selector, rewards)

    def _part_with(self, worker: _Worker, selector: selectors.BaseSelector, rewards: dict[int, float]) -> None:
        """End a worker that is late, or what is left of one that died; its answer is wrong."""
        selector.unregister(worker.socket)
        is_late = worker.deadline < time.monotonic()
        status = worker.end()
        self._workers.remove(worker)
        if not worker.is_ready:
            how = f"it ended with {f'signal {-status}' if status < 0 else f'exit code {status}'}"
            raise RunError(
                f"a worker of the verifier, with {self._kind.function}, does not start: "
                f"{f'it was not ready after {_START_SECONDS:g} s' if is_late else how}; its errors are above"
            )
        if worker.task is not None:
            rewards[worker.task] = 0.0
            limit = f"{self.config.timeout_seconds:g} s"
            self.reasons[worker.task] = f"timed out: {limit}" if is_late else "out of memory, or its process died"
            self.num_timeouts += 1

    def _take(self, worker: _Worker, message: dict[str, Any], rewards: dict[int, float]) -> None:
        """Act on what a worker says."""
        function = self._kind.function
        if "failed" in message:
            if self.config.kind == "custom":
                raise ConfigError(
                    f"verifier.function is {function!r}, but it cannot be loaded: {message['failed']}; modules are "
                    "looked for in the working directory, on PYTHONPATH and among the installed packages"
                )
            raise RunError(f"a worker of the verifier cannot load {function}: {message['failed']}")
        if "fault" in message:
            raise RunError(
                f"the verifier's function {function!r} failed on a response: {message['fault']}. A fault is no "
                "verdict, so the run ends here: it has to return a finite number for whatever a model writes, 0 for "
                "what it cannot judge"
            )
        if "reward" in message:
            assert worker.task is not None
            rewards[worker.task] = message["reward"]
            if "reason" in message:
                self.reasons[worker.task] = message["reason"]
        worker.rest()


class _Worker:
    """A process, and what is under way to and from it.

    task: index of the pair that it judges, None while it starts or is idle · deadline: when it is late, by the
    monotonic clock · unsent: what it has not been handed yet of that pair.
    """

    def __init__(self, function: str, timeout_seconds: float) -> None:
        self.task: int | None = None
        self.is_ready = False
        self.deadline = time.monotonic() + _START_SECONDS
        self.unsent, self._received = b"", b""
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        # Modules are found wherever the trainer finds its own.
        options = {"name": function, "timeout_seconds": timeout_seconds, "path": [*map(str, sys.path)]}
        command = [sys.executable, "-m", "repirl.verify.worker", str(theirs.fileno()), json.dumps(options)]
        try:
            # In a session of its own: an interrupt from the keyboard is the trainer's to handle. Whatever a parser
            # prints goes to stderr.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()], start_new_session=True
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.task is None

    def ask(self, task: int, pair: tuple[str, str], timeout_seconds: float) -> None:
        """Give it a pair to judge, which `exchange` hands over."""
        self.task, self.deadline = task, time.monotonic() + timeout_seconds
        self.unsent = (json.dumps(pair) + "\n").encode("ascii")

    def rest(self) -> None:
        """It has started, or is done with its pair."""
        self.is_ready, self.task, self.deadline = True, None, math.inf

    def exchange(self, events: int) -> dict[str, Any] | None:
        """Write and read without waiting.

        Args:
            events: of the selector.

        Returns:
            A message, where one is complete.

        Raises:
            EOFError, OSError: the process is gone.
        """
        if events & selectors.EVENT_WRITE:
            with contextlib.suppress(BlockingIOError):
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        if not events & selectors.EVENT_READ:
            return None
        try:
            received = self.socket.recv(1 << 16)
        except BlockingIOError:
            return None
        if not received:
            raise EOFError
        self._received += received
        if not self._received.endswith(b"\n"):
            return None
        message, self._received = json.loads(self._received), b""
        return message

    def end(self) -> int:
        """Kill the process and whatever it started, and return how it ended."""
        self.socket.close()
        # Once it has been waited for, the number may be another's.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()
