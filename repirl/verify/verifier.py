"""The verifier with a bound on its time: an answer that it cannot judge in time is a wrong one, and is counted."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

from repirl.verify.math import plain_reward

# The start of a process with its imports; on a slow shared disk that can take a while.
_START_SECONDS = 300.0
# Of address space beyond what the imports take, so that an answer cannot take the memory that the training needs.
_MAX_BYTES = 4 << 30


class Verifier:
    """Judges responses. What plain comparison decides is judged here; everything else goes to a process of its own, as
    a parser may take any time for what a model writes: it is killed and replaced where one answer takes longer than
    `timeout_seconds`.

    reward: what runs there, as "module:function" of (response, answer). num_timeouts: answers that were given up so
    far, because they took too long or because the process died of them (out of memory, a crash in a parser); each
    counts as wrong.
    """

    def __init__(self, timeout_seconds: float, reward: str = "repirl.verify.math:math_reward") -> None:
        self.timeout_seconds, self.reward = timeout_seconds, reward
        self.num_timeouts = 0
        self._process: subprocess.Popen[str] | None = None

    def judge(self, response: str, answer: str) -> float:
        """1.0 where the response's final answer equals `answer`, else 0.0. RuntimeError where the process does not
        start at all."""
        decided = plain_reward(response, answer)
        if decided is not None:
            return decided
        if self._process is None:
            self._start()
        line = self._ask(json.dumps([response, answer]) + "\n", self.timeout_seconds)
        if line is not None:
            return float(line)
        self.num_timeouts += 1
        return 0.0

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe
            # What a process that died did not read is still to be written.
            with contextlib.suppress(OSError):
                pipe.close()

    def _start(self) -> None:
        command = [sys.executable, "-m", "repirl.verify.verifier", self.reward, str(self.timeout_seconds)]
        # In a session of its own: an interrupt from the keyboard is the trainer's to handle.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        # The imports are not the first answer's fault.
        if self._ask("", _START_SECONDS) is None:
            raise RuntimeError(f"the verifier's process ({' '.join(command)}) does not start; its errors are above")

    def _ask(self, question: str, seconds: float) -> str | None:
        """The line that the process answers with; None where it does not in time, or dies. It is gone then."""
        process = self._process
        assert process
        assert process.stdin
        assert process.stdout
        too_late = threading.Event()

        def give_up() -> None:
            too_late.set()
            process.kill()

        # Writing blocks as well as reading: a process that hangs does not empty its pipe. Its death ends both.
        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        line = ""
        with contextlib.suppress(OSError):
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        timer.cancel()
        timer.join()
        complete = line.endswith("\n")
        if too_late.is_set() or not complete:
            self.close()
        return line if complete else None


def _serve(reward: str, timeout_seconds: float) -> None:
    """Judge what comes in, a line each, until nothing more does."""
    # Whatever a parser prints must not be taken for a verdict.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = reward.partition(":")
    function = getattr(importlib.import_module(module), name)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + _MAX_BYTES)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        # Nobody ends this process in time when the trainer has been killed meanwhile: then the system does. It needs no
        # help from the interpreter, which cannot be interrupted within one operation on large numbers.
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + timeout_seconds) + 1)
        print(float(function(*json.loads(line))), file=answers, flush=True)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
