"""Step metrics as JSON lines and TensorBoard, seconds by phase, and a live display."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from repirl.config import Config
from repirl.distributed.world import World


class MetricsLogger:
    """Appends to OUTPUT_DIR/metrics.jsonl, one line a step, on disk before `log` returns.

    start_step: a resumed run has finished that many steps; later lines of the killed run, and a half-written
    last one, are cut away, so that no step stands there twice. Values that are not finite become null and are
    named under "nonfinite".
    """

    def __init__(self, output_dir: str | os.PathLike, *, tensorboard: bool, start_step: int = 0) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= start_step and start_step > 0]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one step; `step` counts finished steps."""
        nonfinite = sorted(name for name, value in metrics.items() if not math.isfinite(value))
        line: dict[str, Any] = {"step": step} | {n: None if n in nonfinite else v for n, v in metrics.items()}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a half-written last line, which a killed run may leave, is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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


# What people look at: metric, label, format.
SHOWN = [
    ("eval/accuracy", "held-out accuracy", "{:.1%}"),
    ("rollout/outcome", "train accuracy", "{:.1%}"),
    ("policy/entropy", "entropy (nats/token)", "{:.3f}"),
    ("prm/ess_fraction", "effective sample share", "{:.2f}"),
    ("prm/reward_gap", "expert - policy reward", "{:+.3f}"),
    ("policy/loss", "policy loss", "{:+.4f}"),
    ("prm/loss", "PRM loss", "{:+.4f}"),
    ("seconds/step", "seconds", "{:.2f}"),
]


class ProgressDisplay:
    """A bar, the running phase and the newest metrics; plain lines where the output is no terminal."""

    def __init__(self, total_steps: int, title: str, *, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total_steps, self.title = total_steps, title
        self._history: dict[str, list[float]] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[phase]}"),
            console=self.console,
        )
        self._task = self._progress.add_task(title, total=total_steps, phase="")
        self._live = Live(self._view(), console=self.console, refresh_per_second=4, transient=True)

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def phase(self, name: str) -> None:
        self._progress.update(self._task, phase=name)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """`step` steps are done, with these metrics."""
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)
        self._progress.update(self._task, completed=step)
        if self.console.is_terminal:
            self._live.update(self._view())
            return
        every = max(1, self.total_steps // 20)
        if step % every == 0 or step == self.total_steps or "eval/accuracy" in metrics:
            shown = [f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics]
            self.console.print(f"{self.title} {step}/{self.total_steps}: {', '.join(shown)}", soft_wrap=True)

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, label, form in SHOWN:
            values = self._history.get(name)
            if values:
                table.add_row(f"  {label}", form.format(values[-1]), _sparkline(values))
        return Group(self._progress, table)


class Reporter:
    """What a run shows and writes as it goes: log file and display, by the main process only."""

    def __init__(self, config: Config, world: World, start_step: int) -> None:
        self._stack = ExitStack()
        self._logger: MetricsLogger | None = None
        self._display: ProgressDisplay | None = None
        if world.is_main:
            self._logger = MetricsLogger(config.output_dir, tensorboard=config.log.tensorboard, start_step=start_step)
            self._display = ProgressDisplay(config.steps, config.objective)

    def phase(self, name: str) -> None:
        """A phase of the step begins."""
        if self._display:
            self._display.phase(name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """`step` steps are done, with these metrics."""
        if self._logger and self._display:
            self._logger.log(step, metrics)
            if step:
                self._display.update(step, metrics)

    def __enter__(self) -> Reporter:
        for part in (self._logger, self._display):
            if part:
                self._stack.enter_context(part)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _sparkline(values: list[float], width: int = 32) -> str:
    values = [v for v in values if math.isfinite(v)][-width:]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((v - low) / (high - low or 1) * (len(bars) - 1))] for v in values)


def print_table(title: str, columns: list[str], rows: list[list[Any]], console: Console | None = None) -> None:
    """A table whose cells are never cut or broken; where the output is narrow, its headings are stacked instead."""
    console = console or Console()
    for narrow in (False, True):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, int(not narrow)))
        for index, column in enumerate(columns):
            heading = column.replace(" ", "\n") if narrow else column
            table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*map(str, row))
        needed = Measurement.get(console, console.options.update(width=1000), table).maximum
        if needed <= console.width:
            break
    # Wider than the output even so: long lines are better than lost digits.
    table.width = needed
    console.print(table, crop=False)
