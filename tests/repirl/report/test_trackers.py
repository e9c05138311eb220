"""Trackers: what they are given, that a resumed run goes on in them, and that none of them can end a run."""

import json
import logging
import math
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config, tiny_values

from repirl.configfile import build_config, merge
from repirl.loop import train
from repirl.report.log import read_metrics
from repirl.report.samples import read_samples
from repirl.report.trackers import SAMPLE_COLUMNS, Trackers

RECORD = {"version": "1", "machine": {"cores": 2}, "packages": {"torch": "2"}, "configuration": {"seed": 0}}


class Fake:
    """Stands in for one of accelerate's trackers; `fails`: the methods that raise."""

    made: ClassVar[list["Fake"]] = []
    fails: tuple[str, ...] = ()

    def __init__(self, project, **options):
        self.project, self.options, self.calls = project, options, []
        self.tracker = SimpleNamespace(id=options.get("id") or f"id{len(Fake.made)}")
        Fake.made.append(self)

    def _do(self, name, *content):
        if name in Fake.fails:
            raise ConnectionError("no route to host\nmore")
        self.calls.append((name, *content))

    def start(self):
        self._do("start")

    def store_init_configuration(self, values):
        self._do("values", values)

    def log(self, values, step=None):
        self._do("log", step, values)

    def log_table(self, name, columns, data, step):
        self._do("table", step, name, columns, data)

    def finish(self):
        self._do("finish")

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def fake(monkeypatch):
    """A W&B that records what it is told."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__=SimpleNamespace()))
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails", ())
    return Fake


def tracked(folder, **changes):
    return tiny_config(folder, **merge({"log": {"trackers": ["wandb"], "project": "mine"}}, changes))


def test_a_run_tells_its_tracker_of_everything_and_goes_on_in_it(tmp_path, fake):
    assert train(tracked(tmp_path, steps=2)) == 2
    [tracker] = fake.made
    assert tracker.project == "mine"
    assert tracker.options["name"] == "run"
    [(values,)] = tracker.of("values")
    assert values["config.rollout.prompts_per_step"] == 3
    assert values["run.packages.torch"]
    assert "run.configuration.seed" not in values
    assert not any(isinstance(value, dict | list) for value in values.values())
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in tracker.of("log")] == [0, 1, 2]
    for (_, told), line in zip(tracker.of("log"), log, strict=True):
        assert told == {name: line[name] for name in told}
        assert {"seconds/step"} <= set(told)
    rows = [row for _, _, columns, data in tracker.of("table") for row in data]
    samples = read_samples(tmp_path / "run")
    assert len(rows) == len(samples) > 0
    assert rows[0][SAMPLE_COLUMNS.index("response")] == samples[0]["response"]
    assert tracker.calls[-1] == ("finish",)
    assert train(tracked(tmp_path, steps=3), resume=True) == 3
    assert fake.made[1].options["id"] == fake.made[0].tracker.id
    assert fake.made[1].options["resume"] == "allow"
    assert [step for step, _ in fake.made[1].of("log")] == [3]


@pytest.mark.parametrize("method", ["start", "values", "log", "table", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, fake, monkeypatch, caplog, method):
    monkeypatch.setattr(fake, "fails", (method,))
    trackers = Trackers(tracked(tmp_path), RECORD, 0)
    row = {"step": 1, "kind": "train", "token_rewards": [1.0, None, 2.0]}
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            trackers.log(step, {"policy/loss": 0.5, "prm/loss": math.nan}, [row])
        trackers.close()
    [warning] = [r.getMessage() for r in caplog.records if "wandb" in r.getMessage()]
    assert "wandb fails (ConnectionError: no route to host): the run goes on without it" in warning
    if method == "finish":
        assert fake.made[0].of("log") == [(step, {"policy/loss": 0.5}) for step in (1, 2, 3)]
        assert fake.made[0].of("table")[0][3] == [[1, "train", None, None, None, None, None, None, 1.5]]


def test_one_that_is_not_installed_is_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("repirl.report.trackers.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        Trackers(tracked(tmp_path, log={"trackers": ["wandb", "mlflow"]}), RECORD, 0).log(1, {"a": 1.0})
    messages = [record.getMessage() for record in caplog.records]
    assert any("mlflow is not installed (pip install mlflow): the run goes on without it" in m for m in messages)
    assert len(messages) == 2


def test_tensorboard_is_one_of_them(tmp_path):
    values = tiny_values(tmp_path, objective="sft", steps=1, log={"tensorboard": False, "trackers": ["tensorboard"]})
    assert train(build_config(values)) == 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    [line] = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    assert events.Scalars("policy/loss")[-1].value == pytest.approx(line["policy/loss"], rel=1e-5)
    assert not (tmp_path / "run" / "trackers.json").exists()


def test_damaged_ids_begin_a_new_run_in_the_tracker(tmp_path, fake):
    config = tracked(tmp_path)
    (tmp_path / "run").mkdir()
    Trackers(config, RECORD, 0)
    ids = tmp_path / "run" / "trackers.json"
    assert json.loads(ids.read_text()) == {"wandb": "id0"}
    ids.write_text("{")
    Trackers(config, RECORD, 2)
    assert fake.made[1].options["id"] is None


class ThroughTensorBoard(tracking.TensorBoardTracker):
    """accelerate's own tracker of TensorBoard, in the place of W&B's."""

    def __init__(self, project, *, dir, **_):
        super().__init__(project, f"{dir}/accelerate")

    @property
    def tracker(self):
        return SimpleNamespace(id="id")

    def log_table(self, name, *, columns, data, step):
        self.log({name: str(dict(zip(columns, data[0], strict=True)))}, step=step)


def test_accelerates_classes_need_no_state_of_accelerate(tmp_path, fake, monkeypatch, caplog):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", ThroughTensorBoard)
    trackers = Trackers(tracked(tmp_path), RECORD, 0)
    trackers.log(1, {"policy/loss": 0.5, "prm/loss": math.inf}, [{"step": 1, "response": "3 + 4 = 7"}])
    trackers.close()
    assert not caplog.records
    events = EventAccumulator(str(tmp_path / "run" / "accelerate" / "mine"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [(1, 0.5)]
    assert "prm/loss" not in events.Tags()["scalars"]
    assert "samples/text_summary" in events.Tags()["tensors"]
    [values] = (tmp_path / "run" / "accelerate" / "mine").glob("*/hparams.yml")
    assert "run.packages.torch: '2'" in values.read_text()
