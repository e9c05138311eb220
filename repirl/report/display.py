"""Terminal output: a live display of a run, and tables."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

# The metrics that the display shows: name, label, format. `tokens/second` are those of the whole step.
SHOWN = [
    ("eval/accuracy", "held-out accuracy", "{:.1%}"),
    ("rollout/outcome", "train accuracy", "{:.1%}"),
    ("rollout/length", "response length (tokens)", "{:.1f}"),
    ("rollout/truncated", "truncated responses", "{:.1%}"),
    ("policy/entropy", "entropy (nats/token)", "{:.3f}"),
    ("policy/approx_kl", "KL from the rollouts (nats/token)", "{:.2g}"),
    ("policy/kl_reference", "KL from the reference (nats/token)", "{:.2g}"),
    ("policy/clip_fraction", "clipped tokens", "{:.1%}"),
    ("prm/ess_fraction", "effective sample share", "{:.2f}"),
    ("prm/reward_gap", "expert - policy reward", "{:+.3f}"),
    ("policy/margin", "chosen - rejected reward", "{:+.3f}"),
    ("policy/loss", "policy loss", "{:+.4f}"),
    ("critic/loss", "critic loss", "{:+.4f}"),
    ("prm/loss", "PRM loss", "{:+.4f}"),
    ("tokens/second", "tokens/s", "{:,.0f}"),
    ("seconds/step", "seconds", "{:.2f}"),
]


# Without a terminal there is a line at least that often, in seconds, as long as steps take less.
LONGEST_SILENCE = 60.0
# Of the last so many steps the mean time is taken.
PACE_STEPS = 20


class Pace:
    """How fast steps go: the mean of the last ones, evaluations and checkpoints included.

    The first step of a process is left out, because it may compile kernels, and fills caches.

    Args:
        total_steps: of the run.
        clock: seconds from any origin.
    """

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total_steps, clock
        self._times: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)

    def done(self, step: int) -> None:
        """So many steps are done now."""
        self._times.append((step, self._clock()))

    def __str__(self) -> str:
        """Seconds a step and the time left, such as "2.5 s/step, 1:02:30 left"; empty while neither is known, and at
        the end."""
        if len(self._times) < 2:
            return ""
        (first, start), (last, now) = self._times[0], self._times[-1]
        each = (now - start) / (last - first)
        if last >= self._total:
            return ""
        minutes, seconds = divmod(round(each * (self._total - last)), 60)
        hours, minutes = divmod(minutes, 60)
        left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{each:.3g} s/step, {left} left"


class ProgressDisplay:
    """Shows a progress bar, the current phase and the newest metrics; prints plain lines if there is no terminal.

    What was shown last stays on the terminal, however the run ends.

    Args:
        total_steps: the number of steps of the run.
        title: stands in front of the bar.
        compiles: whether the first step compiles kernels, which is said then.
        console: where to print; None for standard output.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        compiles: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.total_steps, self.title, self.compiles = total_steps, title, compiles
        self._pace, self._clock, self._printed = Pace(total_steps, clock), clock, clock()
        self._history: dict[str, list[float]] = {}
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TextColumn("{task.fields[phase]}"),
            console=self.console,
        )
        self._task = self._progress.add_task(title, total=total_steps, pace="", phase="")
        self._live = Live(self._view(), console=self.console, refresh_per_second=4)

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self._live.start()
        elif self.compiles:
            self.console.print(f"{self.title}: the first step compiles kernels and takes longer than those after it")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Show that a phase of the step begins."""
        self._progress.update(self._task, phase=f"{name} (first step: kernels are compiled)" if self.compiles else name)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show that `step` steps are done, with the metrics of the last one."""
        if metrics.get("tokens") and metrics.get("seconds/step"):
            metrics = metrics | {"tokens/second": metrics["tokens"] / metrics["seconds/step"]}
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)
        self.compiles = False
        self._pace.done(step)
        self._progress.update(self._task, completed=step, pace=str(self._pace))
        if self.console.is_terminal:
            self._live.update(self._view())
            return
        every = max(1, self.total_steps // 20)
        is_late = self._clock() - self._printed >= LONGEST_SILENCE
        if step % every == 0 or step == self.total_steps or "eval/accuracy" in metrics or is_late:
            self._printed = self._clock()
            shown = [f"{label} {form.format(metrics[name])}" for name, label, form in SHOWN if name in metrics]
            place = ", ".join(filter(None, [f"{self.title} {step}/{self.total_steps}", str(self._pace)]))
            self.console.print(f"{place}: {', '.join(shown)}", soft_wrap=True)

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, label, form in SHOWN:
            values = self._history.get(name)
            if values:
                table.add_row(f"  {label}", form.format(values[-1]), sparkline(values))
        return Group(self._progress, table)


def sparkline(values: list[float], width: int = 32) -> str:
    """The last `width` finite values as a line of bars of different heights; empty for fewer than two values."""
    values = [v for v in values if math.isfinite(v)][-width:]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round((v - low) / (high - low or 1) * (len(bars) - 1))] for v in values)


def print_table(title: str, columns: list[str], rows: list[list[Any]], console: Console | None = None) -> None:
    """Print a table. Cells are never cut or broken; if the output is narrow, headings are broken into lines."""
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
    # The table may still be wider than the output: long lines are better than lost digits.
    table.width = needed
    console.print(table, crop=False)
