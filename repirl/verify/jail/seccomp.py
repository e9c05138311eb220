"""A filter of system calls, as a seccomp program: what a program has no use for, and what reaches out of the sandbox,
fails with EPERM. Numbers are those of Linux on x86-64 and AArch64."""

from __future__ import annotations

import ctypes
import functools
import os
import struct

from . import kernel

# Name: number on x86-64, on AArch64 (None: not there).
_Numbers = dict[str, tuple[int | None, int | None]]
# Other processes, mounts, kernel, sockets. Files in memory are not seen by the watch on memory; System V's objects
# outlive processes. io_uring does what the filter does not see. inotify tells who else reads the standard library, and
# mounts tell where things are outside. `sync` writes out what the whole system has not written yet.
_DENIED: _Numbers = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "syslog": (103, 116),
    "vhangup": (153, 58), "modify_ldt": (154, None), "socket": (41, 198), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "connect": (42, 203), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "fanotify_mark": (301, 263), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semtimedop": (220, 192), "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "personality": (135, 92), "vmsplice": (278, 75), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "uselib": (134, None), "sysfs": (139, None), "lookup_dcookie": (212, 18),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "sync": (162, 81), "syncfs": (306, 267),
    "statmount": (457, 457), "listmount": (458, 458), "open_tree_attr": (467, 467),
}  # fmt: skip
# Where files and processes of the user's are in reach but for these: Landlock leaves modes, owners, times and
# attributes of files alone.
_DENIED_IF_SHARED: _Numbers = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "truncate": (76, 45), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setparam": (142, 118),
    "pidfd_open": (434, 434), "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
# By their first argument, a process: the caller's own alone.
_OWN_PROCESS: _Numbers = {"prlimit64": (302, 261)}
_SIGNALS: _Numbers = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKETPAIR = (56, 220), (435, 435), (53, 199)
_IOCTL, _FCNTL = (16, 29), (72, 25)
# F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to other processes, sent by the kernel. F_SETLEASE: whoever opens the file
# waits. F_NOTIFY: as inotify.
_DENIED_FCNTL = (8, 10, 15, 1024, 1026)
_NAMESPACES = 0x7E020000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_LOAD, _JEQ, _JGE, _JSET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOTTY, _ENOSYS = _ERRNO | 1, _ERRNO | 25, _ERRNO | 38
_FIRST, _SECOND = 16, 24
_UNIX, _DATAGRAM = 1, 2


def is_available() -> bool:
    """Whether this machine's system calls are known here, and the kernel filters them."""
    try:
        kernel.prctl(kernel.PR_GET_SECCOMP)
    except OSError:
        return False
    return os.uname().machine in _AUDIT_ARCH


def filter_program(is_shared: bool, only_own_signals: bool, own_pid: int) -> bytes:
    """The instructions of the filter.

    Args:
        is_shared: there are no namespaces of the program's own.
        only_own_signals: signals reach the program's first process alone; else its namespace or Landlock holds them.
        own_pid: of that process.
    """
    column = _column()
    lines = []
    own = (_OWN_PROCESS if is_shared else {}) | (_SIGNALS if only_own_signals else {})
    for name, numbers in own.items():
        zero = 0 if name in _OWN_PROCESS else own_pid
        lines += _if_call(
            numbers[column],
            [
                _line(_LOAD, _FIRST),
                _line(_JEQ, own_pid, 2, 0),
                _line(_JEQ, zero, 1, 0),
                _line(_RETURN, _EPERM),
                _line(_RETURN, _ALLOW),
            ],
        )
    return _for_all(is_shared) + b"".join([*lines, _line(_RETURN, _ALLOW)])


def _column() -> int:
    return 0 if os.uname().machine == "x86_64" else 1


@functools.cache
def _for_all(is_shared: bool) -> bytes:
    """The instructions that are the same for all programs. What they say nothing of passes."""
    machine, column = os.uname().machine, _column()
    lines = [
        _line(_LOAD, 4),
        _line(_JEQ, _AUDIT_ARCH[machine], 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, 0),
        _line(_JGE, _X32, 0, 1),
        _line(_RETURN, _ENOSYS),
    ]
    denied = _DENIED | (_DENIED_IF_SHARED if is_shared else {})
    for numbers in denied.values():
        lines += _if_call(numbers[column], [_line(_RETURN, _EPERM)])
    # Its flags are in memory, where a filter does not see them; the C library goes back to clone.
    lines += _if_call(_CLONE3[column], [_line(_RETURN, _ENOSYS)])
    lines += _if_call(
        _CLONE[column],
        [_line(_LOAD, _FIRST), _line(_JSET, _NAMESPACES, 0, 1), _line(_RETURN, _EPERM), _line(_RETURN, _ALLOW)],
    )
    # Connected pairs only: a socket for datagrams may send to any name.
    lines += _if_call(
        _SOCKETPAIR[column],
        [
            _line(_LOAD, _FIRST),
            _line(_JEQ, _UNIX, 0, 3),
            _line(_LOAD, _SECOND),
            _line(_AND, 0xF),
            _line(_JEQ, _DATAGRAM, 0, 1),
            _line(_RETURN, _EPERM),
            _line(_RETURN, _ALLOW),
        ],
    )
    # Terminals, and what all descriptors have: how much can be read, whether to wait, whether to close.
    lines += _if_call(
        _IOCTL[column],
        [
            _line(_LOAD, _SECOND),
            _line(_AND, 0xFFFFFF00),
            _line(_JEQ, 0x5400, 1, 0),
            _line(_RETURN, _ENOTTY),
            _line(_RETURN, _ALLOW),
        ],
    )
    commands = [part for command in _DENIED_FCNTL for part in (_line(_JEQ, command, 0, 1), _line(_RETURN, _EPERM))]
    lines += _if_call(_FCNTL[column], [_line(_LOAD, _SECOND), *commands, _line(_RETURN, _ALLOW)])
    return b"".join(lines)


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _if_call(number: int | None, then: list[bytes]) -> list[bytes]:
    """Instructions that are passed over for other system calls; the number is still loaded there."""
    return [] if number is None else [_line(_JEQ, number, 0, len(then)), *then]


def install(instructions: bytes) -> None:
    """Put the filter on this thread, and on all that it will start. It cannot be taken off."""
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(instructions) // 8, ctypes.addressof(buffer)), 16)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.addressof(header))
