"""Programs that try to get out of the sandbox, to hang the trainer, or to leave something behind.

Each does little if it succeeds: it counts, it writes to folders of the test, it connects to this machine alone.
"""

import dataclasses
import os
import signal
import socket
import threading
import time

import pytest
from sandboxes import LIMITS, kinds

from repirl.verify.sandbox import Limits, Sandbox

SHORT = dataclasses.replace(LIMITS, wall_seconds=0.5)
SECRET = "b7d1-never-to-be-seen"


@pytest.fixture(scope="module", params=kinds())
def shared(request):
    """Of each kind, one; its workers and what they start know no secret."""
    os.environ["REPIRL_TEST_SECRET"] = SECRET
    with Sandbox(LIMITS, kind=request.param) as sandbox:
        yield sandbox
    del os.environ["REPIRL_TEST_SECRET"]


def attack(sandbox: Sandbox, source: str, limits: Limits = LIMITS, stdin: str = ""):
    began = time.monotonic()
    execution = sandbox.run_program(source, stdin, limits)
    # It was ended in time; the rest is for a busy machine.
    assert time.monotonic() - began < limits.wall_seconds + 30
    assert SECRET not in execution.stdout + execution.stderr
    return execution


# Processes


def test_fork_bomb(sandbox):
    source = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(600)
        made += 1
    except OSError:
        break
print(made)
"""
    execution = attack(sandbox, source)
    assert execution.status == "processes" or int(execution.stdout) < LIMITS.processes + 2


def test_fork_bomb_of_all_children(sandbox):
    source = """
import os, time
for _ in range(7):
    try:
        os.fork()
    except OSError:
        pass
time.sleep(600)
"""
    assert attack(sandbox, source, SHORT).status in ("timeout", "processes", "memory")


def test_thread_bomb(sandbox):
    source = """
import threading, time
made = 0
for _ in range(200):
    try:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        made += 1
    except RuntimeError:
        break
print(made)
"""
    execution = attack(sandbox, source)
    assert execution.status in ("processes", "memory") or int(execution.stdout) < LIMITS.processes + 2


def test_daemon_by_double_fork(sandbox):
    source = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print("done")
"""
    assert attack(sandbox, source).stdout == "done\n"


def test_zombies(sandbox):
    source = """
import os
for _ in range(5):
    if os.fork() == 0:
        os._exit(0)
print("done")
"""
    assert attack(sandbox, source).stdout == "done\n"


def test_thread_that_outlives_the_program(sandbox):
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"
    assert attack(sandbox, source, SHORT).status == "timeout"


def test_daemon_thread_that_outlives_the_program(sandbox):
    source = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\nprint(1)"
    assert attack(sandbox, source).stdout == "1\n"


def test_signal_to_the_parent(sandbox):
    source = """
import os, signal
for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM):
    try:
        os.kill(os.getppid(), number)
    except OSError:
        pass
print("done")
"""
    attack(sandbox, source)


def test_signal_to_everybody(sandbox):
    attack(sandbox, "import os, signal\ntry:\n    os.kill(-1, signal.SIGTERM)\nexcept OSError:\n    pass")


def test_signal_to_the_group(sandbox):
    attack(sandbox, "import os, signal\nos.killpg(0, signal.SIGKILL)")


def test_signal_to_the_trainer(sandbox):
    """Its number, and that of the launcher, are another process's here, or nobody's."""
    launcher = sandbox._slots[0].workers["candidate"].process.pid
    # Signals that do no harm if they arrive; this one would be noticed.
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        source = f"import os, signal\nfor pid in ({os.getpid()}, {launcher}):\n    os.kill(pid, signal.SIGUSR1)"
        execution = attack(sandbox, source)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert execution.status == "error"
    assert not received


def test_stop_itself(sandbox):
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('on')"
    assert attack(sandbox, source, SHORT).status == "timeout"


SYSTEM_CALLS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*[ctypes.c_long(value) if isinstance(value, int) else value for value in arguments])
    return "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()]
machine = os.uname().machine
def number(x86, arm):
    return x86 if machine == "x86_64" else arm
