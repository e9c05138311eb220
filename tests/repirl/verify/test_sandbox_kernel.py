"""Programs that reach for what the kernel offers besides: leases, queues, requests to devices, other processes' limits.

Each does little if it succeeds, as in test_sandbox_attacks.py.
"""

import dataclasses
import os
import signal
from pathlib import Path

from sandboxes import LIMITS, processes

# `call` names the error of a system call, or says that it was allowed.
SYSTEM_CALLS = """
import ctypes, errno, os, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(x86, arm, *arguments):
    number = x86 if os.uname().machine == "x86_64" else arm
    values = [ctypes.c_long(value) if isinstance(value, int) else value for value in (number, *arguments)]
    result = libc.syscall(*values)
    return "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""


def lines(sandbox, source, **limits):
    return sandbox.run_program(source, limits=dataclasses.replace(LIMITS, **limits)).stdout.splitlines()


def test_leases_and_notices_on_files_that_others_read(sandbox):
    """Who opens a file with a lease on it waits; notices tell what others read."""
    source = """
import fcntl, os
file, folder = os.open(os.__file__, os.O_RDONLY), os.open(os.path.dirname(os.__file__), os.O_RDONLY)
for descriptor, command, value in (
    (file, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    (file, fcntl.F_SETLEASE, fcntl.F_WRLCK),
    (folder, fcntl.F_NOTIFY, fcntl.DN_ACCESS | fcntl.DN_MULTISHOT),
):
    try:
        fcntl.fcntl(descriptor, command, value)
        print("allowed")
    except PermissionError:
        pass
print(fcntl.fcntl(file, fcntl.F_GETFD), fcntl.fcntl(file, fcntl.F_GETFL) & 3)
"""
    assert lines(sandbox, source) == ["1 0"]
    assert lines(sandbox, SYSTEM_CALLS + "print(call(294, 26, 0), call(300, 262, 0, 0))") == ["EPERM EPERM"]


def test_signals_that_the_kernel_sends_for_a_descriptor(sandbox):
    """To the trainer and to the warm interpreter, whenever a pipe can be read."""
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    source = f"""
import fcntl, os, signal, socket
for pid in ({os.getpid()}, {os.getppid()}, os.getppid(), 1):
    one, other = os.pipe()
    left, right = socket.socketpair()
    for descriptor in (one, left.fileno()):
        for command, value in ((10, signal.SIGUSR1), (8, pid), (8, -pid), (fcntl.F_SETFL, os.O_ASYNC)):
            try:
                fcntl.fcntl(descriptor, command, value)
                if command != fcntl.F_SETFL:
                    print("allowed", command)
            except OSError:
                pass
    os.write(other, b"x")
    right.send(b"x")
"""
    try:
        assert lines(sandbox, source) == []
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert not received


def test_requests_to_devices_and_files(sandbox):
    """Flags of files, the pool of random numbers, owners of sockets, input for terminals."""
    source = """
import array, errno, fcntl, os, socket
left, right = socket.socketpair()
pid = array.array("i", [os.getpid()])
with open(os.__file__) as file, open("/dev/urandom") as random, open("/dev/null") as null, open("own", "w") as own:
    for where, number, value in (
        (file, 0x40086602, array.array("l", [0x40])), (own, 0x40086602, array.array("l", [0x40])),
        (own, 0x401C5820, array.array("b", [0] * 28)), (file, 0x40806685, array.array("b", [0] * 128)),
        (random, 0x5207, b"\\0" * 8), (random, 0x40045201, array.array("i", [64])), (left, 0x8901, pid),
        (left, 0x8902, pid), (left, 0x8927, array.array("b", [0] * 40)), (null, 0xC0001234, 0),
    ):
        try:
            fcntl.ioctl(where, number, value)
            print("allowed", hex(number))
        except OSError as error:
            assert error.errno == errno.ENOTTY, (hex(number), error)
right.send(b"abc")
count = array.array("i", [0])
fcntl.ioctl(left, 0x541B, count)
print(count[0], os.isatty(0))
left.setblocking(False)
os.set_inheritable(left.fileno(), True)
"""
    assert lines(sandbox, source) == ["3 False"]


def test_descriptors_of_other_processes(sandbox):
    source = """
for pid in {1, 2, os.getppid()} - {0, os.getpid()}:
    pidfd = libc.syscall(434, pid, 0)
    if pidfd >= 0:
        print({call(438, 438, pidfd, number, 0) for number in range(16)}, call(424, 424, pidfd, 9, 0, 0))
        print(call(440, 440, pidfd, 0, 0, 21, 0), call(448, 448, pidfd, 0))
print(call(312, 272, os.getpid(), 1, 0, 0, 0))
"""
    *others, last = lines(sandbox, SYSTEM_CALLS + source)
    assert set(others) <= {"{'EPERM'} EPERM", "EPERM EPERM"}
    assert last == "EPERM"


def test_queues_and_keys_that_outlive_processes(sandbox):
    source = SYSTEM_CALLS + (
        "print(call(240, 180, b'left', 0o102, 0o600, 0), call(64, 190, 77, 1, 0o1666), call(30, 196, 0, 0, 0),\n"
        "      call(248, 217, b'user', b'left', b'x', 1, -3), call(249, 218, b'user', b'left', 0, -3))"
    )
    assert lines(sandbox, source) == ["EPERM EPERM EPERM EPERM EPERM"]


def test_limits_of_other_processes(sandbox):
    """The interpreter that serves the next program keeps its own, which `sandbox` shows."""

    def state():
        return {pid: Path(f"/proc/{pid}/limits").read_text() for pid in processes(sandbox)}

    before = state()
    source = f"""
import os, resource
for pid in ({os.getpid()}, os.getppid(), *range(1, 40)):
    if pid in (0, os.getpid()):
        continue
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_NPROC):
        try:
            resource.prlimit(pid, kind, (1, 1))
        except (OSError, ValueError):
            pass
