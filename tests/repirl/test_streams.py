"""Streams of the present learners: written before an update that reads them, and again when a learner has changed."""

import torch
from tiny import tiny_config

from repirl.batch import pack
from repirl.streams import STREAM_OF, Scores
from repirl.work import PhaseTimer


class Fake:
    """A learner whose outputs are its version."""

    def __init__(self, *outputs):
        self.version, self.outputs, self.calls = 1, outputs, 0

    def score(self, batch):
        self.calls += 1
        return {name: torch.full((batch.num_response_tokens,), float(self.version)) for name in self.outputs}


def test_each_learner_writes_its_stream_once_a_version(tmp_path):
    learners = {"policy": Fake("logprob", "entropy"), "critic": Fake("value"), "prm": Fake("logprob")}
    config = tiny_config(tmp_path, prm={"reward": "logprob"})
    timer = PhaseTimer()
    scores, batch = Scores(config, learners, "critic", timer), pack([([3], [4, 1])])
    for _ in range(2):
        scores.write(batch, ("policy", "critic", "prm"))
    assert all(batch.read(stream).tolist() == [1, 1] for stream in STREAM_OF.values())
    learners["critic"].version = 5
    scores.write(batch, ("policy", "critic"))
    assert batch.read("state_value").tolist() == [5, 5]
    assert {name: learner.calls for name, learner in learners.items()} == {"policy": 1, "critic": 2, "prm": 1}
    # What is computed for a learner's own update counts as that.
    phases = {name for name in timer.step_metrics() if name.startswith("seconds/")}
    assert phases == {"seconds/critic", "seconds/logprob", "seconds/reward", "seconds/step"}


def test_nothing_is_written_that_is_not_read(tmp_path):
    batch = pack([([3], [4, 1])])
    Scores(tiny_config(tmp_path), {"policy": Fake("logprob")}, "policy", PhaseTimer()).write(batch, ())
    assert not batch.streams
