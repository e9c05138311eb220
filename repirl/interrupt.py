"""Signals that ask a run to end: it finishes its turn, saves, and exits with the code that schedulers expect."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repirl.distributed.world import World

# Exit codes: 128 and the signal's number, as shells have it. SIGUSR1 is the warning that a scheduler sends before
# SIGTERM (Slurm: --signal=USR1@120), and is answered like SIGTERM.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
# A scheduler may signal torchrun and all of its processes, and torchrun passes the signal on: this is one request.
_SECONDS_OF_ONE_REQUEST = 5.0
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A signal has ended what the program did.

    Args:
        number: the signal.
        message: what was saved, and how to go on.
        is_complete: whether the turn was finished, on all processes together.
    """

    def __init__(self, number: int, message: str = "", *, is_complete: bool = False) -> None:
        super().__init__(message)
        self.number, self.message, self.is_complete = signal.Signals(number), message, is_complete

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return EXIT_CODES[self.number]

    def __str__(self) -> str:
        return f"{self.number.name}: {self.message or 'stopped; nothing was saved'}"


class Signals:
    """Handles SIGTERM, SIGINT and SIGUSR1 as long as the context lasts.

    The first one raises Interrupted; with `defer` it is noted instead, for `requested`, and the second one raises. One
    more ends the process at once. A signal that the process ignored before is still ignored, as SIGINT is in the
    background of a shell script. Outside the main thread, which alone can handle signals, nothing is changed.

    Args:
        defer: note the first signal, and go on.
    """

    def __init__(self, *, defer: bool) -> None:
        self._defer = defer
        self._number: int | None = None
        self._since = 0.0
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def requested(self, world: World) -> int | None:
        """The signal by which any of the processes was asked to end, the same on all of them; None without one."""
        numbers = [number for number in world.gather([self._number]) if number is not None]
        return numbers[0] if numbers else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._number is not None and under_torchrun() and now - self._since < _SECONDS_OF_ONE_REQUEST:
            return
        if self._raised:
            os._exit(EXIT_CODES[signal.Signals(number)])
        is_first, self._number = self._number is None, number
        if is_first:
            self._since = now
        if self._defer and is_first:
            self._say(f"{signal.Signals(number).name}: the run ends after this turn; once more, and it ends at once")
            return
        self._raised = True
        raise Interrupted(number)

    def _say(self, message: str) -> None:
        # Not through sys.stderr: this may come in the middle of what is being written there.
        if int(os.environ.get("RANK", 0)) == 0:
            os.write(2, f"\nrepirl: {message}\n".encode())


def end_at_next_signal() -> None:
    """From now on each of the signals ends the process at once, without a word."""
    if threading.current_thread() is threading.main_thread():
        for number in EXIT_CODES:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_torchrun() -> None:
    """Let the kernel kill this process when torchrun is gone: nobody would end it then where another process of the
    run hangs. Without torchrun nothing changes: a run outlives the shell that it was started from (nohup)."""
    if not under_torchrun() or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        # It was killed a moment ago.
        os.kill(os.getpid(), signal.SIGKILL)
