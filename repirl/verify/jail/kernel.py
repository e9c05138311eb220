"""System calls that Python 3.11 has no functions for, by ctypes. Errors are OSError, as with those of `os`."""

from __future__ import annotations

import ctypes
import os
import signal

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_GET_SECCOMP, PR_SET_SECCOMP = 4, 21, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}

_CLONE_VM = 0x100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_idle_stack = ctypes.create_string_buffer(1 << 14)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call by its number; integers are passed as 64 bits."""
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *values), f"system call {number}")


def start_idle_process() -> int:
    """Start a process that sleeps until it is killed; returns its number.

    It runs nothing but the C library's `pause`, on a stack of its own, and shares the memory of the caller, so that it
    costs far less than a fork. The caller must handle no signals: a handler would run in the caller's memory.
    """
    top = ctypes.addressof(_idle_stack) + len(_idle_stack) & ~0xF
    pause = ctypes.cast(_libc.pause, ctypes.c_void_p)
    return _checked(_libc.clone(pause, ctypes.c_void_p(top), _CLONE_VM | signal.SIGCHLD, None), "clone")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, flags: int) -> None:
    _checked(_libc.setns(descriptor, flags), "setns")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _checked(result, f"mount {target}")


def unmount(target: str) -> None:
    """Take it out of the tree, even if it is in use."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def pivot_root(new: str, old: str) -> None:
    syscall(_PIVOT_ROOT[os.uname().machine], new.encode(), old.encode())


def prctl(option: int, value: int = 0, third: int = 0) -> None:
    _checked(
        _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)),
        f"prctl {option}",
    )


def drop_capabilities() -> None:
    """Give up all privileges of this process; what it runs gets none that it does not have itself."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    # Version 3, this process; two words each of effective, permitted, inheritable.
    header = ctypes.create_string_buffer((0x20080522).to_bytes(4, "little") + bytes(4), 8)
    syscall(_CAPSET[os.uname().machine], header, ctypes.create_string_buffer(24))
