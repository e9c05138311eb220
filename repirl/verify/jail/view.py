"""What a program sees of the file system: Python's standard library and the system's shared libraries, read-only, a
few devices, and an empty folder of its own. No packages: data sets with right answers are among them."""

from __future__ import annotations

import ctypes
import glob
import os
import struct
import sys
from pathlib import Path

from . import kernel

FOLDER = "/tmp"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
# A file system of this kind is mounted here while the view is built: there is nothing below it that is needed.
_BASE = "/sys"


def sources() -> list[str]:
    """Folders and files that are to be seen, and exist: none lies in another."""
    prefix = sys.base_prefix
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    wanted = [os.path.realpath(sys.executable), f"{prefix}/lib", f"{prefix}/lib64/{version}"]
    wanted += ["/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    wanted += [path for path in ("/lib", "/lib64") if not os.path.islink(path)]
    kept: list[str] = []
    for path in sorted({path for path in wanted if os.path.exists(path)}):
        if not any(path.startswith(other + "/") for other in kept):
            kept.append(path)
    return kept


def links() -> dict[str, str]:
    """Symbolic links to parts of the view, and where they point."""
    return {path: os.readlink(path) for path in ("/lib", "/lib64") if os.path.islink(path)}


def hidden() -> list[str]:
    """Folders within the sources that are not to be seen: installed packages."""
    paths = []
    for path in sources():
        for name in ("site-packages", "dist-packages"):
            paths += glob.glob(f"{path}/{name}") + glob.glob(f"{path}/python*/{name}")
    return sorted(path for path in set(paths) if os.path.isdir(path) and not os.path.islink(path))


def bubblewrap_arguments(bwrap: str, code: str) -> list[str]:
    """The command that builds the view.

    Args:
        bwrap: the program.
        code: the folder of this package, which is seen in /sandbox.
    """
    arguments = [bwrap, "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    # Folders above are private where they are so outside, unless they are made here.
    for folder in sorted({str(parent) for path in (*sources(), *DEVICES) for parent in Path(path).parents} - {"/"}):
        arguments += ["--perms", "0755", "--dir", folder]
    for path in sources():
        arguments += ["--ro-bind", path, path]
    for path, target in links().items():
        arguments += ["--symlink", target, path]
    for path in hidden():
        arguments += ["--tmpfs", path, "--remount-ro", path]
    for path in DEVICES:
        arguments += ["--dev-bind", path, path]
    arguments += ["--symlink", FOLDER, "/dev/shm", "--ro-bind", code, "/sandbox/jail", "--dir", FOLDER]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]


def build() -> None:
    """Make the view the root of this mount namespace, which is the process's own, and of all that it starts."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    parts = [*sources(), *DEVICES]
    masks, symbolic = hidden(), links()
    opened = {path: os.open(path, os.O_PATH) for path in parts}
    kernel.mount("tmpfs", _BASE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path, descriptor in opened.items():
        target = _BASE + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.mount(f"/proc/self/fd/{descriptor}", target, "", kernel.MS_BIND | kernel.MS_REC)
        _close(target, is_device=path in DEVICES)
        os.close(descriptor)
    for path, target in symbolic.items():
        os.symlink(target, _BASE + path)
    for path in masks:
        mask = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_RDONLY
        kernel.mount("tmpfs", _BASE + path, "tmpfs", mask, "size=4k,mode=755")
    os.mkdir(_BASE + FOLDER)
    os.symlink(FOLDER, f"{_BASE}/dev/shm")
    os.chdir(_BASE)
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    kernel.mount("none", "/", "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | 6)


def _close(path: str, is_device: bool) -> None:
    """Make all that is mounted there read-only."""
    attributes = _ATTR_RDONLY | _ATTR_NOSUID | (0 if is_device else _ATTR_NODEV)
    argument = ctypes.create_string_buffer(struct.pack("<QQQQ", attributes, 0, 0, 0), 32)
    try:
        kernel.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, argument, 32)
    except OSError:
        # Before Linux 5.12: this mount alone, with what is set on it already, which an unprivileged user cannot clear.
        flags = os.statvfs(path).f_flag & ~0x1000
        kernel.mount("none", path, "", kernel.MS_REMOUNT | kernel.MS_BIND | flags | attributes)


def own_folder(size_mb: int) -> None:
    """An empty folder that only this process's mount namespace has, and that ends with it."""
    options = f"size={size_mb}m,nr_inodes=4096,mode=700"
    kernel.mount("tmpfs", FOLDER, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    os.chdir(FOLDER)
