"""A run's log and display behind one object."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from repirl.config import Config
from repirl.distributed.world import World
from repirl.report.display import ProgressDisplay
from repirl.report.history import HistoryFile
from repirl.report.log import LogError, MetricsLogger, read_metrics
from repirl.report.record import read_starts, record_start
from repirl.report.samples import SampleFiles, as_texts
from repirl.report.trackers import Trackers

logger = logging.getLogger(__name__)

# Beyond these an estimate by importance sampling is not to be relied on. For Pareto k: Vehtari et al. 2024.
LARGEST_PARETO_K, SMALLEST_ESS = 0.7, 0.05
# Above this share of effective samples the weights are nearly even, and the shape of their tail does not matter.
EVEN_ESS = 0.9


class Reporter:
    """Writes a run's files of turns and shows its display. Only the main process does so; the others do nothing.

    `samples` and `history` hold rows of the step that is not logged yet.

    Args:
        config: the run's configuration.
        world: the processes of the run.
        start_step: the number of finished steps of a resumed run; 0 for a new one.

    Raises:
        LogError: on all processes, where metrics cannot be written.
    """

    def __init__(self, config: Config, world: World, start_step: int) -> None:
        self._stack = ExitStack()
        self._world = world
        self._logger: MetricsLogger | None = None
        self._display: ProgressDisplay | None = None
        self._trackers: Trackers | None = None
        self._files: tuple[SampleFiles, HistoryFile] | None = None
        self.samples: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self._warned: set[str] = set()

        def open_log() -> None:
            tensorboard = config.log.tensorboard or "tensorboard" in config.log.trackers
            self._logger = MetricsLogger(config.output_dir, tensorboard=tensorboard, start_step=start_step)
            record_start(config, start_step, world.device, world.size)
            self._trackers = Trackers(config, read_starts(config.output_dir)[-1], start_step)
            self._files = (
                SampleFiles(config.output_dir, max_mb=config.log.samples_max_mb, start_step=start_step),
                HistoryFile(config.output_dir, start_step=start_step),
            )
            before = read_metrics(Path(config.output_dir) / "metrics.jsonl") if start_step else []
            self._warned = {name for metrics in before for name in weight_warnings(metrics)}
            self._display = ProgressDisplay(config.steps, config.objective, compiles=world.device.type == "cuda")

        self._on_main(open_log)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Do something on the main process; if that cannot write, all processes get the error."""
        problem: LogError | None = None
        if self._world.is_main:
            try:
                action()
            except LogError as error:
                problem = error
        problems = [p for p in self._world.gather([problem]) if p is not None]
        if problems:
            raise problems[0]

    def phase(self, name: str) -> None:
        """Show that a phase of the step begins."""
        if self._display:
            self._display.phase(name)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write and show the metrics of a step; `step` counts finished steps, and step 0 is only written. The rows in
        `samples` and `history` are written, too.

        Raises:
            LogError: on all processes, where metrics cannot be written.
        """

        def write() -> None:
            assert self._logger
            assert self._files
            self._logger.log(step, metrics, as_texts(self.samples))
            samples, history = self._files
            samples.append(self.samples)
            history.append(self.history)
            if self._trackers:
                self._trackers.log(step, metrics, self.samples)
            self.samples.clear()
            self.history.clear()

        self._on_main(write)
        for name, text in weight_warnings(metrics).items() if self._world.is_main else ():
            if name not in self._warned:
                logger.warning("turn %d: %s", step, text)
                self._warned.add(name)
        if self._display and step:
            self._display.update(step, metrics)

    def __enter__(self) -> Reporter:
        for part in (self._logger, self._display):
            if part:
                self._stack.enter_context(part)
        if self._trackers:
            self._stack.callback(self._trackers.close)
        for file in self._files or ():
            self._stack.callback(file.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def weight_warnings(metrics: Mapping[str, float | None]) -> dict[str, str]:
    """What is to be said of the importance weights of a turn, by the name of the metric; empty where they are sound."""
    texts = {}
    pareto_k, ess = metrics.get("prm/pareto_k"), metrics.get("prm/ess_fraction")
    is_even = ess is not None and ess > EVEN_ESS
    if pareto_k is not None and pareto_k > LARGEST_PARETO_K and not is_even:
        texts["prm/pareto_k"] = (
            f"the largest importance weights of the PRM's update have a heavy tail (Pareto k {pareto_k:.2f}, above "
            f"{LARGEST_PARETO_K}): the estimate of log Z is not reliable. irl.target_ess, irl.temper below 1, "
            "irl.smooth: psis or irl.truncate make the weights more even. This is said once; metrics.jsonl has "
            "prm/pareto_k"
        )
    if ess is not None and ess < SMALLEST_ESS:
        texts["prm/ess_fraction"] = (
            f"the PRM's update rests on few rollouts: its importance weights are worth {ess:.1%} of the samples, below "
            f"{SMALLEST_ESS:.0%}. irl.target_ess, irl.temper below 1 or other irl.weights make them more even. This is "
            "said once; metrics.jsonl has prm/ess_fraction"
        )
    return texts
