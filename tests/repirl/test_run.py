"""What a run holds beside its learners: the reference, and what it says of a batch."""

import torch

from repirl.batch import concatenate, pack
from repirl.streams import Reference


class Asked:
    """A frozen learner: the log-probability of a token is minus its id. Keeps the batches that it was asked for."""

    temperature = 1.0

    def __init__(self):
        self.batches = []

    def score(self, batch, temperature=None):
        self.batches.append(batch)
        return {"logprob": -batch.response_ids.float()}


def test_only_sequences_without_the_references_word_are_asked_for():
    learner = Asked()
    rollouts, experts = pack([([3], [4, 1]), ([3], [5, 1])]), pack([([3], [6, 7, 1])])
    rollouts.write("ref_logprob", torch.tensor([-0.5, -0.5, -0.25, -0.25]))
    batch = concatenate([rollouts.select([1]), experts, rollouts.select([0])])
    reference = Reference(learner, prm_temperature=None)
    reference.complete(batch)
    assert batch.read("ref_logprob").tolist() == [-0.25, -0.25, -6, -7, -1, -0.5, -0.5]
    assert [asked.response_ids.tolist() for asked in learner.batches] == [[6, 7, 1]]
    # Then there is nothing left to ask.
    reference.complete(batch)
    assert len(learner.batches) == 1
    # A batch of a file has no such stream yet.
    reference.complete(experts)
    assert experts.read("ref_logprob").tolist() == [-6, -7, -1]
