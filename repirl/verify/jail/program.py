"""What runs in a program's own process: it reads the job, limits itself no further, and says what came of it on the
result pipe. Everything that it says may as well have been said by the program: the trainer takes it for data.

Job: plain data of `kind` ("program", "calls", "serve", "test"), `source`, and what the kind needs. Messages are a tag,
the length (8 bytes) and as many bytes: C source does not compile · X exception (name and text, plain) · V value
(plain) · N no plain data (text) · M out of memory · P the test has passed (nonce).
"""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import contextlib
import gc
import io
import linecache
import os
import random
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from . import plain

RESULT, PEER = 3, 4
NAME = "solution.py"
# Of a program whose functions are called: what stands under `if __name__ == "__main__"` is not run.
IMPORTED = "solution"
MAX_MESSAGE = 1 << 26
_STREAMS = (("stdin", "r", "replace"), ("stdout", "w", "backslashreplace"), ("stderr", "w", "backslashreplace"))
# What a candidate raises in a test's process. Others, StopIteration above all, would end the test's own loops early.
_RAISED = (
    "Exception",
    "ArithmeticError",
    "AttributeError",
    "IndexError",
    "KeyError",
    "LookupError",
    "NotImplementedError",
    "OverflowError",
    "RecursionError",
    "RuntimeError",
    "TypeError",
    "ValueError",
    "ZeroDivisionError",
)


class CandidateError(RuntimeError):
    """The candidate's process raised what cannot be raised here, or is gone."""


