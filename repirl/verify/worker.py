"""The process that judges answers, one at a time, for `process.Verifier`. It imports nothing but the function that it
calls.

Messages are lines of JSON on a socket. It first says {"ready": true}, or {"failed": reason} and ends; then it answers
each [response, answer] with {"reward": number}, and "reason": text where the number has such an attribute, or with
{"fault": reason} where the function itself is at fault.
"""

from __future__ import annotations

import importlib
import json
import math
import operator
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

# Of address space beyond what the imports take, so that an answer cannot take the memory that the training needs.
_MAX_BYTES = 4 << 30


def serve(connection: socket.socket, name: str, timeout_seconds: float) -> None:
    """Judge what comes in until nothing more does.

    Args:
        connection: to the trainer.
        name: the function that judges, as "module:name".
        timeout_seconds: the trainer waits for an answer that long, and kills this process then.
    """
    questions, verdicts = connection.makefile("r", encoding="ascii"), connection.makefile("w", encoding="ascii")

    def say(**message: Any) -> None:
        print(json.dumps(message), file=verdicts, flush=True)

    try:
        function = _look_up(name)
    except BaseException as error:
        say(failed=_reason(error))
        return
    _limit_memory()
    say(ready=True)
    for line in questions:
        _limit_time(timeout_seconds)
        message = _judge(function, *json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(**message)


def _look_up(name: str) -> Callable[[str, str], object]:
    module, _, attribute = name.partition(":")
    function = operator.attrgetter(attribute)(importlib.import_module(module))
    if not callable(function):
        raise TypeError(f"it is of type {type(function).__name__}, and cannot be called")
    return function


def _judge(function: Callable[[str, str], object], response: str, answer: str) -> dict[str, Any]:
    """The message that says what the function makes of a response."""
    try:
        value = function(response, answer)
        # Numbers of any library have it, and texts do not: float("1") would take them.
        if not hasattr(type(value), "__float__"):
            return {"fault": f"it returned {value!r:.200}, which is not a number"}
        reward = float(value)  # type: ignore[arg-type]
    except MemoryError:
        # Beyond its limit, as with the time: nothing of this process can be relied on any more.
        os._exit(1)
    except BaseException as error:
        return {"fault": _reason(error)}
    if not math.isfinite(reward):
        return {"fault": f"it returned {reward}, which is not finite"}
    reason = getattr(value, "reason", None)
    return {"reward": reward} | ({"reason": reason} if isinstance(reason, str) else {})


def _reason(error: BaseException) -> str:
    """What went wrong, and where in the user's code. The whole traceback goes to the trainer's stderr."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<frozen importlib")
    ]
    if frames:
        traceback.print_exception(error)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    # What a model wrote may be quoted in it, and may not be possible to print.
    return f"{what:.500}{where}".encode("utf-8", "backslashreplace").decode()


def _limit_memory() -> None:
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + _MAX_BYTES)


def _limit_time(timeout_seconds: float) -> None:
    """Nobody ends this process in time when the trainer has been killed meanwhile: then the system does. Neither way
    needs help from the interpreter, which cannot be interrupted within one operation on large numbers."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_seconds + 1)
    # The function may use the alarm itself, which takes it away from here. It may use all cores as well.
    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = timeout_seconds * (os.cpu_count() or 1)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + allowed) + 1)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _outlive_signals() -> None:
    """What asks the trainer to end (repirl.interrupt) may be sent to all of its processes. Its last turn needs this
    one, which ends with the trainer. Processes that the function starts are ended by signals as ever."""
    own = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, handle)


def main(descriptor: str, options: str) -> None:
    """Judge as the command line says.

    Args:
        descriptor: number of the socket, which is inherited.
        options: JSON of `name` and `timeout_seconds` (of serve), and `path`: folders of the trainer's modules.
    """
    _outlive_signals()
    connection = socket.socket(fileno=int(descriptor))
    # The function may start processes, which have no business here.
    connection.set_inheritable(False)
    chosen = json.loads(options)
    sys.path += [folder for folder in chosen["path"] if folder not in sys.path]
    serve(connection, chosen["name"], chosen["timeout_seconds"])


if __name__ == "__main__":
    main(*sys.argv[1:])
