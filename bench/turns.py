"""Processes that share a GPU take turns: each loads its libraries while another one measures.

``bench/gpu.py`` names a file in ``REPIRL_TURN``; where the variable is not set there is nobody to wait for.
"""

import os
import time
from pathlib import Path

VARIABLE = "REPIRL_TURN"


def wait_for_turn() -> None:
    """Say that this process is ready, and wait until the GPU is its own, which it then is until it ends."""
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
