"""What is told of each turn of a run, and may end it (`repirl.loop.train(config, callbacks=[...])`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from repirl.distributed.world import World


class Callback(Protocol):
    """Told of each turn when it is done and logged, and before it is saved."""

    def after_turn(self, turn: int, metrics: Mapping[str, float]) -> bool:
        """Look at a turn. With torchrun all processes call this.

        Args:
            turn: the number of turns that are done, with those before a checkpoint that the run went on from.
            metrics: the line of metrics.jsonl, by name; `eval/...` are there in turns with an evaluation.

        Returns:
            Whether the run ends with this turn. Its checkpoint is then saved as the last turn's is.
        """
        ...


Callbacks: TypeAlias = Sequence[Callback]


def any_stops(callbacks: Callbacks, turn: int, metrics: Mapping[str, float], world: World) -> bool:
    """Whether a callback ends the run, on any process; all of them are told."""
    answers = [bool(callback.after_turn(turn, dict(metrics))) for callback in callbacks]
    return any(world.gather(answers))
