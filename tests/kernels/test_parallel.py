"""Vocabulary-parallel ``linear_token_stats``: 2 and 3 ranks against one process.

Every case runs on all ranks of a gloo group. Statistics and dH must be the same bits on all of them; the gradients of
the shards, put together, are compared like any backend's: at most twice as wrong as plain PyTorch on the whole.
"""

import itertools
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from kernel_checks import (
    LinearCase,
    Outcome,
    assert_outcome,
    in_float64,
    linear_case,
    needs_interpreter,
    plain_linear,
    poisoned_memory,
    run_linear,
)
from rank_processes import RankProcesses, rank_processes
from repirl_kernels import linear_token_stats, native
from repirl_kernels.operands import Options
from repirl_kernels.rows import RowStats
from torch.utils.checkpoint import checkpoint

NUM_COLUMNS = 97
# Columns of each rank: uneven, an empty shard at each place, a single column.
SHARDS = [(60, 37), (0, 97), (97, 0), (1, 96), (40, 30, 27), (33, 0, 64), (0, 1, 96), (90, 7, 0)]
needs_native = pytest.mark.skipif(not native.is_available(), reason="not built")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


@pytest.fixture(scope="module")
def ranks():
    with rank_processes() as processes:
        yield processes


def own_shard(group: dist.ProcessGroup, case: LinearCase, sizes: tuple[int, ...]) -> LinearCase:
    """The case as this rank has it: its rows of weight and bias."""
    rank = group.rank()
    weight = case.weight.split(sizes)[rank]
    bias = None if case.bias is None else case.bias.split(sizes)[rank]
    return case._replace(weight=weight, bias=bias, options=case.options | {"tp_group": group})


def run_shard(group: dist.ProcessGroup, case: LinearCase, sizes: tuple[int, ...]) -> Outcome:
    """On a rank: statistics and gradients, on poisoned memory."""
    with poisoned_memory():
        return run_linear(linear_token_stats, own_shard(group, case, sizes))


def whole(outcomes: list[Outcome]) -> Outcome:
    """The outcome of all ranks together, after a check that they agree."""
    first = outcomes[0]
    for other in outcomes[1:]:
        assert torch.equal(first.stats.nan_to_num(7e9), other.stats.nan_to_num(7e9))
        assert torch.equal(first.dhidden.nan_to_num(7e9), other.dhidden.nan_to_num(7e9))
    dbias = None if first.dbias is None else torch.cat([outcome.dbias for outcome in outcomes])
    return first._replace(dweight=torch.cat([outcome.dweight for outcome in outcomes]), dbias=dbias)


def run_parallel(ranks: RankProcesses, case: LinearCase, sizes: tuple[int, ...]) -> Outcome:
    assert sum(sizes) == case.weight.shape[0]
    return whole(ranks.run(len(sizes), run_shard, case, sizes))


def check_parallel(ranks: RankProcesses, case: LinearCase, sizes: tuple[int, ...]) -> None:
    actual = run_parallel(ranks, case, sizes)
    plain = case._replace(options={name: value for name, value in case.options.items() if name != "backend"})
    assert_outcome(actual, run_linear(plain_linear, plain), run_linear(plain_linear, in_float64(plain)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SHARDS, ids=str)
def test_equals_one_process(ranks, sizes, dtype, backend):
    check_parallel(ranks, linear_case(9, NUM_COLUMNS, 16, dtype=dtype, bias=True, backend=backend), sizes)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(60, 37), (40, 0, 57)], ids=str)
def test_equals_one_process_in_tritons_interpreter(ranks, sizes, dtype):
    case = linear_case(9, NUM_COLUMNS, 16, dtype=dtype, bias=True, backend="triton", vocab_size=95)
    check_parallel(ranks, case, sizes)


def test_float64_has_float64s_precision(ranks):
    case = in_float64(linear_case(9, NUM_COLUMNS, 16, bias=True))
    actual = run_parallel(ranks, case, (40, 30, 27))
    for value, truth in zip(actual, run_linear(plain_linear, case), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(60, 37), (40, 0, 57), (30, 30, 37)], ids=str)
