"""One run in an output folder at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from repirl.config import ConfigError
from repirl.distributed.world import own_rank

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What a file system says that has no locks, or whose server gives none.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """Make a run's folder, and keep other runs out of it while the context lasts.

    The first process of a run holds the lock, for all of them. The kernel releases it when that process ends, however
    it ends: a run that was killed leaves no lock behind. On a shared file system (NFS) it holds for all hosts, as far
    as the server gives locks; where it gives none, a warning says so.

    Raises:
        ConfigError: another run uses the folder, or it cannot be made or written to.
    """
    if own_rank() != 0:
        yield
        return
    descriptor = _open(Path(output_dir))
    try:
        _take(descriptor, output_dir)
        yield
    finally:
        # The file stays: whoever removed it could remove one that another run has just locked.
        os.close(descriptor)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be made: it is a file, or a part of the path is; give a folder"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: str | os.PathLike, error: OSError) -> ConfigError:
    return ConfigError(
        f"output_dir {os.fspath(folder)!r} cannot be written to: {error.strerror}; give a folder that can, on a disk "
        "with room"
    )


def _take(descriptor: int, folder: str | os.PathLike) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"output_dir {os.fspath(folder)!r} is in use by another run{_holder(descriptor)}: wait until it has ended, "
            "or choose another output_dir"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise _unwritable(folder, error) from error
        logger.warning(
            "the file system of output_dir %s has no locks (%s): nothing keeps a second run out of this folder",
            os.fspath(folder),
            error.strerror,
        )
        return
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _holder(descriptor: int) -> str:
    """Who has the lock, for a message; nothing where that is not in the file yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f" (process {holder['process']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
