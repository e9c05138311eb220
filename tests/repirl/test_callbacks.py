"""Callbacks of a run: what they are told, and how they end it."""

import math
from pathlib import Path

import pytest
from tiny import tiny_config

from repirl.callbacks import Callback, EarlyStopping, any_stops
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import ConfigError
from repirl.loop import train
from repirl.report.log import read_metrics


class Recorder(Callback):
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


class Evaluations(Callback):
    """Keeps the turns of evaluations, and ends the run after one."""

    def __init__(self, last=None):
        self.last, self.turns, self.records = last, [], None

    def begin(self, records):
        self.records = [(record["step"], record.get("eval/accuracy")) for record in records]

    def after_evaluation(self, turn, metrics):
        assert "eval/accuracy" in metrics
        self.turns.append(turn)
        return turn == self.last


def test_evaluations_are_told_and_what_was_before_a_resumed_run(tmp_path):
    config = tiny_config(tmp_path, objective="sft", steps=4)
    first, again = Evaluations(last=2), Evaluations()
    assert train(config, callbacks=[first]) == 2
    assert [step for step, _ in first.records] == [0]
    assert first.turns == [2]
    assert train(config, resume=True, callbacks=[again]) == 4
    assert [step for step, _ in again.records] == [0, 1, 2]
    assert again.records[1][1] is None
    assert again.turns == [4]


def stops(stopping, values):
    """The first of these evaluations, counted from 1, that ends the run."""
    stopping.begin([{"step": 0, stopping.metric: None}])
    stopping.since_best = 0
    for turn, value in enumerate(values, 1):
        if stopping.after_evaluation(turn, {stopping.metric: value}):
            return turn
    return None


def test_early_stopping_waits_for_improvements():
    assert stops(EarlyStopping(patience=2), [0.1, 0.3, 0.3, 0.2]) == 4
    assert stops(EarlyStopping(patience=2), [0.1, 0.0, 0.2, 0.1, 0.3]) is None
    assert stops(EarlyStopping(patience=1, min_delta=0.05), [0.1, 0.14]) == 2
    assert stops(EarlyStopping("eval/loss", patience=2, mode="min"), [3.0, 2.0, 2.5, 1.0, 1.0, math.nan]) == 6
    assert stops(EarlyStopping(patience=3), [math.nan, math.nan, math.nan]) == 3


def test_early_stopping_goes_on_from_the_log():
    stopping = EarlyStopping(patience=2)
    stopping.begin([{"step": 0, "eval/accuracy": 0.5}, {"step": 1}, {"step": 2, "eval/accuracy": 0.4}])
    assert (stopping.best, stopping.best_turn, stopping.since_best) == (0.5, 0, 1)
    assert stopping.after_evaluation(4, {"eval/accuracy": 0.5})


def test_early_stopping_says_what_is_wrong():
    with pytest.raises(ConfigError, match=r"turn 3 has no 'eval/f1' to stop by; its evaluation has eval/accuracy"):
        EarlyStopping("eval/f1").after_evaluation(3, {"eval/accuracy": 0.5, "policy/loss": 1.0})
    with pytest.raises(ConfigError, match=r"evaluates nothing: set data\.eval and eval\.every"):
        EarlyStopping().begin([])
    with pytest.raises(ValueError, match="patience is 0, expected at least 1"):
        EarlyStopping(patience=0)
    with pytest.raises(ValueError, match="mode is 'up', expected 'max' or 'min'"):
        EarlyStopping(mode="up")