print("done")
"""
    assert lines(sandbox, source) == ["done"]
    assert state() == before


def test_priorities_of_other_processes(sandbox):
    def state():
        return {pid: (os.getpriority(os.PRIO_PROCESS, pid), os.sched_getaffinity(pid)) for pid in pids}

    pids = {os.getpid(), *processes(sandbox)}
    before = state()
    source = SYSTEM_CALLS + (
        f"for pid in {sorted(pids)} + [os.getppid()]:\n"
        "    call(141, 140, 0, pid, 19), call(141, 140, 2, os.getuid(), 19), call(141, 140, 1, pid, 19)\n"
        "    call(251, 30, 1, pid, 3 << 13), call(251, 30, 3, os.getuid(), 3 << 13)\n"
        "    if pid:\n        call(203, 122, pid, 8, struct.pack('<Q', 1)), call(144, 119, pid, 5, bytes(4))\n"
    )
    sandbox.run_program(source)
    assert state() == before


def test_writing_out_what_the_whole_system_has_in_memory(sandbox):
    assert lines(sandbox, SYSTEM_CALLS + "print(call(162, 81), call(306, 267, 0))") == ["EPERM EPERM"]


def test_where_things_are_mounted(sandbox):
    """Paths of the machine outside."""
    source = SYSTEM_CALLS + "print(call(457, 457, 0, 0, 0, 0), call(458, 458, 0, 0, 0, 0))"
    assert lines(sandbox, source) == ["EPERM EPERM"]


def test_program_by_its_descriptor(sandbox):
    """What is executed without a name is held as well."""
    source = """
import os, shutil, sys
shutil.copyfile(sys.executable, "python")
os.chmod("python", 0o700)
file = os.open("python", os.O_RDONLY)
os.unlink("python")
code = "import socket\\ntry:\\n    socket.socket()\\n    print('made')\\nexcept OSError:\\n    print('held')"
os.execve(file, ["python", "-S", "-c", code], os.environ)
"""
    # Where the interpreter is too large, or files with modes cannot be made, it is not there at all.
    assert lines(sandbox, source) in (["held"], [])


def test_name_that_looks_like_the_state_of_a_process(sandbox):
    """The watch reads it in one line with what the process uses."""
    source = """
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b") R 0 0 0 0 (", 0, 0, 0)
for _ in range(4):
    if os.fork() == 0:
        data = bytearray(b"x") * (60 << 20)
        time.sleep(600)
time.sleep(600)
"""
    assert sandbox.run_program(source).status == "memory"


def test_input_that_is_written_to(sandbox):
    """Standard input is a file in memory, which is not counted for the program."""
    source = "import os\nwritten = 0\nwhile True:\n    written += os.write(0, bytes(1 << 18))"
    execution = sandbox.run_program(source, "abc")
    assert execution.status in ("error", "killed")
    assert sandbox.run_program("print(input())", "abc").stdout == "abc\n"


def test_pipes_full_of_data(sandbox):
    """Memory of the kernel's."""
    source = """
import fcntl, os
held = 0
try:
    while True:
        _, write = os.pipe()
        try:
            fcntl.fcntl(write, 1031, 1 << 20)
        except OSError:
            pass
        os.set_blocking(write, False)
        try:
            while True:
                held += os.write(write, bytes(1 << 16))
        except BlockingIOError:
            pass
except OSError:
    print(held)
"""
    execution = sandbox.run_program(source)
    assert execution.status == "memory" or int(execution.stdout) <= LIMITS.open_files << 19


def test_sockets_that_hold_each_other(sandbox):
    """Descriptors under way in a circle outlive their processes, until the kernel looks for such circles."""
    source = """
import socket
for _ in range(200):
    one, other = socket.socketpair()
    socket.send_fds(one, [b"x"], [one.fileno(), other.fileno()])
    socket.send_fds(other, [b"x"], [one.fileno(), other.fileno()])
    one.close()
    other.close()
print("done")
"""
    assert sandbox.run_program(source).status in ("ok", "error")


def test_limits_that_are_lowered_to_nothing(sandbox):
    source = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True:\n    pass"
    assert sandbox.run_program(source).status in ("timeout", "killed")
    source = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))\nprint(1)"
    assert sandbox.run_program(source).stdout == "1\n"


def test_orphans_of_orphans(sandbox):
    """Short-lived ones, more than there may be at a time: whoever gets them waits for them."""
    source = """
import os
for _ in range(3 * 8):
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
    os.waitpid(pid, 0)
print("done")
"""
    execution = sandbox.run_program(source)
    # Without a namespace of its own they count until the program's end.
    assert execution.stdout == "done\n" or sandbox.kind == "landlock"


def test_core_of_a_crash(sandbox):
    source = "import os, resource\ntry:\n    resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))\n"
    source += "except ValueError:\n    pass\nos.abort()"
    assert sandbox.run_program(source).status == "killed"
    assert lines(sandbox, "import os\nprint(os.listdir())") == ["[]"]


def test_files_of_odd_names(sandbox):
    """What removes them reads their names."""
    source = """
import os
for name in (b"\\xff", b"a\\nb", b" ", b"-rf", b"x" * 255, b"moved-0", b"moved-1"):
    open(name, "w").close()
os.makedirs(b"\\xfe/moved-0/moved-1/\\xfd")
os.mkfifo(b"\\xfe/moved-0/fifo")
print(len(os.listdir()))
"""
    assert lines(sandbox, source) == ["8"]