@pytest.mark.parametrize("vocab_size", [97, 80, 60, 3, 1])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_options_and_padding(ranks, sizes, vocab_size, softcap):
    # With vocab_size 60 and below, the last rank owns nothing but padding.
    case = linear_case(9, NUM_COLUMNS, 16, bias=True, temperature=0.7, softcap=softcap, vocab_size=vocab_size)
    check_parallel(ranks, case, sizes)
    case.weight[vocab_size:] = torch.nan
    case.bias[vocab_size:] = torch.nan
    outcome = run_parallel(ranks, case, sizes)
    assert bool(outcome.stats.isfinite().all())
    assert bool(outcome.dhidden.isfinite().all())
    assert not bool(outcome.dweight[vocab_size:].any())
    assert not bool(outcome.dbias[vocab_size:].any())


@pytest.mark.parametrize("sizes", [(60, 37), (20, 30, 47)], ids=str)
@pytest.mark.parametrize("owner", [0, 1])
def test_a_rank_that_owns_no_target(ranks, sizes, owner):
    case = linear_case(9, NUM_COLUMNS, 16)
    first = sum(sizes[:owner])
    check_parallel(ranks, case._replace(targets=first + case.targets % sizes[owner]), sizes)


@pytest.mark.parametrize("sizes", [(60, 37), (20, 30, 47)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_large_logits(ranks, sizes, scale, offset):
    case = linear_case(7, NUM_COLUMNS, 16)
    bias = torch.full((NUM_COLUMNS,), offset)
    check_parallel(ranks, case._replace(weight=case.weight * scale, bias=bias), sizes)


def test_shards_of_very_different_offsets(ranks):
    # All probability lies on one rank, with targets on all of them.
    for levels in itertools.permutations((-1e4, 0.0, 1e4)):
        case = linear_case(9, NUM_COLUMNS, 16)
        bias = torch.tensor(levels).repeat_interleave(torch.tensor([40, 30, 27]))
        check_parallel(ranks, case._replace(bias=bias), (40, 30, 27))


def test_precision_at_an_offset(ranks):
    # Exactly representable, so that the offset changes nothing but the representation.
    logits = torch.randint(-64, 64, (5, 50), generator=torch.Generator().manual_seed(0)) / 16.0
    upstream = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for offset in (0.0, 8192.0):
        case = LinearCase(torch.eye(5), logits.T, torch.full((50,), offset), torch.arange(0, 50, 10), upstream, {})
        outcomes.append(run_parallel(ranks, case, (20, 5, 25)))
    near, far = outcomes
    torch.testing.assert_close(far.stats[[0, 3]], near.stats[[0, 3]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(far.dweight, near.dweight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [[0], [1], [2], [3]])
def test_each_gradient_alone(ranks, outputs):
    case = linear_case(6, 60, 8, bias=True, temperature=0.8, softcap=4.0)
    upstream = torch.zeros(4, 6)
    upstream[outputs] = case.upstream[outputs]
    for sizes in ((25, 35), (25, 0, 35)):
        check_parallel(ranks, case._replace(upstream=upstream), sizes)


def test_rows_that_do_not_count(ranks):
    case = linear_case(9, NUM_COLUMNS, 16, bias=True)
    expected = run_parallel(ranks, case, (40, 30, 27))
    ignored = torch.tensor([1, 2, 7])
    kept = torch.tensor([0, 3, 4, 5, 6, 8])
    part = case._replace(hidden=case.hidden[kept], targets=case.targets[kept], upstream=case.upstream[:, kept])
    kept_alone = run_parallel(ranks, part, (40, 30, 27))
    case.hidden[ignored] = torch.nan
    case.targets[ignored[:2]] = 5
    case.targets[kept[case.targets[kept] == 5]] = 6
    mask = torch.ones(9, dtype=torch.bool)
    mask[7] = False
    outcome = run_parallel(ranks, case._replace(options={"ignore_index": 5, "row_mask": mask}), (40, 30, 27))
    assert not bool(outcome.stats[:, ignored].any())
    assert not bool(outcome.dhidden[ignored].any())
    torch.testing.assert_close(outcome.stats[:, kept], expected.stats[:, kept], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outcome.dweight, kept_alone.dweight, rtol=1e-5, atol=1e-6)
    # Rows without an upstream gradient go no further, whatever they hold.
    case.upstream[:, kept[:3]] = 0
    outcome = run_parallel(ranks, case._replace(options={"ignore_index": 5, "row_mask": mask}), (40, 30, 27))
    assert not bool(outcome.dhidden[kept[:3]].any())
    torch.testing.assert_close(outcome.dhidden[kept[3:]], expected.dhidden[kept[3:]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("how", ["ignored", "no upstream"])
def test_no_row_left(ranks, num_rows, how):
    case = linear_case(num_rows, NUM_COLUMNS, 16, bias=True)
    if how == "ignored":
        case = case._replace(hidden=torch.full((num_rows, 16), torch.nan), targets=torch.full((num_rows,), -100))
    else:
        case = case._replace(upstream=torch.zeros(4, num_rows))
    for sizes in ((60, 37), (97, 0, 0)):
        outcome = run_parallel(ranks, case, sizes)
        assert outcome.stats.shape == (4, num_rows)
        assert bool(outcome.stats.any()) == (how == "no upstream" and num_rows > 0)
        assert torch.equal(outcome.dhidden, torch.zeros(num_rows, 16))
        assert torch.equal(outcome.dweight, torch.zeros(NUM_COLUMNS, 16))
        assert torch.equal(outcome.dbias, torch.zeros(NUM_COLUMNS))


@pytest.mark.parametrize("sizes", [(60, 37), (0, 60, 37)], ids=str)
def test_a_nan_row_leaves_the_others_untouched(ranks, sizes):
    case = linear_case(6, NUM_COLUMNS, 16)
    clean = run_parallel(ranks, case, sizes)
    case.hidden[3, 2] = torch.nan
    outcome = run_parallel(ranks, case, sizes)
    others = torch.arange(6) != 3
    assert bool(outcome.stats[:, 3].isnan().all())
    assert bool(outcome.dhidden[3].isnan().all())
    assert torch.equal(outcome.stats[:, others], clean.stats[:, others])
    assert torch.equal(outcome.dhidden[others], clean.dhidden[others])


def test_an_overflow_on_one_rank_reaches_only_its_row(ranks):
    # One feature a row: what happens to feature 2 in the last rank's columns concerns row 2 alone.
    case = linear_case(4, NUM_COLUMNS, 4)
    hidden = torch.eye(4)
    weight = case.weight.clone()
    clean = run_parallel(ranks, case._replace(hidden=hidden), (40, 30, 27))
    hidden[2, 2] = 1e38
    weight[90, 2] = 1e38  # +inf in row 2, which has no distribution then
    outcome = run_parallel(ranks, case._replace(hidden=hidden, weight=weight), (40, 30, 27))
    others = torch.tensor([0, 1, 3])
    assert bool(outcome.stats[[0, 1, 3], 2].isnan().all())
    assert torch.equal(outcome.stats[:, others], clean.stats[:, others])
    features = others  # that of row 2 has another weight now
    assert torch.equal(outcome.dhidden[others][:, features], clean.dhidden[others][:, features])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_banned_shards(ranks, backend, softcap):
    case = linear_case(6, NUM_COLUMNS, 16, bias=True, softcap=softcap, backend=backend)
    case.bias[:60] = -torch.inf
    case = case._replace(targets=60 + case.targets % 37)
    for sizes in ((60, 37), (40, 25, 32), (30, 30, 37)):
        check_parallel(ranks, case, sizes)


def test_banned_targets_and_rows_without_a_distribution(ranks):
    case = linear_case(4, NUM_COLUMNS, 16, bias=True)
    case.bias[:60] = -torch.inf
    case = case._replace(targets=torch.tensor([0, 50, 59, 70]))
    case.upstream[2] = 0  # the target logit alone is -inf, its gradient is not
    for sizes in ((60, 37), (30, 40, 27)):
        outcome = run_parallel(ranks, case, sizes)
        assert outcome.stats[0, :3].tolist() == [-math.inf] * 3
        assert outcome.stats[2, :3].tolist() == [-math.inf] * 3
        expected = run_linear(plain_linear, in_float64(case))
        torch.testing.assert_close(outcome.dbias.double(), expected.dbias, rtol=1e-5, atol=1e-6)
    case.bias[:] = -torch.inf
    outcome = run_parallel(ranks, case, (60, 37))
    assert bool(outcome.stats[[0, 1, 3]].isnan().all())
    assert bool(outcome.dhidden.isnan().all())


OPTIONS = {
    "temperatures": {"temperature": torch.linspace(0.3, 3.0, 9)},
    "temperatures, softcap": {"temperature": torch.linspace(0.3, 3.0, 9), "softcap": 4.0, "vocab_size": 80},
    "smoothed": {"label_smoothing": 0.1, "temperature": 0.7},
    "smoothed, padded": {"label_smoothing": 0.2, "vocab_size": 80},
    "no entropy": {"with_entropy": False, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_more_options(ranks, options, backend):
    case = linear_case(9, NUM_COLUMNS, 16, bias=True, **options)
    case.upstream[3] *= options.get("with_entropy", True)
    for sizes in ((60, 37), (33, 0, 64), (90, 7, 0)):
        check_parallel(ranks, case._replace(options=options | {"backend": backend}), sizes)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_label_smoothing_at_an_offset(ranks, offset):
    case = linear_case(7, NUM_COLUMNS, 16, label_smoothing=0.1)
    check_parallel(ranks, case._replace(bias=torch.full((NUM_COLUMNS,), offset)), (40, 30, 27))


def largest(group, case, sizes):
    """On a rank: argmax and largest logit."""
    case = own_shard(group, case, sizes)
    stats = linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias, **case.options)
    return stats.argmax, stats.max_logit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(60, 37), (33, 0, 64), (0, 97, 0), (97, 0, 0), (1, 1, 95)], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_argmax(ranks, sizes, softcap, backend):
    # Logits are chosen: several equal ones within and across shards, larger ones in the padding, banned shards.
    logits = torch.zeros(8, NUM_COLUMNS)
    for row, columns in enumerate([[5, 6], [0, 70], [59, 60], [32, 33], [80, 81], [], [1], [7]]):
        logits[row, columns] = 3.0
    logits[:, 90:] = 5.0
    targets = torch.tensor([0, 1, 2, 3, 4, 5, -100, 7])
    case = LinearCase(torch.eye(8), logits.T.contiguous(), None, targets, torch.zeros(4, 8), {})
    options = {"with_argmax": True, "vocab_size": 90, "softcap": softcap, "backend": backend}
    largest_logit = 3.0 if softcap is None else 4 * math.tanh(0.75)
    for argmax, max_logit in ranks.run(len(sizes), largest, case._replace(options=options), sizes):
        assert argmax.tolist() == [5, 0, 59, 32, 80, 0, -1, 7]
        expected = torch.tensor([largest_logit] * 5 + [0.0, 0.0, largest_logit])
        torch.testing.assert_close(max_logit, expected)
    if softcap is None:
        bias = torch.zeros(NUM_COLUMNS)
        bias[:60] = -torch.inf
        banned = case._replace(bias=bias, targets=targets.clamp(min=0), options=options)
        for argmax, _ in ranks.run(len(sizes), largest, banned, sizes):
            assert argmax.tolist() == [60, 70, 60, 60, 80, 60, 60, 60]
        case.hidden[2, 2] = torch.nan
        for argmax, max_logit in ranks.run(len(sizes), largest, case._replace(options=options), sizes):
            assert argmax.tolist() == [5, 0, -1, 32, 80, 0, -1, 7]
            assert max_logit.isnan().tolist() == [row == 2 for row in range(8)]


def test_a_wrong_temperature_names_its_row_everywhere(ranks):
    temperature = torch.ones(6)
    temperature[4] = 0.0
    case = linear_case(6, NUM_COLUMNS, 16, temperature=temperature)
    for name, message in ranks.run(2, error, case, (60, 37)):
        assert name == "ValueError"
        assert "temperature 0.0 in row 4 is outside" in message


def gradients_needed(group, case, sizes, needed):
    """On a rank: the gradients where only some of the inputs require one."""
    case = own_shard(group, case, sizes)
    inputs = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias")}
    for name in needed:
        inputs[name].requires_grad_()
    stats = linear_token_stats(inputs["hidden"], inputs["weight"], case.targets, bias=inputs["bias"], **case.options)
    torch.stack(list(stats)).backward(case.upstream)
    return {name: tensor.grad for name, tensor in inputs.items()}


@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_only_some_inputs_require_a_gradient(ranks, needed):
    case = linear_case(6, NUM_COLUMNS, 16, bias=True)
    sizes = (40, 0, 57)
    full = ranks.run(3, run_shard, case, sizes)
    for expected, gradients in zip(full, ranks.run(3, gradients_needed, case, sizes, needed), strict=True):
        for name, gradient in gradients.items():
            if name in needed:
                assert torch.equal(gradient, getattr(expected, "d" + name))
            else:
                assert gradient is None


def without_gradients(group, case, sizes):
    """On a rank: statistics in grad mode, under no_grad and under inference_mode."""
    case = own_shard(group, case, sizes)
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            weight = case.weight.clone().requires_grad_()
            results.append(linear_token_stats(case.hidden, weight, case.targets, **case.options))
    return [torch.stack(list(stats)).detach().clone() for stats in results]


def test_no_grad_equals_grad_mode(ranks):
    case = linear_case(6, NUM_COLUMNS, 16)
    for results in ranks.run(2, without_gradients, case, (60, 37)):
        assert all(torch.equal(results[0], other) for other in results[1:])


def unequal_zeros(group, case, sizes):
    """On a rank: gradients where one rank's upstream gradient of a row is 0 and the other's nearly."""
    upstream = case.upstream.clone()
    upstream[:, 2] = 0.0 if group.rank() == 0 else 1e-20
    return run_shard(group, case._replace(upstream=upstream), sizes)


def test_ranks_need_not_agree_on_what_is_exactly_zero(ranks):
    case = linear_case(6, NUM_COLUMNS, 16)
    case.upstream[:, 2] = 0
    outcome = whole(ranks.run(2, unequal_zeros, case, (60, 37)))
    expected = run_parallel(ranks, case, (60, 37))
    torch.testing.assert_close(outcome.dhidden, expected.dhidden, rtol=0, atol=1e-12)


# Rows with a probability of 1, whose gradient is what that lacks. Logits of few live rows may round in another way than
# those of all rows, which the statistics are of.


def saturated_case(num_live: int, **changes) -> LinearCase:
    """64 rows with final logits of about 3200 at their targets, which lie on all ranks; the first ``num_live`` live."""
    dtype = changes.pop("dtype", torch.float32)
    weight = torch.nn.functional.normalize(linear_case(1, 600, 1024).weight).to(dtype)
    targets = torch.arange(64) * 251 % 600  # 0, 251, 502
    case = linear_case(64, 600, 1024, dtype=dtype, temperature=0.1, **changes)
    upstream = torch.zeros(4, 64)
    upstream[[0, 3], :num_live] = 1.0
    hidden = (weight[targets].float() * 320).to(dtype)
    return case._replace(hidden=hidden, weight=weight, targets=targets, upstream=upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1000.0])
@pytest.mark.parametrize("sizes", [(300, 300), (599, 1), (0, 600)], ids=str)
def test_saturated_rows_keep_an_exact_zero(ranks, sizes, softcap, dtype, backend):
    for num_live in (1, 3):
        case = saturated_case(num_live, dtype=dtype, softcap=softcap, backend=backend)
        check_parallel(ranks, case, sizes)
        outcome = run_parallel(ranks, case, sizes)
        assert not bool(outcome.dhidden.any())
        assert not bool(outcome.dweight.any())
        # Nearly saturated, beside a common offset.
        bias = torch.full((600,), 300.0, dtype=dtype)
        check_parallel(ranks, case._replace(hidden=(case.hidden.float() / 400).to(dtype), bias=bias), sizes)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"with_argmax": True}, {"with_entropy": False}], ids=str)
def test_saturated_rows_with_more_options(ranks, options):
    case = saturated_case(3, **options)
    case.upstream[3] *= options.get("with_entropy", True)
    check_parallel(ranks, case, (300, 300))
    check_parallel(ranks, case, (200, 0, 400))


@pytest.mark.parametrize("sizes", [(300, 300), (0, 600)], ids=str)
def test_probability_shared_by_equal_columns_of_two_ranks(ranks, sizes):
    # What one of them gains the other must lose, to the last bit: they push hidden to opposite sides.
    case = saturated_case(1, backend="reference")
    case.weight[400] = case.weight[0]
    assert not bool(run_linear(plain_linear, case._replace(options={"temperature": 0.1})).dhidden.any())
    assert not bool(run_parallel(ranks, case, sizes).dhidden.any())


def saturated_backward(group, case, sizes, needed, live, repeating):
    """On a rank: gradients of ``needed``, and how often the backward pass reduced and gathered over all ranks.

    This rank has as many live rows, and products that repeat or not, as ``live`` and ``repeating`` say.
    """
    from repirl_kernels import parallel

    case = own_shard(group, case, sizes)
    case.upstream[:, live[group.rank()] :] = 0
    leaves = {name: getattr(case, name).clone().requires_grad_(name in needed) for name in ("hidden", "weight")}
    with mock.patch.object(parallel, "repeats_products", return_value=repeating[group.rank()]):
        stats = torch.stack(list(linear_token_stats(**leaves, targets=case.targets, **case.options)))
    with (
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
        mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathered,
    ):
        stats.backward(case.upstream)
    return [leaves[name].grad for name in needed], (reduced.call_count, gathered.call_count)


@pytest.mark.parametrize("needed", [("hidden", "weight"), ("hidden",), ("weight",)], ids=str)
@pytest.mark.parametrize("live", [(3, 3), (0, 3), (1, 0)], ids=str)
@pytest.mark.parametrize("repeating", [(False, False), (True, False)], ids=str)
def test_ranks_need_not_agree_on_what_saturated_rows_need(ranks, repeating, live, needed):
    case = saturated_case(3, backend="reference")
    for gradients, calls in ranks.run(2, saturated_backward, case, (500, 100), needed, live, repeating):
        assert calls == (1 + ("hidden" in needed), 1)
        for gradient in gradients:
            assert bool(gradient.isfinite().all())
            assert live != (3, 3) or not bool(gradient.any())


@pytest.mark.parametrize("why", ["no large logit", "repeating products", "no live row"])
def test_no_collective_more_where_saturated_rows_lose_nothing(ranks, why):
    case = saturated_case(0 if why == "no live row" else 3, backend="reference")
    if why == "no large logit":
        case = case._replace(hidden=case.hidden / 100)
    for needed in (("hidden", "weight"), ("weight",)):
        # Which rows are live has to be asked for hidden, or where it decides about saturated ones.
        expected = {"no live row": 1}.get(why, 2 if "hidden" in needed else 0)
        repeating = (why == "repeating products",) * 2
        for _, calls in ranks.run(2, saturated_backward, case, (500, 100), needed, (3, 3), repeating):
            assert calls == (expected, 0)


def compiled(group, case, sizes):
    """On a rank: loss and gradients, eager and compiled whole, for three numbers of rows."""
    case = own_shard(group, case, sizes)

    def loss(hidden, weight, targets):
        stats = linear_token_stats(hidden, weight, targets, temperature=0.9, tp_group=group)
        return (stats.logprob * stats.entropy + stats.logsumexp).sum()

    torch._dynamo.reset()
    whole_graph = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for num_rows in (3, 7, 12):
        hidden = case.hidden[:num_rows].clone().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        for function in (loss, whole_graph):
            value = function(hidden, weight, case.targets[:num_rows])
            results.append((value.detach(), *torch.autograd.grad(value, [hidden, weight])))
    return results


def test_compiles_whole(ranks):
    for results in ranks.run(2, compiled, linear_case(12, NUM_COLUMNS, 16), (60, 37)):
        for eager, whole_graph in zip(results[::2], results[1::2], strict=True):
            for left, right in zip(eager, whole_graph, strict=True):
                torch.testing.assert_close(left, right)


def checkpointed(group, case, sizes):
    """On a rank: gradients where the statistics, and their collectives, are computed again in the backward pass."""
    case = own_shard(group, case, sizes)
    gradients = []
    for use_reentrant in (False, True):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()

        def stacked(hidden, weight):
            return torch.stack(list(linear_token_stats(hidden, weight, case.targets, **case.options)))

        checkpoint(stacked, hidden, weight, use_reentrant=use_reentrant).backward(case.upstream)
        gradients.append((hidden.grad, weight.grad))
    return gradients


def test_activation_checkpointing(ranks):
    case = linear_case(6, NUM_COLUMNS, 16)
    expected = ranks.run(3, run_shard, case, (40, 30, 27))
    for outcome, gradients in zip(expected, ranks.run(3, checkpointed, case, (40, 30, 27)), strict=True):
        for dhidden, dweight in gradients:
            assert torch.equal(dhidden, outcome.dhidden)
            assert torch.equal(dweight, outcome.dweight)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skip_negligible(ranks, dtype):
    # The last rank's columns hold no probability to speak of, so that all of its gradients are left out.
    case = linear_case(9, 1000, 16, dtype=dtype, bias=True)
    case.bias[600:] -= 50
    case = case._replace(targets=case.targets % 600)
    expected = run_parallel(ranks, case, (400, 200, 400))
    assert bool(expected.dweight[600:].any())
    outcome = run_parallel(ranks, case._replace(options={"skip_negligible": True}), (400, 200, 400))
    assert torch.equal(outcome.stats, expected.stats)
    assert not bool(outcome.dweight[600:].any())
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(outcome.dhidden, expected.dhidden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(outcome.dweight, expected.dweight, rtol=tolerance, atol=tolerance)


def check_operators(group, case, sizes, options):
    """On a rank: ``opcheck`` of both operators, whose runs match those of the other ranks."""
    from repirl_kernels import parallel

    case = own_shard(group, case, sizes)
    hidden, weight, bias = (tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight, case.bias))
    mask = torch.arange(case.targets.shape[0]) != 2
    temperature = torch.linspace(0.5, 2, case.targets.shape[0]) if options.with_argmax else None
    operands = (hidden, weight, case.targets, bias, mask, temperature)
    forward = (*operands, 90, False, group.group_name, *options)
    torch.library.opcheck(parallel._vocab_parallel_token_stats, forward)
    *stats, shard = (output.detach() for output in parallel._vocab_parallel_token_stats(*forward))
    stats = RowStats(*stats)
    entropy, g_entropy = (stats.entropy, case.upstream[3]) if options.with_entropy else (None, None)
    detached = [tensor if tensor is None else tensor.detach() for tensor in operands]
    for needs in itertools.product([False, True], repeat=3):
        backward = (
            *case.upstream[:3], g_entropy, stats.logsumexp, entropy, stats.logsumexp_low, shard, *needs, *detached,
            *forward[7:],
        )  # fmt: skip
        # Double backward is refused, so there is no gradient of this one to check.
        torch.library.opcheck(
            parallel._vocab_parallel_token_stats_backward, backward, test_utils=("test_schema", "test_faketensor")
        )


def test_opcheck(ranks):
    case = linear_case(6, NUM_COLUMNS, 16, bias=True, vocab_size=90)
    plain = Options(0.7, 3.0, -100, 0, 0.0, True, False, "")
    ranks.run(2, check_operators, case, (60, 37), plain)
    ranks.run(3, check_operators, case, (60, 37, 0), plain)
    ranks.run(2, check_operators, case, (60, 37), Options(1.0, None, -100, 0, 0.1, False, True, ""))


def error(group, case, sizes, change=None):
    """On a rank: the type and the message of the error; ``change`` is made on rank 0 alone."""
    case = own_shard(group, case, sizes)
    if change and group.rank() == 0:
        case = change(case)
    try:
        linear_token_stats(case.hidden, case.weight, case.targets, **case.options)
    except Exception as exception:
        return type(exception).__name__, str(exception)
    return None


@pytest.mark.parametrize("target", [-1, 97, 2**31])
def test_a_target_outside_the_vocabulary_is_the_same_error_everywhere(ranks, target):
    case = linear_case(6, NUM_COLUMNS, 16)
    case.targets[4] = target
    for name, message in ranks.run(3, error, case, (40, 30, 27)):
        assert name == "ValueError"
        assert f"target {target} in row 4 is outside [0, 97)" in message


@pytest.mark.parametrize("vocab_size", [0, 98])
def test_vocab_size_counts_global_columns(ranks, vocab_size):
    case = linear_case(6, NUM_COLUMNS, 16)._replace(options={"vocab_size": vocab_size})
    for name, message in ranks.run(2, error, case, (60, 37)):
        assert name == "ValueError"
        assert f"vocab_size must lie in [1, 97] (the number of columns), got {vocab_size}" in message


def one_row_less(case):
    return case._replace(hidden=case.hidden[1:], targets=case.targets[1:])


def one_row_ignored(case):
    return case._replace(targets=torch.cat([case.targets[:-1], torch.tensor([-100])]))


def smaller_vocabulary(case):
    return case._replace(options=case.options | {"vocab_size": 90})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (one_row_less, "disagree on rows: [5, 6]"),
        (one_row_ignored, "disagree on rows that count: [5, 6]"),
        (smaller_vocabulary, "disagree on vocab_size (-1: none given): [90, -1]"),
    ],
)
def test_ranks_that_disagree_are_told_so(ranks, change, expected):
    for name, message in ranks.run(2, error, linear_case(6, NUM_COLUMNS, 16), (60, 37), change):
        assert name == "ValueError"
        assert expected in message


