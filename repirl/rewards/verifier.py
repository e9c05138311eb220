"""The verifier with a bound on its time: an answer that it cannot judge in time is a wrong one, and is counted."""

from __future__ import annotations

import importlib
import json
import select
import subprocess
import sys
from contextlib import suppress

from repirl.rewards.math import plain_reward


class Verifier:
    """Judges responses. Plain numbers are compared here; everything else goes to a process of its own, as a parser
    may take any time for what a model writes: it is killed and replaced where one answer takes longer than
    `timeout_seconds`.

    reward: what runs there, as "module:function" of (response, answer). num_timeouts: answers that were given up so
    far; each counts as wrong.
    """

    def __init__(self, timeout_seconds: float, reward: str = "repirl.rewards.math:math_reward") -> None:
        self.timeout_seconds, self.reward = timeout_seconds, reward
        self.num_timeouts = 0
        self._process: subprocess.Popen[str] | None = None

    def judge(self, response: str, answer: str) -> float:
        """1.0 where the response's final answer equals `answer`, else 0.0."""
        decided = plain_reward(response, answer)
        if decided is not None:
            return decided
        process = self._start()
        try:
            assert process.stdin
            process.stdin.write(json.dumps([response, answer]) + "\n")
            process.stdin.flush()
            line = self._line(process, self.timeout_seconds)
        except OSError:
            line = ""
        if line:
            return float(line)
        # Too slow; or it died of this answer (out of memory, a crash in a parser).
        self.num_timeouts += 1
        self.close()
        return 0.0

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            with suppress(OSError):
                self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-m", "repirl.rewards.verifier", self.reward]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            # Its start, with its imports, is not the first answer's fault.
            if not self._line(self._process, None):
                raise RuntimeError(f"the verifier's process ({' '.join(command)}) does not start")
        return self._process

    def _line(self, process: subprocess.Popen[str], timeout_seconds: float | None) -> str:
        assert process.stdout
        ready, _, _ = select.select([process.stdout], [], [], timeout_seconds)
        return process.stdout.readline() if ready else ""


def _serve(reward: str) -> None:
    module, _, name = reward.partition(":")
    function = getattr(importlib.import_module(module), name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(function(*json.loads(line)), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
