"""A run's log and display behind one object."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from repirl.config import Config
from repirl.distributed.world import World
from repirl.report.display import ProgressDisplay
from repirl.report.log import MetricsLogger


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