def test_a_group_must_be_a_process_group():
    case = linear_case(6, NUM_COLUMNS, 16)
    with pytest.raises(TypeError, match=r"tp_group must be a torch.distributed.ProcessGroup.*'tp'"):
        linear_token_stats(case.hidden, case.weight, case.targets, tp_group="tp")


def second_gradient(group, case, sizes):
    """On a rank: the message of a gradient of a gradient."""
    case = own_shard(group, case, sizes)
    hidden = case.hidden.clone().requires_grad_()
    stats = linear_token_stats(hidden, case.weight, case.targets, **case.options)
    (first,) = torch.autograd.grad(stats.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first gradients only"):
        first.sum().backward()


def test_double_backward_is_refused(ranks):
    ranks.run(2, second_gradient, linear_case(6, NUM_COLUMNS, 16), (60, 37))


def batch_axes(group, case, sizes):
    """On a rank: outputs of hidden ``[2, 3, D]``."""
    case = own_shard(group, case, sizes)
    stats = linear_token_stats(case.hidden.reshape(2, 3, -1), case.weight, case.targets.reshape(2, 3), **case.options)
    return torch.stack(list(stats))


def test_batch_axes(ranks):
    case = linear_case(6, NUM_COLUMNS, 16)
    expected = run_parallel(ranks, case, (60, 37)).stats
    for stats in ranks.run(2, batch_axes, case, (60, 37)):
        assert torch.equal(stats, expected.reshape(4, 2, 3))


def readme_gradients(group, case, sizes):
    """On a rank: the loss of the example in the README, and dH."""
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Vocabulary-parallel\n")[1].split("\n## ")[0]
    names: dict = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    case = own_shard(group, case, sizes)
    hidden = case.hidden.clone().requires_grad_()
    loss = names["tensor_parallel_loss"](hidden, case.weight, case.targets, 6, group)
    loss.backward()
    return loss.detach(), hidden.grad


def test_the_example_of_the_readme(ranks):
    case = linear_case(6, NUM_COLUMNS, 16)
    hidden = case.hidden.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(hidden @ case.weight.T, case.targets)
    expected.backward()
    for loss, dhidden in ranks.run(3, readme_gradients, case, (40, 30, 27)):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(dhidden, hidden.grad, rtol=1e-5, atol=1e-6)
