"""Programs that read what is not theirs, or leave files behind."""

import os
import stat
import sys
from pathlib import Path

import pytest
from sandboxes import LIMITS, assert_holds, processes

import repirl.verify.sandbox

SECRET = "c1f9-right-answers"


@pytest.fixture
def hidden(tmp_path):
    """A file that anybody may read, outside the sandbox."""
    tmp_path.chmod(0o755)
    file = tmp_path / "tests.jsonl"
    file.write_text(SECRET)
    file.chmod(0o666)
    return file


def outside(sandbox, source):
    execution = sandbox.run_program(source)
    assert SECRET not in execution.stdout + execution.stderr
    return execution


def test_hidden_tests(sandbox, hidden):
    assert outside(sandbox, f"print(open({str(hidden)!r}).read())").status == "error"


def test_hidden_tests_by_a_link(sandbox, hidden):
    source = f"import os\nos.symlink({str(hidden)!r}, 'link')\nprint(open('link').read())"
    assert outside(sandbox, source).status == "error"


def test_hidden_tests_by_a_hard_link(sandbox, hidden):
    source = f"import os\nos.link({str(hidden)!r}, 'link')\nprint(open('link').read())"
    assert outside(sandbox, source).status == "error"


def test_hidden_tests_by_the_way_up(sandbox, hidden):
    source = f"import os\nfor _ in range(20):\n    os.chdir('..')\nprint(open('.' + {str(hidden)!r}).read())"
    assert outside(sandbox, source).status == "error"


def test_hidden_tests_by_a_handle(sandbox, hidden):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 304, "aarch64": 265}[os.uname().machine]
print(libc.syscall(number, -100, ctypes.create_string_buffer(32), 0), ctypes.get_errno())
"""
    assert outside(sandbox, source).stdout == "-1 1\n"


def test_the_checker(sandbox):
    file = repirl.verify.sandbox.__file__
    assert sandbox.run_program(f"print(open({file!r}).read())").status == "error"
    assert sandbox.run_program("import repirl").status == "error"


def test_packages(sandbox):
    """Data sets with right answers are installed as packages."""
    assert sandbox.run_program("import pytest").status == "error"
    source = """
import glob, os, sys
for pattern in [path + "/*-packages" for path in sys.path] + ["/usr/lib/python*/*-packages", "/usr/*/*/*/*-packages"]:
    for folder in glob.glob(pattern):
        for path, _, names in os.walk(folder):
            for name in names[:3]:
                try:
                    open(os.path.join(path, name)).close()
                except OSError:
                    continue
                print(path, name)
"""
    assert sandbox.run_program(source).stdout == ""


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/shadow", "/root/.bashrc", "/proc/1/cmdline", "/sys/kernel/mm", "/dev/tty"]
)
def test_the_system(sandbox, path):
    source = f"import os\nprint(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read())"
    execution = sandbox.run_program(source)
    assert (execution.status, execution.stdout) == ("error", "")


def test_what_is_there(sandbox):
    """All folders of the view, as docs/sandbox.md lists them."""
    source = """
import os
for folder in ("/", "/etc", "/usr", "/usr/share", "/var", "/proc", "/sys", "/opt", "/mnt", "/home", "/run", "/boot"):
    try:
        print(folder, *os.listdir(folder))
    except OSError:
        print(folder)
"""
    seen = {line.split()[0]: set(line.split()[1:]) for line in sandbox.run_program(source).stdout.splitlines()}
    own = set(Path(sys.base_prefix).parts)
    assert seen["/"] <= {"dev", "etc", "lib", "lib64", "sandbox", "tmp", "usr"} | own
    assert seen["/etc"] <= {"ld.so.cache", "localtime"}
    assert seen["/usr"] <= {"bin", "lib", "lib64", "share"} | own
    assert seen["/usr/share"] <= {"zoneinfo"}
    for folder in (
        "/var",
        "/proc",
        "/sys",
        "/mnt",
        "/run",
        "/boot",
        *({"/opt", "/home"} - {f"/{name}" for name in own}),
    ):
        assert not seen[folder]


def test_home(sandbox):
    source = f"import os\nfor path in ({str(Path.home())!r}, {os.getcwd()!r}, '/home'):\n    print(os.listdir(path))"
    execution = sandbox.run_program(source)
    # Folders on the way to the standard library may be there, with nothing else in them.
    assert execution.status == "error"
    assert ".bashrc" not in execution.stdout
    assert "pyproject.toml" not in execution.stdout


def test_writing_outside(sandbox, hidden):
    source = f"""