"""


def test_ptrace(sandbox):
    source = SYSTEM_CALLS + "print({call(number(101, 117), 16, pid, 0, 0) for pid in range(1, 50)})"
    assert attack(sandbox, source).stdout == "{'EPERM'}\n"


def test_memory_of_other_processes(sandbox):
    source = SYSTEM_CALLS + "print(call(number(310, 270), os.getppid(), 0, 0, 0, 0, 0))"
    assert attack(sandbox, source).stdout == "EPERM\n"


def test_new_namespaces(sandbox):
    source = (
        SYSTEM_CALLS
        + """
print(call(number(272, 97), 0x10000000), call(number(56, 220), 0x10000011, 0, 0, 0, 0))
print(call(435, ctypes.create_string_buffer(64), 64))
"""
    )
    assert attack(sandbox, source).stdout == "EPERM EPERM\nENOSYS\n"


def test_mounts_and_chroot(sandbox):
    source = (
        SYSTEM_CALLS
        + """
print(call(number(165, 40), b"none", b"/tmp", b"tmpfs", 0, 0), call(number(166, 39), b"/tmp", 2))
try:
    os.chroot("..")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    )
    assert attack(sandbox, source).stdout == "EPERM EPERM\nEPERM\n"


def test_rings_and_kernel(sandbox):
    """io_uring, bpf, perf_event_open, keyctl, userfaultfd."""
    source = SYSTEM_CALLS + (
        "print(call(425, 1, 0), call(number(321, 280), 0, 0, 0), call(number(298, 241), 0, 0, -1, -1, 0), "
        "call(number(250, 219), 0, 0), call(number(323, 282), 0))"
    )
    assert attack(sandbox, source).stdout == "EPERM EPERM EPERM EPERM EPERM\n"


def test_system_calls_by_another_table(sandbox):
    """x86-64 has a second one, of other numbers."""
    source = SYSTEM_CALLS + "print(call(0x40000000 + 101, 16, 1, 0, 0))"
    assert attack(sandbox, source).stdout == "ENOSYS\n"


def test_objects_that_outlive_processes(sandbox):
    source = SYSTEM_CALLS + "print(call(number(29, 194), 1234, 4096, 0o1666), call(number(68, 186), 1234, 0o1666))"
    assert attack(sandbox, source).stdout == "EPERM EPERM\n"


def test_walk_of_proc(sandbox):
    source = """
import glob
for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline") + ["/proc/self/environ", "/proc/1/environ"]:
    try:
        print(open(path, "rb").read().decode("utf-8", "replace"))
    except OSError:
        pass
print("done")
"""
    assert attack(sandbox, source).stdout == "done\n"


def test_own_memory_by_proc(sandbox):
    assert attack(sandbox, "open('/proc/self/mem', 'rb')").status == "error"


def test_other_program(sandbox):
    """What it starts is in the same sandbox."""
    source = f"""
import subprocess, sys
path = {str(__file__)!r}
code = "import os, sys; " \
    "print(os.environ.get('REPIRL_TEST_SECRET')); print(os.path.exists(sys.argv[1]) and open(sys.argv[1]).read(3))"
print(subprocess.run([sys.executable, "-S", "-c", code, path], capture_output=True, text=True).stdout)
"""
    execution = attack(sandbox, source)
    assert execution.stdout.strip() in ("None", "None\nFalse")


def test_limits_cannot_be_raised(sandbox):
    source = """
import resource
for name in ("AS", "NPROC", "FSIZE", "CPU", "NOFILE"):
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (1 << 40, 1 << 40))
        print("raised")
    except (ValueError, OSError):
        pass
"""
    assert attack(sandbox, source).stdout == ""


def test_privileges(sandbox):
    source = """
import os
for step in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.nice(-5)):
    try:
        step()
    except OSError:
        continue
print(os.getuid() == 0 and "root")
"""
    if sandbox.kind == "landlock" and os.geteuid() == 0:
        # Its capabilities are gone; the name remains where nobody else can read the standard library.
        source = "import os\nos.setgroups([0])"
        assert attack(sandbox, source).status == "error"
    else:
        assert attack(sandbox, source).stdout == "False\n"


