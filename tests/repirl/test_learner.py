"""The host waits for the device as often for many micro-batches as for one."""

from collections import Counter

import pytest
import torch
from shared import CPU
from tiny import make_model
from torch import Tensor

from repirl.batch import pack
from repirl.learner import Learner
from repirl.models import load_model
from repirl.options import OptimizerConfig

PAIRS = [([3, 4], [5, 6, 7, 1]), ([8], [9, 1]), ([3] * 5, [4] * 9), ([4, 4], [5])]


class Weighted:
    """A loss with one figure."""

    def loss(self, outputs, micro):
        logprob = outputs["logprob"]
        return -logprob.sum(), {"logprob": (logprob.detach().sum(), len(logprob))}


@pytest.fixture
def reads(monkeypatch):
    """Counts how outputs, losses and norms are read. Lengths of the batch, which stays on the CPU, are other calls."""
    counts = Counter()

    def counted(name):
        original = getattr(Tensor, name)

        def call(self, *arguments, **options):
            counts[name] += 1
            return original(self, *arguments, **options)

        return call

    for name in ("item", "tolist", "cpu", "numpy", "__float__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    return counts


def learner(path, budget):
    model = load_model(str(path), kind="causal", dtype=torch.float32, device=CPU)
    return Learner(model, OptimizerConfig(lr=1e-3), num_updates=1, tokens_per_microbatch=budget)


def test_reads_of_the_device_do_not_grow_with_the_micro_batches(tmp_path, reads):
    path = make_model(tmp_path / "m")
    batch = pack(PAIRS)
    counts = {}
    for budget in (1000, 7):
        ours = learner(path, budget)
        for task in (lambda ours=ours: ours.score(batch), lambda ours=ours: ours.update(batch, Weighted())):
            reads.clear()
            task()
            counts.setdefault(budget, []).append(dict(reads))
    assert counts[1000] == counts[7]
    assert sum(counts[7][1].values()) > 0
