"""A run's log and display behind one object."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from repirl.config import Config
from repirl.distributed.world import World
from repirl.report.display import ProgressDisplay
from repirl.report.history import HistoryFile
from repirl.report.log import LogError, MetricsLogger
from repirl.report.samples import SampleFiles, as_texts


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
        self._files: tuple[SampleFiles, HistoryFile] | None = None
        self.samples: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []

        def open_log() -> None:
            self._logger = MetricsLogger(config.output_dir, tensorboard=config.log.tensorboard, start_step=start_step)
            self._files = (
                SampleFiles(config.output_dir, max_mb=config.log.samples_max_mb, start_step=start_step),
                HistoryFile(config.output_dir, start_step=start_step),
            )
            self._display = ProgressDisplay(config.steps, config.objective)

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
            self.samples.clear()
            self.history.clear()

        self._on_main(write)
        if self._display and step:
            self._display.update(step, metrics)

    def __enter__(self) -> Reporter:
        for part in (self._logger, self._display):
            if part:
                self._stack.enter_context(part)
        for file in self._files or ():
            self._stack.callback(file.close)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
