"""The planned micro-batches are the trainer's."""

import itertools

import pytest
from plan_cases import configured, phases

from repirl.batch import pack
from repirl.plan.batches import Sequences, _micro_batches, of_data, trained_on
from repirl.plan.plan import plan


def test_micro_batches_are_the_trainers():
    sequences, budget, ranks = ((5, 3, 7), (9, 3, 4)), 24, 2
    batch = pack([([1] * p, [1] * r) for count, p, r in sequences for _ in range(count)])
    for place, micro in enumerate(_micro_batches(sequences, budget, ranks, (1, 0, 0))):
        mine = batch.microbatches(budget, ranks)[0][place]
        assert micro.tokens == int(batch.lengths[mine].sum()) <= budget
        assert micro.responses == micro.tokens - 3 * len(mine)


@pytest.mark.parametrize("ranks", [1, 3])
def test_sequences_longer_than_a_micro_batch_have_one_each(tmp_path, ranks):
    # 64 rollouts of 256 tokens make 64 micro-batches, whatever the budget that they exceed.
    batch = pack([([1] * 64, [1] * 192)] * 64)
    dealt = batch.microbatches(100, ranks)
    assert sum(len(mine) for mine in dealt) == -(-64 // ranks) * ranks
    assert sum(map(bool, itertools.chain(*dealt))) == 64
    short = plan(configured(tmp_path, batch={"tokens_per_microbatch": 100}), ranks)
    exact = plan(configured(tmp_path, batch={"tokens_per_microbatch": 256}), ranks)
    assert phases(short)["policy"].rows == phases(exact)["policy"].rows


def test_offline_systems_have_their_own_batches(tmp_path):
    """Pairs are two sequences each; fixed rollouts are as many as a turn's; a critic is a learner like others."""
    data = {"train": None, "solution_column": None}
    pairs = configured(tmp_path, objective="dpo", data=data | {"pairs": "missing.jsonl"}, dpo={"pairs_per_step": 10})
    assert of_data(pairs) == trained_on(pairs, "policy") == (Sequences(20, 64, 192),)
    fixed = configured(tmp_path, objective="dqo", data=data | {"trajectories": "missing.jsonl"})
    assert of_data(fixed) == trained_on(fixed, "critic") == trained_on(fixed, "policy") == (Sequences(64, 64, 192),)
    names = [phase.name for phase in plan(fixed).phases]
    assert names == ["load", "reference", "logprob", "critic", "state_value", "policy", "checkpoint"]
    # Both are trained, so that both have moments throughout; the critic's head is the larger by one row and its bias.
    rows = phases(plan(fixed))["policy"].rows
    assert rows["critic moments"] - rows["policy moments"] == 2 * 4 * (512 + 1)