import os, sys
folders = ["/", "/usr/lib", "/etc", "/dev", "/root", "/home", "/var/tmp", os.path.dirname(os.__file__)]
for folder in [*folders, {str(hidden.parent)!r}]:
    for step in (lambda p: open(p, "w"), os.mkdir, lambda p: os.symlink("x", p), os.mkfifo):
        try:
            step(folder + "/repirl-attack")
            print("written", folder)
        except OSError:
            pass
steps = [lambda p: open(p, "a"), lambda p: os.truncate(p, 0), os.unlink, lambda p: os.chmod(p, 0)]
for step in [*steps, lambda p: os.utime(p, (0, 0)), lambda p: os.rename(p, p + "x")]:
    for path in ({str(hidden)!r}, os.__file__):
        try:
            step(path)
            print("changed", path)
        except OSError:
            pass
"""
    before = hidden.stat()
    execution = outside(sandbox, source)
    assert (execution.status, execution.stdout) == ("ok", "")
    assert hidden.read_text() == SECRET
    assert (hidden.stat().st_mode, hidden.stat().st_mtime) == (before.st_mode, before.st_mtime)


def test_devices(sandbox):
    source = "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0))\nopen('disk', 'rb').read(1)"
    assert outside(sandbox, source).status == "error"


def test_set_user_id(sandbox):
    source = """
import os, shutil, subprocess, sys
shutil.copyfile(sys.executable, "python")
os.chmod("python", 0o4755)
print(subprocess.run(["./python", "-S", "-c", "import os; print(os.geteuid())"], capture_output=True, text=True).stdout)
"""
    assert outside(sandbox, source).stdout.strip() in ("", "65534", str(os.geteuid()))


def test_large_file(sandbox):
    source = "with open('x', 'wb') as file:\n    for _ in range(64):\n        file.write(bytes(1 << 20))"
    assert outside(sandbox, source).status in ("error", "killed")


def test_many_files(sandbox):
    source = """
import os
written = 0
try:
    for number in range(100):
        with open(str(number), "wb") as file:
            written += file.write(bytes(1 << 18))
except OSError:
    pass
print(written)
"""
    written = int(outside(sandbox, source).stdout)
    if sandbox.kind != "landlock":
        assert written <= LIMITS.file_mb << 20


def test_sparse_file(sandbox):
    assert outside(sandbox, "open('x', 'wb').truncate(1 << 40)").status in ("error", "killed")


def test_many_empty_files(sandbox):
    source = """
try:
    for number in range(6000):
        open(str(number), "w").close()
except OSError:
    print("no more")
"""
    execution = outside(sandbox, source)
    assert sandbox.kind == "landlock" or execution.stdout == "no more\n"


def test_open_files(sandbox):
    source = "import os\nkept = [open('x', 'w') for _ in range(1000)]"
    assert outside(sandbox, source).status == "error"


def test_files_for_the_next_program(sandbox):
    """assert_holds looks for them as well."""
    source = """
import os
for folder in (".", "/tmp", "/dev/shm"):
    for name in (".hidden", "sitecustomize.py", "solution.py"):
        try:
            open(f"{folder}/{name}", "w").write("print('left')")
        except OSError:
            pass
os.mkdir("closed", 0)
"""
    outside(sandbox, source)
    after = sandbox.run_program("import os\nprint(os.path.exists('/tmp/.hidden'), os.path.exists('/dev/shm/.hidden'))")
    assert after.stdout == "False False\n"


def test_folders_that_are_hard_to_remove(sandbox):
    source = """
import os
for depth in range(600):
    os.mkdir("d")
    os.chdir("d")
open("x", "w").close()
"""
    assert outside(sandbox, source).status == "ok"


def test_links_out_of_what_is_removed(sandbox, hidden):
    """Whoever removes the folder of the program goes through none of them."""
    source = f"""
import os
os.symlink({str(hidden.parent)!r}, 'link')
os.mkdir('d')
os.symlink({str(hidden.parent)!r}, 'd/link')
"""
    assert outside(sandbox, source).status == "ok"
    assert_holds(sandbox, processes(sandbox))
    assert hidden.exists()
    assert stat.S_IMODE(hidden.parent.stat().st_mode) == 0o755


def test_modules_changed_for_the_next_program(sandbox):
    source = "import math, builtins, os\nmath.sqrt = lambda x: 0\nbuiltins.len = lambda x: 0\nos.environ['LEFT'] = '1'"
    assert outside(sandbox, source).status == "ok"
    after = sandbox.run_program("import math, os\nprint(math.sqrt(4), len('ab'), 'LEFT' in os.environ)")
    assert after.stdout == "2.0 2 False\n"
