"""What was computed, in what time and with what memory: the counters behind a step's metrics."""

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
    """What a process has computed so far. tokens: packed through a model or sampled · slots: positions that
    attention ran on for them, padding included · flops: model FLOPs (models.forward_flops, three times that with
    gradients)."""

    tokens: int = 0
    slots: int = 0
    flops: float = 0.0


class PhaseTimer:
    """`with timer("rollout"): ...` adds up seconds and work by phase. work: the counter that the phases add to."""

    def __init__(self, work: Work | None = None) -> None:
        self.work = work or Work()
        self._seconds: dict[str, float] = {}
        self._work: dict[str, list[float]] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, before = time.perf_counter(), astuple(self.work)
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            done = [after - b for after, b in zip(astuple(self.work), before, strict=True)]
            self._work[phase] = [sum(x) for x in zip(self._work.get(phase, [0.0] * len(done)), done, strict=True)]

    def step_metrics(self, world: World | None = None, peak_flops: float | None = None) -> dict[str, float]:
        """Since the last call: {"seconds/PHASE": ..., "seconds/step": wall seconds}, and for phases that ran models
        "tokens_per_second/PHASE" and "padding/PHASE" (share of attention's positions without a token) over all
        processes, and with `peak_flops` (of one process's device, per second) "mfu/PHASE".
        """
        now = time.perf_counter()
        found = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        # The same phases in the same order everywhere, as every process takes the same steps.
        totals = torch.tensor(list(self._work.values()), dtype=torch.float64)
        size = 1
        if world is not None and totals.numel():
            totals, size = world.sum(totals), world.size
        for (phase, seconds), (tokens, slots, flops) in zip(self._seconds.items(), totals.tolist(), strict=True):
            if tokens:
                found[f"tokens_per_second/{phase}"] = tokens / seconds
                found[f"padding/{phase}"] = 1.0 - tokens / slots if slots else 0.0
                if peak_flops:
                    found[f"mfu/{phase}"] = flops / (seconds * size * peak_flops)
        found["seconds/step"] = now - self._start
        self._seconds, self._work, self._start = {}, {}, now
        return found


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product on this device with the threads in use: what utilisation is
    measured against where the data sheet's figure is not given."""
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
    """High-water mark of the GPU's memory, or for the CPU of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    # Only Linux has /proc; macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Let the high-water mark start anew, where the system allows it (Linux, CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_flops_of(config: Config, world: World) -> float:
    """What one process's device can do a second: `log.peak_tflops`, or else a product timed here."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    return measure_peak_flops(world.device, getattr(torch, config.computes_in))
