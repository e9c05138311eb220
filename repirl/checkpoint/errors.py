"""What lies behind the errors of torch.distributed.checkpoint."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException


def reason(error: BaseException) -> str:
    """The message behind the wrapping of torch.distributed.checkpoint."""
    if isinstance(error, CheckpointException) and error.failures:
        return "; ".join(f"{type(f[0]).__name__}: {f[0]}" for f in error.failures.values())
    root = root_cause(error)
    return f"{type(root).__name__}: {root}"


def root_cause(error: BaseException) -> BaseException:
    """The operating system's error that led to this one, or else this one."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen or error