# Memory


def test_large_array(sandbox):
    assert attack(sandbox, "data = bytearray(1 << 30)").status == "memory"


def test_growing_list(sandbox):
    assert attack(sandbox, "data = []\nwhile len(data) < 1 << 29:\n    data.extend(data or [0])").status == "memory"


def test_growing_text(sandbox):
    assert attack(sandbox, "text = 'ab'\nfor _ in range(30):\n    text += text").status == "memory"


def test_large_power(sandbox):
    assert attack(sandbox, "x = 1 << (1 << 33)").status == "memory"


def test_memory_error_that_is_caught(sandbox):
    source = """
kept = []
for _ in range(1000):
    try:
        kept.append(bytearray(1 << 22))
    except MemoryError:
        pass
print(len(kept))
"""
    execution = attack(sandbox, source)
    assert execution.status == "memory" or int(execution.stdout) <= 64


def test_memory_of_several_processes(sandbox):
    """Each is within the limit; together they are not."""
    source = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        data = bytearray(b"x") * (60 << 20)
        time.sleep(600)
time.sleep(600)
"""
    assert attack(sandbox, source).status == "memory"


def test_shared_mapping(sandbox):
    source = "import mmap\nmap = mmap.mmap(-1, 1 << 30)\nfor at in range(0, 1 << 28, 4096):\n    map[at] = 1"
    assert attack(sandbox, source).status in ("memory", "error", "killed")


def test_file_in_memory(sandbox):
    source = "import os\nfile = os.memfd_create('x')\nfor _ in range(300):\n    os.write(file, bytes(1 << 20))"
    assert attack(sandbox, source).status == "error"


def test_shared_memory(sandbox):
    source = """
import os
for number in range(300):
    with open(f"/dev/shm/attack-{number}", "wb") as file:
        file.write(bytes(1 << 20))
print("written")
"""
    assert attack(sandbox, source).stdout == ""


def test_decompression_bomb(sandbox):
    source = "import zlib\ndata = zlib.compress(bytes(1 << 22), 1) * 1\nx = [zlib.decompress(data) for _ in range(99)]"
    assert attack(sandbox, source).status == "memory"


def test_deep_recursion(sandbox):
    source = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1) + 1\nf(0)"
    assert attack(sandbox, source).status in ("memory", "killed", "error")


def test_recursion_of_the_c_stack(sandbox):
    source = """
import sys
sys.setrecursionlimit(10**9)
class A:
    def __repr__(self):
        return repr([self])
repr(A())
"""
    assert attack(sandbox, source).status in ("memory", "killed", "error")


def test_source_that_the_compiler_cannot_take(sandbox):
    assert attack(sandbox, "(" * 100_000).status in ("compile_error", "memory", "killed")
    assert attack(sandbox, "-" * 100_000 + "1").status in ("compile_error", "memory", "killed")
    assert attack(sandbox, "x = '\0'").status == "compile_error"


# Time


def test_endless_loop(sandbox):
    assert attack(sandbox, "while True:\n    pass", SHORT).status == "timeout"


def test_endless_sleep(sandbox):
    assert attack(sandbox, "import time\ntime.sleep(600)", SHORT).status == "timeout"


def test_loop_that_ignores_signals(sandbox):
    source = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
    assert attack(sandbox, source, SHORT).status == "timeout"


def test_clock_tricks(sandbox):
    source = """
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
try:
    time.clock_settime(time.CLOCK_REALTIME, 0)
    print("set")
except OSError:
    pass
while True:
    pass
"""
    execution = attack(sandbox, source, SHORT)
    assert (execution.status, execution.stdout) == ("timeout", "")
    assert execution.seconds >= SHORT.wall_seconds


def test_operation_that_cannot_be_interrupted(sandbox):
    assert attack(sandbox, "x = 7 ** 50_000_000 % 3", SHORT).status in ("timeout", "memory")


def test_regular_expression(sandbox):
    source = "import re\nre.match('(a+)+$', 'a' * 60 + 'b')"
    assert attack(sandbox, source, SHORT).status == "timeout"


def test_time_of_several_processes(sandbox):
    """Time on the processors counts for all of them, those that sleep no more than those that have ended."""
    source = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        while True:
            pass
time.sleep(600)
"""
    limits = dataclasses.replace(LIMITS, cpu_seconds=0.3)
    assert attack(sandbox, source, limits).status == "timeout"


