"""The outermost process of a worker, outside the sandbox: starts it, waits for its end or the trainer's, and removes
what is left of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
from types import FrameType
from typing import Any

from . import cgroup, kernel, limits, view
from .isolation import KINDS, end_descendants
from .zygote import Zygote

_NOBODY = 65534
_BOOT = (
    "import sys; sys.path.append('/sandbox'); from jail.launcher import zygote; sys.path.pop(); "
    "zygote(*map(int, sys.argv[1:4]), sys.argv[4])"
)


def main(control: int, trainer: int, options: str) -> None:
    """Serve a trainer.

    Args:
        control: socket to it.
        trainer: its pidfd, -1 for none.
        options: JSON of `kind`, `memory_mb`, `processes`, `bwrap` (the program).
    """
    asked: dict[str, Any] = json.loads(options)
    signal.signal(signal.SIGTERM, _end)
    # Nobody waits for the processes that become the zygote step by step.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    is_shared = KINDS[asked["kind"]].is_shared
    # The first process of a namespace is there besides.
    group = cgroup.create(asked["memory_mb"], asked["processes"] + (0 if is_shared else 1))
    prefix = f"repirl-sandbox-{os.getpid()}-"
    folder = tempfile.mkdtemp(prefix=prefix, dir=_memory_folder()) if is_shared else view.FOLDER
    ours, theirs = socket.socketpair()
    try:
        given = {
            "kind": asked["kind"],
            "folder": folder,
            "proc": proc,
            "oom": group.oom if group else -1,
            "user": _unprivileged_user(is_shared),
        }
        if is_shared and given["user"] is not None:
            os.chown(folder, given["user"], given["user"])
        if not os.fork():
            ours.close()
            _start(control, trainer, theirs.detach(), given, asked, group)
        os.close(control)
        theirs.close()
        _attend(ours, trainer, given["user"])
    finally:
        end_descendants(proc, os.getpid())
        if is_shared:
            shutil.rmtree(folder, ignore_errors=True)
        if group is not None:
            group.remove()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _unprivileged_user(is_shared: bool) -> int | None:
    """Whom programs of a privileged trainer run as; None: as the trainer's own user."""
    if os.geteuid() != 0:
        return None
    # The user has to be able to read the standard library.
    for path in (os.__file__, os.path.dirname(os.__file__)):
        if not os.stat(path).st_mode & stat.S_IROTH:
            return None
    path = os.path.dirname(os.__file__)
    while is_shared and path != "/":
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return None
        path = os.path.dirname(path)
    return _NOBODY


def _start(
    control: int, trainer: int, link: int, given: dict[str, Any], asked: dict[str, Any], group: cgroup.Group | None
) -> None:
    """The process that becomes the zygote. Never returns."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        if group is not None:
            try:
                group.enter()
            except OSError:
                given["oom"] = -1
        if given["user"] is not None:
            with contextlib.suppress(OSError):
                os.setgroups([])
        if given["kind"] == "bubblewrap":
            for descriptor in (control, trainer, link, given["proc"], given["oom"]):
                if descriptor >= 0:
                    os.set_inheritable(descriptor, True)
            command = view.bubblewrap_arguments(asked["bwrap"], os.path.dirname(os.path.abspath(__file__)))
            command += [os.path.realpath(sys.executable), "-s", "-P", "-S", "-B", "-c", _BOOT]
            os.execv(command[0], [*command, str(control), str(trainer), str(link), json.dumps(given)])
        zygote(control, trainer, link, json.dumps(given))
        code = 0
    except BaseException as error:
        _fail(control, error)
    finally:
        os._exit(code)


def zygote(control: int, trainer: int, link: int, options: str) -> None:
    """Become the zygote, and serve.

    Args:
        control: socket to the trainer.
        trainer: its pidfd, -1 for none.
        link: socket to the launcher.
        options: JSON of what `Isolation` wants, and `kind`.
    """
    try:
        given = json.loads(options)
        kind = KINDS[given["kind"]]
        if not kind.is_shared:
            _separate(link, given)
        isolation = kind(given)
    except BaseException as error:
        _fail(control, error)
        os._exit(1)
    _warm()
    # Objects that the collector does not touch stay shared with the forks.
    gc.freeze()
    Zygote(control, [descriptor for descriptor in (trainer, link) if descriptor >= 0], isolation).serve()
    if kind.is_shared:
        # The launcher may have been killed.
        shutil.rmtree(given["folder"], ignore_errors=True)
    os._exit(0)


def _fail(control: int, error: BaseException) -> None:
    with contextlib.suppress(OSError):
        socket.socket(fileno=os.dup(control)).send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())


def _separate(link: int, given: dict[str, Any]) -> None:
    """Move this process to namespaces of its own: what returns is the first process there."""
    if given["kind"] == "namespaces":
        try:
            kernel.unshare(kernel.CLONE_NEWNS)
        except PermissionError:
            # A user without privileges has them in a user namespace.
            user, group = os.geteuid(), os.getegid()
            kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
            _map_self(given["proc"], user, group)
        view.build()
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWUSER)
    if given["user"] is None:
        _map_self(given["proc"], user, group)
    else:
        os.write(link, f"{os.getpid()}\n".encode())
        if os.read(link, 1) != b"y":
            raise OSError("users cannot be mapped")
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(flags)
    if os.fork():
        os._exit(0)


def _map_self(proc: int, user: int, group: int) -> None:
    """Be nobody in this new user namespace, whoever it is outside."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {user} 1"),
        ("gid_map", f"{_NOBODY} {group} 1"),
    ):
        limits.write(proc, f"self/{name}", text)


def _attend(link: socket.socket, trainer: int, user: int | None) -> None:
    """Map the user of the zygote's namespace when it asks for that, then wait for its end, or for the trainer's."""
    poll = select.poll()
    poll.register(link, select.POLLIN)
    if trainer >= 0:
        poll.register(trainer, select.POLLIN)
    while True:
        if any(descriptor == trainer for descriptor, _ in poll.poll()):
            return
        try:
            message = link.recv(64)
        except OSError:
            return
        if not message:
            return
        try:
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{int(message)}/{name}", "w") as file:
                    file.write(f"{_NOBODY} {user} 1")
            link.send(b"y")
        except OSError:
            link.send(b"n")


def _warm() -> None:
    """Import what programs often use, once for all of them."""
    names = "bisect cmath collections copy dataclasses datetime decimal enum fractions functools heapq itertools math"
    names += " operator random re statistics string typing"
    for name in names.split():
        __import__(name)
