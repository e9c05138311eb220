"""What is told of each turn of a run, and may end it (`repirl.loop.train(config, callbacks=[...])`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from repirl.config import Config, ConfigError
from repirl.distributed.world import World
from repirl.report.log import read_metrics


class Callback:
    """Told of each turn when it is done and logged, and before it is saved. Whoever is interested overrides methods.

    With torchrun every process has callbacks of its own, with the same metrics.
    """

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The run begins, or goes on.

        Args:
            records: the lines of metrics.jsonl so far (`repirl.read_metrics`), with `step`; of a new run that of the
                evaluation before the first turn, if there is one. So a callback needs no file of its own to go on.
        """

    def after_turn(self, turn: int, metrics: Mapping[str, float]) -> bool:
        """Look at a turn.

        Args:
            turn: the number of turns that are done, with those before a checkpoint that the run went on from.
            metrics: the line of metrics.jsonl, by name; `eval/...` are there in turns with an evaluation.

        Returns:
            Whether the run ends with this turn. Its checkpoint is then saved as the last turn's is.
        """
        return False

    def after_evaluation(self, turn: int, metrics: Mapping[str, float]) -> bool:
        """Look at a turn with an evaluation, after `after_turn`, and with the same arguments and result."""
        return False


Callbacks: TypeAlias = Sequence[Callback]


class EarlyStopping(Callback):
    """Ends a run whose held-out figure does not get better any more.

    `checkpoint.keep_best: 1` keeps the checkpoint of the best accuracy beside the newest ones.

    Args:
        metric: its name in metrics.jsonl.
        patience: evaluations in a row without an improvement that end the run, at least 1.
        min_delta: what counts as an improvement over the best value so far: more than this.
        mode: "max" where higher is better, "min" where lower is.

    Raises:
        ValueError: patience is below 1, min_delta negative, or mode another word.
    """

    def __init__(
        self,
        metric: str = "eval/accuracy",
        *,
        patience: int = 5,
        min_delta: float = 0.0,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience is {patience}, expected at least 1")
        if min_delta < 0:
            raise ValueError(f"min_delta is {min_delta}, expected 0 or more")
        if mode not in ("max", "min"):
            raise ValueError(f"mode is {mode!r}, expected 'max' or 'min'")
        self.metric, self.patience, self.min_delta, self.mode = metric, patience, min_delta, mode
        self.best: float | None = None
        self.best_turn = self.since_best = 0

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError where nothing is evaluated, or an evaluation has no such figure."""
        self.best, self.best_turn, self.since_best = None, 0, 0
        if not records:
            raise ConfigError(
                f"the run is to be stopped by {self.metric!r}, but it evaluates nothing: set data.eval and eval.every"
            )
        for record in records:
            if _evaluations(record):
                self._look(record["step"], record)

    def after_evaluation(self, turn: int, metrics: Mapping[str, float]) -> bool:
        """Raises ConfigError where an evaluation has no such figure."""
        self._look(turn, metrics)
        return self.since_best >= self.patience

    def _look(self, turn: int, metrics: Mapping[str, Any]) -> None:
        if self.metric not in metrics:
            named = ", ".join(_evaluations(metrics))
            raise ConfigError(f"turn {turn} has no {self.metric!r} to stop by; its evaluation has {named}")
        value = metrics[self.metric]
        # What is not finite stands in metrics.jsonl as null.
        is_finite = value is not None and math.isfinite(value)
        if is_finite and (self.best is None or self._gain(value) > self.min_delta):
            self.best, self.best_turn, self.since_best = value, turn, 0
        else:
            self.since_best += 1

    def _gain(self, value: float | None) -> float:
        assert value is not None
        assert self.best is not None
        return value - self.best if self.mode == "max" else self.best - value


def _evaluations(metrics: Mapping[str, Any]) -> list[str]:
    """The names of held-out figures of a turn."""
    return sorted(name for name in metrics if name.startswith("eval/"))


def begin(callbacks: Callbacks, config: Config) -> None:
    """Tell callbacks that the run begins, or goes on."""
    records = read_metrics(Path(config.output_dir) / "metrics.jsonl") if callbacks else []
    for callback in callbacks:
        callback.begin(records)


def any_stops(callbacks: Callbacks, turn: int, metrics: Mapping[str, float], world: World) -> bool:
    """Whether a callback ends the run, on any process; all of them are told."""
    answers = [bool(callback.after_turn(turn, dict(metrics))) for callback in callbacks]
    if _evaluations(metrics):
        answers += [bool(callback.after_evaluation(turn, dict(metrics))) for callback in callbacks]
    return any(world.gather(answers))