def test_wait_for_input_that_does_not_come(sandbox):
    assert attack(sandbox, "while True:\n    input()", stdin="a\nb\n").status == "error"


# Output


def test_endless_output(sandbox):
    execution = attack(sandbox, "while True:\n    print('x' * 1000)")
    assert execution.status == "output"
    assert len(execution.stdout) == LIMITS.output_kb << 10


def test_endless_errors(sandbox):
    source = "import sys\nwhile True:\n    sys.stderr.write('x' * 1000)"
    assert attack(sandbox, source).status == "output"


def test_endless_results(sandbox):
    """On each descriptor that it finds."""
    source = """
import os
while True:
    for number in range(1, 64):
        try:
            os.write(number, b"P" + (16).to_bytes(8, "little") + bytes(16))
        except OSError:
            pass
"""
    assert attack(sandbox, source).status == "output"


def test_closed_descriptors(sandbox):
    execution = attack(sandbox, "import os\nprint('x', flush=True)\nos.closerange(0, 64)\nprint('y')")
    assert execution.stdout == "x\n"


def test_output_that_is_no_text(sandbox):
    execution = attack(sandbox, "import os\nos.write(1, bytes(range(256)))")
    assert execution.status == "ok"
    assert "�" in execution.stdout


def test_descriptors_inherited(sandbox):
    source = """
import os, stat
for number in range(64):
    try:
        kind = os.fstat(number).st_mode
    except OSError:
        continue
    print(number, "pipe" if stat.S_ISFIFO(kind) else "file" if stat.S_ISREG(kind) else "other")
"""
    assert attack(sandbox, source).stdout == "0 file\n1 pipe\n2 pipe\n3 pipe\n"


def test_environment(sandbox):
    execution = attack(sandbox, "import os\nprint(sorted(os.environ))")
    assert set(eval(execution.stdout)) <= {
        "HOME",
        "LANG",
        "MALLOC_ARENA_MAX",
        "PATH",
        "PWD",
        "PYTHONHASHSEED",
        "TMPDIR",
    }


# Network


@pytest.fixture
def listener():
    """A server of this machine, and whom it has seen."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        stopped = threading.Event()

        def accept():
            while not stopped.is_set():
                try:
                    seen.append(server.accept())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], seen
        stopped.set()
        thread.join()


def test_tcp(sandbox, listener):
    port, seen = listener
    source = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5).send(b'out')"
    assert attack(sandbox, source).status == "error"
    assert not seen


@pytest.mark.parametrize(
    "arguments", ["2, 1", "2, 2", "2, 3", "10, 1", "10, 2", "1, 1", "1, 2", "16, 3", "17, 3", "31, 3", "38, 5", "40, 1"]
)
def test_sockets_of_every_kind(sandbox, arguments):
    """Internet, local, netlink, packets, bluetooth, cryptography, virtual machines."""
    source = f"import socket\nsocket.socket({arguments})\nprint('made')"
    execution = attack(sandbox, source)
    assert (execution.status, execution.stdout) == ("error", "")


def test_local_socket(sandbox, tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.setblocking(False)
        source = f"""
import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    try:
        one, _ = socket.socketpair(socket.AF_UNIX, kind)
        # To the other end of the pair, whatever the name, unless they are sockets for datagrams.
        one.sendto(b"out", {path!r})
    except OSError:
        print(kind.name)
"""
        assert "SOCK_DGRAM" in attack(sandbox, source).stdout
        with pytest.raises(BlockingIOError):
            server.recv(16)


def test_names(sandbox):
    assert attack(sandbox, "import socket\nsocket.getaddrinfo('localhost.invalid', 80)").status == "error"
