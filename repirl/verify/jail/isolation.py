"""What keeps a program to itself, by kind, as the zygote uses it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from . import cgroup, kernel, landlock, seccomp, view
from . import limits as limiting

# Threads that a user may start elsewhere while a program runs.
_SLACK = 256


class Isolation:
    """No sandbox: limits, and a filter of system calls where there is one.

    proc: descriptor of a /proc that shows the zygote · own_pid: its number there · kept: a descriptor that the
    program's process needs until `confine` closes it; -1 for none.

    Of one program: `fork`; in its process `enter` and `confine`; then `kill`, and `wipe`.
    """

    kind = "none"
    is_shared = True
    missing = "programs run without a sandbox: they can read and change what this user can"

    def __init__(self, options: dict[str, Any]) -> None:
        """Confine the zygote itself.

        Args:
            options: of the launcher: `proc`, `oom` (of cgroup.Group; -1 where the zygote is in none), `folder`, `user`
                (to become, or None).
        """
        self.options, self.proc = options, options["proc"]
        self.oom_kills, self.kept = 0, -1
        self.only_own_signals = self.is_shared and not (self.kind == "landlock" and landlock.version() >= 6)
        if seccomp.is_available():
            # Made once, for the forks to have.
            seccomp.filter_program(self.is_shared, self.only_own_signals, 0)
        self.confine_zygote()
        self.own_pid = int(os.readlink("self", dir_fd=self.proc))
        self.own_bytes = limiting.address_space(self.proc)
        self.own_memory = limiting.resident(self.proc)
        self.threads = limiting.threads_of_user(self.proc) + _SLACK if self.is_shared else self.num_own_threads()

    def confine_zygote(self) -> None:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)

    def num_own_threads(self) -> int:
        # The zygote and the first process of the program's namespace.
        return 2

    def report(self) -> dict[str, Any]:
        missing = self.missing
        if not seccomp.is_available():
            missing = "; ".join(filter(None, [missing, "no filter of system calls"]))
        return {"kind": self.kind, "cgroup": self.options["oom"] >= 0, "missing": missing}

    def fork(self) -> int:
        """Fork the process of a program."""
        self.oom_kills = self._killed_for_memory()
        return os.fork()

    def _killed_for_memory(self) -> int:
        return cgroup.killed_for_memory(self.options["oom"]) if self.options["oom"] >= 0 else 0

    def kill(self, pid: int | None) -> None:
        """End a program: once this returns, none of its processes is left.

        Args:
            pid: of the program's process; None where it has ended and has been waited for.
        """
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        end_descendants(self.proc, self.own_pid)

    def wipe(self) -> None:
        """Remove what the program left in files."""
        wipe_folder(self.options["folder"])

    def ran_out_of_memory(self) -> bool:
        return self._killed_for_memory() > self.oom_kills

    def enter(self, limits: dict[str, Any]) -> None:
        """In the process of the program, while it is trusted."""
        os.setsid()
        # Where memory runs out, the kernel ends this and not the zygote. The file is the process's own only while
        # others of its user may look into it.
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        limiting.write(self.proc, "self/oom_score_adj", "1000")
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        self.enter_folder(limits)

    def enter_folder(self, limits: dict[str, Any]) -> None:
        os.chdir(self.options["folder"])
        os.environ["HOME"] = os.environ["TMPDIR"] = self.options["folder"]

    def confine(self, limits: dict[str, Any]) -> None:
        """In the process of the program itself, right before it."""
        limiting.limit_process(limits, self.own_bytes, self.threads)
        if self.options["user"] is not None and self.is_shared:
            os.setresgid(*[self.options["user"]] * 3)
            os.setresuid(*[self.options["user"]] * 3)
        self.restrict_files()
        kernel.drop_capabilities()
        if seccomp.is_available():
            seccomp.install(seccomp.filter_program(self.is_shared, self.only_own_signals, os.getpid()))

    def restrict_files(self) -> None:
        pass


class Landlocked(Isolation):
    """Landlock and seccomp, without namespaces."""

    kind = "landlock"
    missing = (
        "no namespaces: programs can see which files and processes there are, and the space of all their files "
        "together is not limited"
    )

    def __init__(self, options: dict[str, Any]) -> None:
        if not seccomp.is_available():
            raise OSError("system calls cannot be filtered here")
        self.rules = landlock.Rules(options["folder"])
        super().__init__(options)
        self.kept = self.rules.descriptor

    def restrict_files(self) -> None:
        self.rules.restrict(self.kept)


class Namespaced(Isolation):
    """Namespaces of its own for each program: processes, mounts, network, System V objects. The view of the file
    system is made already."""

    kind = "namespaces"
    is_shared = False
    missing = ""

    def confine_zygote(self) -> None:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        self.own_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=self.proc)

    def fork(self) -> int:
        self.oom_kills = self._killed_for_memory()
        # What starts from here on is in a new namespace; what is started later is not to be.
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = -1
        try:
            # The first process there does nothing, and gets the children of others when those end. The kernel waits
            # for children whose parent ignores their ends.
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            try:
                self.first = kernel.start_idle_process()
            finally:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                pid = os.fork()
            except OSError:
                self.kill(None)
                raise
            return pid
        finally:
            if pid:
                kernel.setns(self.own_namespace, kernel.CLONE_NEWPID)

    def kill(self, pid: int | None) -> None:
        # The kernel ends the namespace with its first process, once all others there have been waited for.
        os.kill(self.first, signal.SIGKILL)
        for number in (pid, self.first):
            if number is not None:
                os.waitpid(number, 0)

    def wipe(self) -> None:
        """The folder is gone with the mount namespace."""

    def enter_folder(self, limits: dict[str, Any]) -> None:
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC)
        view.own_folder(limits["file_mb"])


class Bubblewrapped(Namespaced):
    """As `Namespaced`, where bubblewrap made the view."""

    kind = "bubblewrap"


KINDS: dict[str, type[Isolation]] = {kind.kind: kind for kind in (Isolation, Landlocked, Namespaced, Bubblewrapped)}


def end_descendants(proc: int, root: int) -> None:
    """End all processes below one's own, while they may start others."""
    seen: set[int] = set()
    while True:
        processes = limiting.descendants(proc, root)
        if not processes:
            return
        # Those that are stopped start no others.
        is_new = False
        for pid in processes:
            is_new = is_new or pid not in seen
            _signal(pid, signal.SIGSTOP if pid not in seen else signal.SIGKILL)
        if not is_new:
            time.sleep(0.001)
        seen |= set(processes)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def wipe_folder(folder: str) -> None:
    """Remove all that is in a folder, however deep: each folder's content is moved up before it is removed."""
    number = 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for name in os.listdir(entry.path):
                while os.path.lexists(target := f"{folder}/moved-{number}"):
                    number += 1
                inner = f"{entry.path}/{name}"
                if os.path.isdir(inner) and not os.path.islink(inner):
                    os.chmod(inner, 0o700)
                os.rename(inner, target)
            os.rmdir(entry.path)
