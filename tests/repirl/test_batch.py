"""PackedBatch: selection, streams and micro-batches keep every token where it belongs."""

import pytest
import torch

from repirl.batch import EXPERT, POLICY, concatenate, pack

PAIRS = [([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9, 10], [11, 12]), ([13], [])]


def make():
    return pack(PAIRS, group_ids=[0, 0, 1, 1], streams={"x": [[0.3, 0.4, 0.5], [0.7], [1.1, 1.2], []]})


def test_pack_lays_sequences_end_to_end():
    batch = make()
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 12, 13]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 0]
    assert batch.response_ids.tolist() == [3, 4, 5, 7, 11, 12]
    assert batch.response_cu_seqlens.tolist() == [0, 3, 4, 6, 6]
    torch.testing.assert_close(batch.read("x"), torch.tensor([0.3, 0.4, 0.5, 0.7, 1.1, 1.2]))
    assert float(batch.streams["x"][0]) == 0.0


def test_select_keeps_order_and_streams():
    chosen = make().select([2, 0])
    assert chosen.token_ids.tolist() == [8, 9, 10, 11, 12, 1, 2, 3, 4, 5]
    torch.testing.assert_close(chosen.read("x"), torch.tensor([1.1, 1.2, 0.3, 0.4, 0.5]))
    assert chosen.group_ids.tolist() == [1, 0]
    assert make().select(torch.tensor([False, True, False, False])).token_ids.tolist() == [6, 7]
    assert make().select([]).num_tokens == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [1, 6, 100])
def test_microbatches_hold_every_sequence_once_within_the_budget(budget, num_ranks):
    batch = make()
    dealt = batch.microbatches(budget, num_ranks)
    assert len(dealt) == num_ranks
    # As many for every rank: sharded models run them together.
    assert len({len(mine) for mine in dealt}) == 1
    groups = [group for mine in dealt for group in mine]
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3]
    # A sequence over the budget stands alone, and none is dropped.
    assert all(len(group) == 1 or sum(int(batch.lengths[i]) for i in group) <= budget for group in groups if group)


def test_microbatches_spread_cost_evenly():
    lengths = torch.randint(2, 400, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = pack([([1], [2] * (n - 1)) for n in lengths])
    costs = [n + n * n / 100 for n in lengths]
    dealt = batch.microbatches(4000, 4, costs)
    loads = [[sum(costs[i] for i in group) for group in mine] for mine in dealt]
    by_rank = [sum(mine) for mine in loads]
    assert max(by_rank) < 1.02 * min(by_rank)
    # What runs at a time on all ranks costs about the same, too.
    for together in zip(*loads, strict=True):
        assert max(together) < 1.1 * min(together)


def test_an_empty_batch_has_no_microbatches():
    assert make().select([]).microbatches(10, 2) == [[], []]


def test_response_positions_point_into_the_response_tensor():
    batch = make()
    for group in batch.microbatches(6)[0]:
        micro = batch.select(group)
        torch.testing.assert_close(micro.read("x"), batch.read("x")[batch.response_positions(group)])


def test_concatenate_keeps_all_streams_and_marks_what_is_missing():
    first, second = make(), make()
    first.write("only", torch.zeros(first.num_response_tokens))
    second.source.fill_(EXPERT)
    both = concatenate([first, second])
    assert both.cu_seqlens.tolist() == [0, 5, 7, 12, 13, 18, 20, 25, 26]
    assert set(both.streams) == {"only", "x"}
    assert both.source.tolist() == [POLICY] * 4 + [EXPERT] * 4
    torch.testing.assert_close(both.read("x"), torch.cat([first.read("x"), second.read("x")]))
    # Prompt tokens, too: nothing of a stream that was never written looks like a number.
    assert both.streams["only"].isnan().tolist() == [False] * 13 + [True] * 13
    # Which of them lacks it does not matter, and it travels on.
    chosen = concatenate([second, first, second]).select([0, 4])
    assert chosen.read("only").isnan().tolist() == [True] * 3 + [False] * 3
    torch.testing.assert_close(chosen.read("x"), torch.cat([first.read("x")[:3]] * 2))


def test_errors_name_what_is_wrong():
    batch = make()
    with pytest.raises(KeyError, match=r"'reward'.*'x'"):
        batch.read("reward")
    with pytest.raises(ValueError, match=r"6 response tokens, got shape \(5,\)"):
        batch.write("reward", torch.zeros(5))
    with pytest.raises(ValueError, match="at least one token"):
        pack([([], [1])])