def run(job_descriptor: int) -> int:
    """Run the job and return the exit code."""
    with open(job_descriptor, "rb") as file:
        job = plain.decode(file.read())
    for descriptor, (name, mode, errors) in enumerate(_STREAMS):
        stream = open(descriptor, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        sys.__dict__.update({name: stream, f"__{name}__": stream})
    sys.argv = sys.orig_argv = [NAME]
    # Of `site`, which is not loaded.
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    # A fork is given new random numbers otherwise, and a verdict may depend on them.
    random.seed(0)
    try:
        code = _JOBS[job["kind"]](job)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except MemoryError:
        say(b"M")
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    _flush_others()
    return code


def _flush_others() -> None:
    """Write out what files hold that the program has left open, as the interpreter does at its end."""
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    with contextlib.suppress(Exception):
        for kind in kinds:
            for file in [value for value in gc.get_objects() if type(value) is kind]:
                with contextlib.suppress(Exception):
                    file.flush()


def say(tag: bytes, data: bytes = b"", descriptor: int = RESULT) -> None:
    """Write one message."""
    message = memoryview(tag + struct.pack("<Q", len(data)) + data)
    while message:
        message = message[os.write(descriptor, message) :]


def _main(source: str, module_name: str = "__main__") -> types.ModuleType | None:
    """The module of a source, run as a program is, or imported under a name; None where it does not compile, which is
    said."""
    try:
        compiled = compile(source, NAME, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, OverflowError) as error:
        say(b"C", _text(error).encode("utf-8", "backslashreplace"))
        return None
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    module = types.ModuleType(module_name)
    module.__dict__.update(__builtins__=builtins, __file__=NAME)
    sys.modules["__main__"] = sys.modules[module_name] = module
    exec(compiled, module.__dict__)
    return module


def _text(error: BaseException) -> str:
    """What went wrong, cut off: a line of the source may be in it."""
    return "".join(traceback.format_exception_only(error)).strip()[-2000:]


def _guarded(function: Callable[[], Any]) -> int:
    """Run it as the interpreter does a program: the exit code, and tracebacks on stderr."""
    try:
        function()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        # Without the frames of this file.
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        is_memory = isinstance(error, MemoryError)
        if is_memory:
            say(b"M")
        else:
            traceback.print_exception(type(error), error, trace)
        return 1
    return 0


def _program(job: dict[str, Any]) -> int:
    return _guarded(lambda: _main(job["source"]))


def _lookup(module: types.ModuleType, path: str) -> Callable[..., Any]:
    """A function of the program: "f", or "Solution.f" for a method of a new object. The class `Solution` need not be
    named."""
    *owners, name = path.split(".")
    place: Any = module
    if not owners and not hasattr(module, name) and hasattr(module, "Solution"):
        owners = ["Solution"]
    for owner in owners:
        place = getattr(place, owner)
        if isinstance(place, type):
            place = place()
    function = getattr(place, name)
    if not callable(function):
        raise TypeError(f"{path} is of type {type(function).__name__}, and cannot be called")
    return function


def _say_call(function: Callable[..., Any], arguments: Any, keywords: dict[str, Any], descriptor: int) -> None:
    """Call it, and say what it returned or raised."""
    try:
        value = function(*arguments, **keywords)
        data = plain.encode(value)
    except plain.PlainError as error:
        say(b"N", str(error).encode("utf-8", "backslashreplace"), descriptor)
    except MemoryError:
        say(b"M", b"", descriptor)
    except BaseException as error:
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        names = [name for name in names if name in _RAISED]
        say(b"X", plain.encode([names[0] if names else "", _text(error)]), descriptor)
    else:
        say(b"V", data, descriptor)


def _calls(job: dict[str, Any]) -> int:
    modules: list[types.ModuleType] = []

    def load() -> None:
        module = _main(job["source"], IMPORTED)
        if module is not None:
            modules.append(module)

    code = _guarded(load)
    if modules:
        for arguments in job["calls"]:
            # Each call has an object of its own, as on the sites that ask for a class.
            _say_call(lambda *args: _lookup(modules[0], job["name"])(*args), arguments, {}, RESULT)
    return code


def _serve(job: dict[str, Any]) -> int:
    """A candidate that a test's process calls."""
    modules: list[types.ModuleType] = []

    def load() -> None:
        module = _main(job["source"], IMPORTED)
        if module is not None:
            modules.append(module)

    code = _guarded(load)
    if not modules:
        return code or 1
    functions: dict[str, Callable[..., Any]] = {}
    with open(PEER, "rb", closefd=False) as questions:
        while message := read_message(questions):
            name, arguments, keywords = plain.decode(message[1])

            def call(*args: Any, _name: str = name, **kwargs: Any) -> Any:
                if _name not in functions:
                    functions[_name] = _lookup(modules[0], _name)
                return functions[_name](*args, **kwargs)

            _say_call(call, arguments, keywords, PEER)
    return code


def _test(job: dict[str, Any]) -> int:
    """Tests that the user trusts, on a candidate in another process that nobody does."""
    answers = open(PEER, "rb", closefd=False)  # noqa: SIM115
    lock = threading.Lock()

    def proxy(name: str) -> Callable[..., Any]:
        def candidate(*args: Any, **kwargs: Any) -> Any:
            with lock, contextlib.suppress(BrokenPipeError):
                say(b"Q", plain.encode([name, list(args), kwargs]), PEER)
                return _answer(read_message(answers))
            raise CandidateError("the candidate's process has ended")

        candidate.__name__ = candidate.__qualname__ = name.rpartition(".")[2]
        return candidate

    def check() -> None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        proxies = {name.rpartition(".")[2]: proxy(name) for name in job["names"]}
        module.__dict__.update(proxies, candidate=next(iter(proxies.values())))
        exec(compile(job["source"], "test.py", "exec", dont_inherit=True), module.__dict__)
        if callable(checker := module.__dict__.get("check")):
            checker(next(iter(proxies.values())))

    try:
        check()
    except AssertionError as error:
        say(b"A", str(error)[:2000].encode("utf-8", "backslashreplace"))
        return 1
    except MemoryError:
        raise
    except BaseException as error:
        say(b"X", plain.encode(["", _text(error)]))
        return 1
    say(b"P", job["nonce"])
    return 0


def _answer(message: tuple[bytes, bytes] | None) -> Any:
    if message is None:
        raise CandidateError("the candidate's process has ended")
    tag, data = message
    if tag not in (b"V", b"X"):
        raise CandidateError(data.decode("utf-8", "replace") or "out of memory")
    try:
        value = plain.decode(data)
    except plain.PlainError as error:
        raise CandidateError(f"no plain data: {error}") from None
    if tag == b"V":
        return value
    if isinstance(value, list) and len(value) == 2 and value[0] in _RAISED:
        raise getattr(builtins, value[0])(str(value[1]))
    raise CandidateError(f"the candidate raised {value!r:.2000}")


def read_message(file: io.BufferedReader | io.BytesIO) -> tuple[bytes, bytes] | None:
    """The next message, None at the end of the data or where what follows is none."""
    head = file.read(9)
    if len(head) < 9:
        return None
    (length,) = struct.unpack("<Q", head[1:])
    if length > MAX_MESSAGE:
        return None
    data = file.read(length)
    return (head[:1], data) if len(data) == length else None


_JOBS = {"program": _program, "calls": _calls, "serve": _serve, "test": _test}
