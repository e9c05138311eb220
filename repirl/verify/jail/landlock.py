"""Rules of files that hold without privileges, by the kernel's Landlock."""

from __future__ import annotations

import ctypes
import os
import struct

from . import kernel, view

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
# Rights over files that each version of the interface knows.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_RIGHTS = 16
_SCOPE_SOCKETS, _SCOPE_SIGNALS = 1, 2


def version() -> int:
    """Of the interface; 0 where the kernel has none. From 6 on, signals are held, too."""
    try:
        return kernel.syscall(_CREATE, None, 0, 1)
    except OSError:
        return 0


class Rules:
    """What `restrict` will allow, opened before: a child of a fork only has to switch it on.

    Reading of the view (view.py), and everything in `folder`.
    """

    def __init__(self, folder: str) -> None:
        known = version()
        rights = (1 << _NUM_RIGHTS.get(known, _ALL_RIGHTS)) - 1
        # Rights over files, over the network (which seccomp denies), scopes.
        fields = [rights, 0, _SCOPE_SOCKETS | _SCOPE_SIGNALS if known >= 6 else 0]
        size = 24 if known >= 6 else 16 if known >= 4 else 8
        attributes = ctypes.create_string_buffer(struct.pack("<QQQ", *fields)[:size], size)
        self.descriptor = kernel.syscall(_CREATE, attributes, size, 0)
        masks = view.hidden()
        for path in view.sources():
            if os.path.isdir(path):
                # Names may be listed, so that imports work; what is in the files is for those allowed below.
                self._allow(path, _READ_DIR & rights)
            for part in _without(path, masks):
                self._allow(part, (_READ_FILE | _EXECUTE) & rights)
        for path in view.DEVICES:
            self._allow(path, (_READ_FILE | _WRITE_FILE) & rights)
        self._allow(folder, rights)

    def _allow(self, path: str, rights: int) -> None:
        parent = os.open(path, os.O_PATH)
        try:
            rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, parent), 12)
            kernel.syscall(_ADD, self.descriptor, 1, rule, 0)
        finally:
            os.close(parent)

    def restrict(self, descriptor: int) -> None:
        """Hold this process, and all that it starts, to the rules for good.

        Args:
            descriptor: that of the rules, or a copy; closed here.
        """
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.syscall(_RESTRICT, descriptor, 0)
        os.close(descriptor)


def _without(path: str, masks: list[str]) -> list[str]:
    """The parts of a path that leave out some folders in it."""
    if path in masks:
        return []
    if not any(mask.startswith(path + "/") for mask in masks):
        return [path]
    return [part for name in sorted(os.listdir(path)) for part in _without(f"{path}/{name}", masks)]
