"""Callbacks of a run: what they are told, and how they end it."""

from pathlib import Path

import pytest
from tiny import tiny_config

from repirl.callbacks import any_stops
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.loop import train
from repirl.report.log import read_metrics


class Recorder:
    """Keeps what it is told, and ends the run after a turn."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.told = last, []

    def after_turn(self, turn, metrics):
        self.told.append((turn, dict(metrics)))
        metrics.clear()
        return turn == self.last


@pytest.mark.parametrize("objective", ["repirl", "sft"])
def test_a_callback_is_told_of_each_turn_and_ends_the_run(tmp_path, objective):
    config = tiny_config(tmp_path, objective=objective, steps=6, checkpoint={"every": 4})
    ending, other = Recorder(last=3), Recorder()
    assert train(config, callbacks=[ending, other]) == 3
    log = [line for line in read_metrics(Path(config.output_dir) / "metrics.jsonl") if line["step"]]
    assert [line["step"] for line in log] == [1, 2, 3]
    # Each gets the whole line, whatever others do with theirs.
    for recorder in (ending, other):
        assert [turn for turn, _ in recorder.told] == [1, 2, 3]
        for (_, metrics), line in zip(recorder.told, log, strict=True):
            assert metrics == {name: line[name] for name in metrics}
            assert "policy/grad_norm" in metrics
    assert "eval/accuracy" in other.told[1][1]
    # The turn that ends the run is saved, though it is no multiple of checkpoint.every.
    assert resolve_checkpoint(config.output_dir).name == "step_3"
    # A run that goes on counts on.
    again = Recorder()
    assert train(config, resume=True, callbacks=[again]) == 6
    assert [turn for turn, _ in again.told] == [4, 5, 6]


def test_one_process_ends_the_run_for_all():
    class World:
        def gather(self, items):
            return [*items, True]

    recorder = Recorder()
    assert any_stops([recorder], 1, {}, World())
    assert not any_stops([], 1, {}, type("Alone", (), {"gather": lambda self, items: list(items)})())
