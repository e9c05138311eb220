"""The outermost process of a worker, outside the sandbox: starts it, and removes what it leaves."""

from __future__ import annotations

import json
from typing import Any

from .isolation import Isolation
from .zygote import Zygote


def main(control: int, trainer: int, options: str) -> None:
    """Serve a trainer.

    Args:
        control: socket to it.
        trainer: its pidfd, -1 for none.
        options: JSON.
    """
    _: dict[str, Any] = json.loads(options)
    Zygote(control, [trainer] if trainer >= 0 else [], Isolation()).serve()
