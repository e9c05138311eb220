"""Processes that share a GPU take turns: each loads its libraries while another one measures.

``bench/gpu.py`` sets ``REPIRL_TURN`` to a file's name; without this variable, a process does not wait.
"""

import os
import time
from pathlib import Path

VARIABLE = "REPIRL_TURN"


def wait_for_turn() -> None:
    """Signal that this process is ready, and wait for its turn; it has the GPU until it ends."""
    name = os.environ.get(VARIABLE)
    if name is None:
        return
    ready_file(name).touch()
    while not go_file(name).exists():
        time.sleep(0.02)


def ready_file(name: str) -> Path:
    return Path(name + ".ready")


def go_file(name: str) -> Path:
    return Path(name + ".go")
