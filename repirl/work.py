"""Counters of tokens, FLOPs, time and memory, from which a step's metrics are computed."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from repirl.config import Config
from repirl.distributed.world import World


@dataclass
class Work:
    """What a process has computed so far.

    Args:
        tokens: tokens that went through a model in a packed batch, or were sampled.
        slots: positions on which attention ran for these tokens, with padding.
        flops: model FLOPs: `models.forward_flops`, times three where gradients were computed.
    """

    tokens: int = 0
    slots: int = 0
    flops: float = 0.0


class PhaseTimer:
    """Adds up seconds and work by phase: `with timer("rollout"): ...`.

    Args:
        work: the counter that the code inside the phases increases; None makes a new one.
    """

    def __init__(self, work: Work | None = None) -> None:
        self.work = work or Work()
        self._seconds: dict[str, float] = {}
        self._work: dict[str, list[float]] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, before = time.perf_counter(), astuple(self.work)
        try:
            # A name for it in profiles (report/profile.py).
            with torch.profiler.record_function(phase):
                yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            done = [after - b for after, b in zip(astuple(self.work), before, strict=True)]
            self._work[phase] = [sum(x) for x in zip(self._work.get(phase, [0.0] * len(done)), done, strict=True)]

    def step_metrics(self, world: World | None = None, peak_flops: float | None = None) -> dict[str, float]:
        """The metrics since the last call; then start again from zero. All processes call this together.

        Args:
            world: the processes whose work is added up; None for this one alone.
            peak_flops: FLOPs per second that one process's device can do; None leaves out "mfu/PHASE".

        Returns:
            "seconds/PHASE", and "seconds/step" for everything since the last call, measured on this process. For each
            phase that ran a model, over all processes: "tokens_per_second/PHASE", "padding/PHASE" (the share of
            attention's positions that hold no token), and "mfu/PHASE" (the share of `peak_flops` that was used).
        """
        now = time.perf_counter()
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        # All processes have the same phases in the same order, because they take the same steps.
        totals = torch.tensor(list(self._work.values()), dtype=torch.float64)
        size = 1
        if world is not None and totals.numel():
            totals, size = world.sum(totals), world.size
        for (phase, seconds), (tokens, slots, flops) in zip(self._seconds.items(), totals.tolist(), strict=True):
            if tokens:
                metrics[f"tokens_per_second/{phase}"] = tokens / seconds
                metrics[f"padding/{phase}"] = 1.0 - tokens / slots if slots else 0.0
                if peak_flops:
                    metrics[f"mfu/{phase}"] = flops / (seconds * size * peak_flops)
        metrics["seconds/step"] = now - self._start
        self._seconds, self._work, self._start = {}, {}, now
        return metrics


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOPs per second of a large square matrix product on this device, with the current number of threads.

    Utilisation ("mfu") is relative to this figure unless `log.peak_tflops` is set.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """The peak, in bytes, of allocated GPU memory; on a CPU, of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    # Systems other than Linux have no /proc. getrusage gives bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory_bytes` returns. This works on Linux and with CUDA; elsewhere it does nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_flops_of(config: Config, world: World) -> float:
    """FLOPs per second of one process's device: `log.peak_tflops` if it is set, else measured here."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    return measure_peak_flops(world.device, getattr(torch, config.computes_in))
