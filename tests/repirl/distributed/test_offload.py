"""The order in which idle models move on a GPU, with streams that only write down what is asked of them."""

import copy
from contextlib import contextmanager

import pytest
import torch
from shared import CPU
from tiny import make_model, objective

from repirl.batch import pack
from repirl.distributed.offload import Parked, Residency
from repirl.learner import Learner
from repirl.models import load_model
from repirl.options import OptimizerConfig


class Stream:
    def __init__(self, log, name):
        self.log, self.name, self.num_events = log, name, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.num_events += 1
        return f"event {self.num_events} of {self.name}"


class Streams:
    """As offload.Streams; `log` also gets what `Parked` does, with the stream on which it does so."""

    def __init__(self, monkeypatch):
        self.log = []
        self.leaving, self.coming, self.computing = (
            Stream(self.log, name) for name in ("leaving", "coming", "computing")
        )
        self.current = self.computing
        for name, said in {"__init__": "copy away", "empty": "empty", "make_room": "room", "fill": "fill"}.items():
            plain = getattr(Parked, name)

            def noted(part, *arguments, plain=plain, said=said):
                self.log.append(f"{said} on {self.current.name}")
                return plain(part, *arguments)

            monkeypatch.setattr(Parked, name, noted)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def keep_until_done(self, _, stream):
        self.log.append(f"keep for {stream.name}")

    def taken(self):
        """What was asked since the last call, each run of equal lines once."""
        lines = [line for i, line in enumerate(self.log) if i == 0 or line != self.log[i - 1]]
        self.log.clear()
        return lines


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr("repirl.distributed.offload._SMALLEST_BYTES", 0)
    return Streams(monkeypatch)


def residency_of(tmp_path, streams, *, num_frozen=0):
    path = make_model(tmp_path / "model")
    residency = Residency(tmp_path / "away")
    residency._streams = streams
    learners = []
    for i in range(2):
        model = load_model(str(path), kind="causal", dtype=torch.float32, device=CPU)
        options = None if i < num_frozen else OptimizerConfig(lr=1e-2)
        learners.append(Learner(model, options, tokens_per_microbatch=99))
        residency.add(learners[-1])
    streams.taken()
    return residency, *learners


def batch():
    result = pack([([3, 4, 5], [6, 7, 8, 9, 10, 1]), ([9], [10, 1])])
    result.write("weight", torch.linspace(-1, 1, result.num_response_tokens))
    return result


def loss(outputs, micro):
    return (outputs["logprob"] * micro.read("weight")).sum()


LEAVE = ["leaving waits for computing", "copy away on leaving", "keep for leaving"]
COME = ["room on computing", "coming waits for computing"]


def test_a_model_leaves_beside_what_computes_and_comes_before_it(tmp_path, streams):
    _, first, second = residency_of(tmp_path, streams)
    first.update(batch(), objective(loss))
    assert streams.taken() == [
        *COME,
        "coming waits for event 1 of leaving",
        "fill on coming",
        "computing waits for coming",
    ]
    # Its weights and its moments leave; nothing waits for them but their own way back.
    second.score(batch())
    assert streams.taken() == [
        *[*LEAVE, "empty on computing"] * 2,
        *[*COME, "coming waits for event 2 of leaving", "fill on coming", "computing waits for coming"],
    ]
    first.score(batch())
    # The second has not changed: nothing is copied. The first's moments stay away.
    assert streams.taken() == [
        "empty on computing",
        *[*COME, "coming waits for event 3 of leaving", "fill on coming", "computing waits for coming"],
    ]
    first.update(batch(), objective(loss))
    assert streams.taken() == [
        *COME,
        "coming waits for event 4 of leaving",
        "fill on coming",
        "computing waits for coming",
    ]


def test_a_frozen_model_is_copied_once(tmp_path, streams):
    _, frozen, trained = residency_of(tmp_path, streams, num_frozen=1)
    expected = frozen.score(batch())["logprob"]
    trained.update(batch(), objective(loss))
    frozen.score(batch())
    streams.taken()
    trained.score(batch())
    assert "copy away on leaving" not in streams.taken()
    # Other weights are copied again.
    frozen.load_model_state({name: value + 0.01 for name, value in frozen.model_state().items()})
    changed = frozen.score(batch())["logprob"]
    assert not torch.equal(changed, expected)
    trained.score(batch())
    assert "copy away on leaving" in streams.taken()
    assert torch.equal(frozen.score(batch())["logprob"], changed)


def test_numbers_are_those_of_models_that_stay(tmp_path, streams):
    residency, first, second = residency_of(tmp_path, streams)
    path = str(tmp_path / "model")
    plain = [
        Learner(
            load_model(path, kind="causal", dtype=torch.float32, device=CPU),
            OptimizerConfig(lr=1e-2),
            tokens_per_microbatch=99,
        )
        for _ in range(2)
    ]
    for ours, theirs in zip((first, second), plain, strict=True):
        for learner in (ours, theirs):
            learner.update(batch(), objective(loss))
    for ours, theirs in zip((first, second), plain, strict=True):
        assert torch.equal(ours.score(batch())["logprob"], theirs.score(batch())["logprob"])
        state, expected = ours.state_dict(), theirs.state_dict()
        for name, moments in expected["optimizer"]["state"].items():
            assert all(torch.equal(state["optimizer"]["state"][name][key], value) for key, value in moments.items())
        # Loaded moments are those very tensors.
        ours.load_state_dict(copy.deepcopy(expected))
        ours.update(batch(), objective(loss))
        theirs.update(batch(), objective(loss))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours.weights(), theirs.weights(), strict=True))
    residency.close()
