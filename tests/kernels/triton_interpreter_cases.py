"""The Triton kernels under Triton's interpreter, on CPU tensors: run by ``test_triton_interpreter.py``.

Triton decides at import whether it interprets, so these cases need a process of their own with
``TRITON_INTERPRET=1``. Numbers in the tests' names are those of the correctness protocol's list of edge
cases.
"""

import functools
import math
import os

import pytest
import torch
from kernel_checks import (
    LinearCase,
    assert_at_most_twice_as_wrong,
    check_linear,
    check_logits,
    linear_case,
    poisoned_memory,
    run_linear,
    run_logits,
    stats_by_loss,
)
from repirl_kernels import linear_token_stats, token_stats
from repirl_kernels.operands import Options
from repirl_kernels.rows import fold_upstream
from repirl_kernels.triton import linear_backward, linear_forward, tiles

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_interpreter.py instead"

linear_op = functools.partial(linear_token_stats, backend="triton")
logits_op = functools.partial(token_stats, backend="triton")

HALF_AND_FLOAT = [torch.float32, torch.bfloat16, torch.float16]


def logits_case(num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, num_columns, generator=generator)).to(dtype)
    targets = torch.randint(num_columns, (num_rows,), generator=generator)
    return logits, targets, torch.randn(4, num_rows, generator=generator)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0, "bias": True, "vocab_size": 91}])
def test_linear(dtype, options):
    """Several row blocks, tiles in a split, splits and slabs would all show here."""
    check_linear(linear_op, linear_case(37, 200, 40, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("chunk_bytes", [None, 200 * 4 * 15])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "softcap": 5.0, "bias": True, "vocab_size": 91}, {"bias": True}]
)
def test_loss(dtype, chunk_bytes, options):
    """``linear_token_loss``: kept logits, in one chunk and in several, and slabs of their gradient."""
    loss_op = functools.partial(stats_by_loss, backend="triton", chunk_bytes=chunk_bytes)
    check_linear(loss_op, linear_case(37, 200, 40, dtype=dtype, **options))


def test_loss_with_rows_that_do_not_count(monkeypatch):
    monkeypatch.setattr(tiles, "slab_width", lambda *args: 32)
    loss_op = functools.partial(stats_by_loss, backend="triton", chunk_bytes=90 * 4 * 7)
    case = linear_case(20, 90, 24)
    case.hidden[3] = math.nan
    case.upstream[:, 3] = 0
    case.targets[[0, 8, 9]] = -100
    outcome = run_linear(loss_op, case)
    expected = run_linear(linear_op, case)
    torch.testing.assert_close(outcome.stats, expected.stats, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(outcome.dhidden, expected.dhidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outcome.dweight, expected.dweight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_skip_negligible(monkeypatch, dtype):
    monkeypatch.setattr(tiles, "slab_width", lambda *args: 32)
    case = linear_case(20, 200, 24, dtype=dtype, bias=True, scale=1.0)
    case.bias[30:] -= 40.0
    case = case._replace(targets=case.targets % 30)
    case.targets[::5] = 199
    exact = run_linear(linear_op, case)
    skipped = run_linear(linear_op, case._replace(options={"skip_negligible": True}))
    assert torch.equal(skipped.stats, exact.stats)
    for name in ("dhidden", "dweight", "dbias"):
        actual, expected = getattr(skipped, name), getattr(exact, name)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    assert not skipped.dweight[64:160].any()
    assert skipped.dweight[199].any()


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0, "vocab_size": 600}])
def test_logits(dtype, options):
    logits, targets, upstream = logits_case(5, 700, dtype)
    check_logits(logits_op, logits, targets.clamp(max=599), upstream, **options)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_01_large_logits(offset, temperature):
    logits, targets, upstream = logits_case(6, 300)
    check_logits(logits_op, 3e3 * logits, targets, upstream, temperature=temperature)
    check_logits(logits_op, logits + offset, targets, upstream, temperature=temperature)
    case = linear_case(6, 90, 20, bias=True)
    check_linear(linear_op, case._replace(bias=case.bias + offset, options={"temperature": temperature}))
    check_linear(linear_op, linear_case(6, 90, 20, scale=5e3, temperature=temperature))


def test_02_very_negative_logits():
    logits, targets, upstream = logits_case(6, 300)
    check_logits(logits_op, logits - 1e4, targets, upstream)
    case = linear_case(6, 90, 20, bias=True)
    check_linear(linear_op, case._replace(bias=case.bias - 1e4))


@pytest.mark.parametrize("num_columns", [1, 2, 17, 33, 97, 257])
@pytest.mark.parametrize("num_features", [1, 33])
def test_03_any_size(num_columns, num_features):
    check_linear(linear_op, linear_case(3, num_columns, num_features))
    check_logits(logits_op, *logits_case(3, num_columns))


@pytest.mark.parametrize("num_rows", [0, 1])
def test_04_no_row_and_one_row(num_rows):
    check_linear(linear_op, linear_case(num_rows, 50, 16))
    check_logits(logits_op, *logits_case(num_rows, 50))


def test_05_every_row_ignored():
    case = linear_case(4, 50, 16)
    outcome = run_linear(linear_op, case._replace(targets=torch.full((4,), -100)))
    for value in (outcome.stats, outcome.dhidden, outcome.dweight):
        assert not value.any()


@pytest.mark.parametrize("target", [-1, 50, 2**31])
def test_06_target_out_of_range(target):
    case = linear_case(4, 50, 16)
    case.targets[2] = target
    with pytest.raises(ValueError, match=rf"{target}.*50"):
        run_linear(linear_op, case)


def test_07_ignore_index_inside_the_vocabulary():
    case = linear_case(9, 50, 16)
    case.targets[[1, 4]] = 7
    outcome = run_linear(linear_op, case._replace(options={"ignore_index": 7}))
    assert not outcome.stats[:, [1, 4]].any()
    assert not outcome.dhidden[[1, 4]].any()
    kept = torch.tensor([0, 2, 3, 5, 6, 7, 8])
    alone = run_linear(
        linear_op,
        case._replace(hidden=case.hidden[kept], targets=case.targets[kept], upstream=case.upstream[:, kept]),
    )
    assert torch.equal(outcome.stats[:, kept], alone.stats)
    assert torch.equal(outcome.dhidden[kept], alone.dhidden)
    assert torch.equal(outcome.dweight, alone.dweight)


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in other memory."""
    if how == "transposed":
        return tensor.T.contiguous().T
    padded = torch.full((2 * tensor.shape[0], tensor.shape[1] + 3), torch.nan, dtype=tensor.dtype)
    view = padded[::2, 1:-2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("how", ["transposed", "sliced"])
def test_08_strides(how):
    case = linear_case(7, 70, 24)
    expected = linear_op(case.hidden, case.weight, case.targets)
    hidden, weight = strided(case.hidden, how), strided(case.weight, how)
    for a, b in zip(linear_op(hidden, weight, case.targets), expected, strict=True):
        assert torch.equal(a, b)
    hidden.requires_grad_()
    weight.requires_grad_()
    contiguous = run_linear(linear_op, case._replace(upstream=torch.ones(4, 7)))
    stats = linear_op(hidden, weight, case.targets)
    gradients = torch.autograd.grad([s.sum() for s in stats], [hidden, weight])  # expanded upstream gradients
    assert torch.equal(gradients[0], contiguous.dhidden)
    assert torch.equal(gradients[1], contiguous.dweight)
    logits, targets, upstream = logits_case(5, 90)
    check = run_logits(logits_op, logits, targets, upstream)
    view = strided(logits, how).requires_grad_()
    stats = torch.stack(list(logits_op(view, targets)))
    assert torch.equal(stats, check.stats)
    assert torch.equal(torch.autograd.grad(stats, view, upstream)[0], check.dhidden)


def test_08_expanded():
    case = linear_case(7, 70, 24)
    row = case.hidden[:1].expand(7, 24)
    outcome = linear_op(row, case.weight, case.targets)
    for a, b in zip(outcome, linear_op(row.contiguous(), case.weight, case.targets), strict=True):
        assert torch.equal(a, b)


def test_10_nan_stays_in_its_row():
    case = linear_case(20, 90, 24)
    clean = run_linear(linear_op, case)
    hidden = case.hidden.clone()
    hidden[3, 5] = math.nan
    dirty = run_linear(linear_op, case._replace(hidden=hidden))
    others = torch.arange(20) != 3
    assert dirty.stats[:, 3].isnan().all()
    assert torch.equal(dirty.stats[:, others], clean.stats[:, others])
    assert dirty.dhidden[3].isnan().all()
    assert torch.equal(dirty.dhidden[others], clean.dhidden[others])
    logits, targets, upstream = logits_case(4, 300)
    clean = run_logits(logits_op, logits, targets, upstream)
    logits[2, 299] = math.nan
    dirty = run_logits(logits_op, logits, targets, upstream)
    others = torch.tensor([0, 1, 3])
    assert dirty.stats[[0, 1, 3], 2].isnan().all()
    assert torch.equal(dirty.stats[:, others], clean.stats[:, others])
    assert torch.equal(dirty.dhidden[others], clean.dhidden[others])


@pytest.mark.parametrize("banned", [slice(0, 40), slice(64, 96), slice(10, 199), slice(70, 200)])
def test_11_banned_tokens(banned):
    """-inf for part of a tile, for a whole tile, for all but two tokens, for whole splits at the end."""
    case = linear_case(6, 200, 24, bias=True)
    case.bias[banned] = -math.inf
    allowed = torch.nonzero(case.bias > -math.inf).squeeze(-1)
    case = case._replace(targets=allowed[case.targets % len(allowed)])
    check_linear(linear_op, case)
    logits, _, upstream = logits_case(6, 200)
    logits[:, banned] = -math.inf
    check_logits(logits_op, logits, case.targets, upstream)
    outcome = run_logits(logits_op, logits, case.targets, upstream)
    assert not outcome.dhidden[:, banned].any()


def test_11_banned_target_and_impossible_rows():
    logits, targets, _ = logits_case(4, 90)
    logits[0, targets[0]] = -math.inf
    logits[1] = -math.inf
    logits[2, 5] = math.inf
    stats = logits_op(logits, targets)
    reference = token_stats(logits, targets, backend="reference")
    for a, b in zip(stats, reference, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert stats.logprob[0] == -math.inf
    assert stats.entropy[1].isnan()
    assert stats.entropy[2].isnan()
    assert stats.entropy[3].isfinite()


def test_12_certain_target_with_a_gradient_on_logsumexp_alone():
    logits = torch.zeros(1, 90)
    logits[0, 3] = math.log(89 * (1e7 - 1))
    upstream = torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None]
    outcome = run_logits(logits_op, logits, torch.tensor([3]), upstream)
    truth = torch.softmax(logits.double(), dim=-1)
    torch.testing.assert_close(outcome.dhidden.double(), truth, rtol=1e-5, atol=0)
    check_logits(logits_op, logits, torch.tensor([3]), upstream)


def test_13_one_hot_and_uniform_rows():
    logits = torch.zeros(2, 300)
    logits[0, 7] = 200.0
    targets = torch.tensor([7, 250])
    check_logits(logits_op, logits, targets, torch.ones(4, 2))
    stats = logits_op(logits, targets)
    assert stats.logprob[0] == 0
    assert stats.entropy[0] == 0
    assert abs(stats.entropy[1].item() - math.log(300)) < 1e-6


@pytest.mark.parametrize("output", range(4))
def test_14_each_gradient_alone(output):
    case = linear_case(8, 90, 20, bias=True)
    upstream = torch.zeros_like(case.upstream)
    upstream[output] = case.upstream[output]
    check_linear(linear_op, case._replace(upstream=upstream))
    logits, targets, _ = logits_case(8, 90)
    check_logits(logits_op, logits, targets, upstream)


def plain_options(vocab_size: int) -> Options:
    return Options(1.0, None, -100, vocab_size, 0.0, True, False, "triton")


def backward_arguments(case: LinearCase, options: Options) -> tuple:
    """Of ``linear_backward``, but for which gradients are needed."""
    statistics = linear_forward(case.hidden, case.weight, case.targets, case.bias, options)
    upstream, logsumexp = tuple(case.upstream), statistics.logsumexp.float()
    gradients = fold_upstream(upstream, (logsumexp, statistics.entropy, torch.zeros(8)), 0.0, options.vocab_size)
    return gradients, case.hidden, case.weight, case.targets, case.bias, options


@pytest.mark.parametrize("needed", range(3))
def test_15_one_gradient_needed(needed):
    case = linear_case(8, 90, 20, bias=True)
    arguments = backward_arguments(case, plain_options(90))
    everything = linear_backward(*arguments, True, True, True)
    only = linear_backward(*arguments, *[index == needed for index in range(3)])
    for index in range(3):
        if index == needed:
            assert torch.equal(only[index], everything[index])
        else:
            assert only[index] is None


def test_16_no_grad_equals_grad():
    case = linear_case(8, 90, 20)
    with torch.no_grad():
        without = linear_op(case.hidden, case.weight, case.targets)
    assert torch.equal(torch.stack(list(without)), run_linear(linear_op, case).stats)


def test_19_mixed_dtypes():
    case = linear_case(8, 90, 20)
    outcome = run_linear(linear_op, case._replace(hidden=case.hidden.bfloat16()))
    assert outcome.stats.dtype == torch.float32
    assert (outcome.dhidden.dtype, outcome.dweight.dtype) == (torch.bfloat16, torch.float32)
    rounded = run_linear(linear_op, case._replace(hidden=case.hidden.bfloat16().float()))
    assert torch.equal(outcome.stats, rounded.stats)
    assert torch.equal(outcome.dhidden, rounded.dhidden.bfloat16())
    assert torch.equal(outcome.dweight, rounded.dweight)


def test_21_padded_vocabulary():
    case = linear_case(8, 128, 20, bias=True, vocab_size=70)
    poisoned = case.weight.clone()
    poisoned[70:] = math.nan
    outcome = run_linear(linear_op, case._replace(weight=poisoned))
    assert outcome.stats.isfinite().all()
    assert outcome.dhidden.isfinite().all()
    assert not outcome.dweight[70:].any()
    assert not outcome.dbias[70:].any()
    logits, targets, upstream = logits_case(4, 300)
    logits[:, 270:] = math.nan
    outcome = run_logits(logits_op, logits, targets % 270, upstream, vocab_size=270)
    assert outcome.stats.isfinite().all()
    assert outcome.dhidden.isfinite().all()
    assert not outcome.dhidden[:, 270:].any()


def test_22_repeatable_and_a_row_alone():
    case = linear_case(20, 200, 24, dtype=torch.bfloat16)
    first, second = run_linear(linear_op, case), run_linear(linear_op, case)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert torch.equal(a, b)
    logits, targets, upstream = logits_case(20, 600)
    batch = run_logits(logits_op, logits, targets, upstream)
    for row in (0, 19):
        one = slice(row, row + 1)
        alone = run_logits(logits_op, logits[one], targets[one], upstream[:, one])
        assert torch.equal(alone.stats, batch.stats[:, one])
        assert torch.equal(alone.dhidden, batch.dhidden[one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_23_low_temperature_and_saturated_softcap(dtype):
    check_linear(linear_op, linear_case(8, 90, 20, dtype=dtype, temperature=0.01))
    check_linear(linear_op, linear_case(8, 90, 20, dtype=dtype, softcap=0.5))
    check_linear(linear_op, linear_case(8, 90, 20, dtype=dtype, softcap=30.0, scale=100.0))
    logits, targets, upstream = logits_case(8, 300, dtype)
    # Scaled down so that not every row is one-hot: the largest entropy sets the scale of the errors.
    check_logits(logits_op, 0.02 * logits, targets, upstream, temperature=0.01)
    check_logits(logits_op, logits, targets, upstream, softcap=0.5, temperature=0.01)
    check_logits(logits_op, 100 * logits, targets, upstream, softcap=30.0)


def test_25_unsupported_dtype():
    case = linear_case(4, 50, 16)
    with pytest.raises(TypeError, match="float64"):
        run_linear(linear_op, case._replace(hidden=case.hidden.double(), weight=case.weight.double()))
    with pytest.raises(TypeError, match="float64"):
        linear_forward(case.hidden.double(), case.weight.double(), case.targets, None, plain_options(50))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_slabs_do_not_change_what_is_computed(width):
    """``width`` tiles of columns at a time, the last slab incomplete, against one slab."""
    case: LinearCase = linear_case(8, 200, 20, bias=True)
    case = case._replace(targets=case.targets % 170)
    arguments = (*backward_arguments(case, plain_options(170)), True, True, True)
    whole = linear_backward(*arguments)
    tile = tiles.backward_tile("interpreter", torch.float32, 1, True, False)
    with poisoned_memory():
        slabs = linear_backward(*arguments, slab_bytes=8 * 4 * tile.block_vocab * width)
    for a, b, in_float64 in zip(slabs, whole, whole, strict=True):
        assert_at_most_twice_as_wrong(a, b, in_float64.double())
    assert torch.equal(slabs[1], whole[1])
    assert torch.equal(slabs[2], whole[2])
    assert not slabs[1][170:].any()


def test_split_count_depends_on_the_vocabulary_alone():
    assert tiles.split_tiles(151936, 256, "sm_90") == (10, 60)
    for vocab_size in (1, 2, 997, 32000, 50257, 151936):
        per_split, num_splits = tiles.split_tiles(vocab_size, 128, "sm_90")
        assert 1 <= num_splits <= tiles.MAX_SPLITS
        assert (num_splits - 1) * per_split * 128 < vocab_size <= num_splits * per_split * 128


EXTRAS = [
    {"label_smoothing": 0.2},
    {"with_argmax": True},
    {"temperature": "rows"},
    {"with_entropy": False},
    {"with_entropy": False, "label_smoothing": 0.1, "softcap": 4.0},
    {"temperature": "rows", "label_smoothing": 0.2, "with_argmax": True, "softcap": 3.0, "vocab_size": 150},
]


def outcome_of(op, leaves, targets, upstream, options):
    """The statistics that there are, and the gradients of ``leaves``."""
    options = dict(options)
    if options.get("temperature") == "rows":
        options["temperature"] = torch.linspace(0.5, 1.5, targets.shape[0], dtype=leaves[0].dtype)
    stats = op(*leaves[:2], targets, **options)
    columns = [column for column in stats[:4] if column is not None]
    return stats, torch.autograd.grad(columns, leaves[:2], [u.to(columns[0].dtype) for u in upstream[: len(columns)]])


# The loss's statistics, by which it is compared here, are always the four.
OF_THE_LOSS = [options for options in EXTRAS if not options.keys() & {"with_entropy", "with_argmax"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "kept"), [*((options, False) for options in EXTRAS), *((options, True) for options in OF_THE_LOSS)]
)
def test_extras_of_the_linear_op(dtype, options, kept):
    """Beside the reference in float64, which has tests of its own; with logits that are kept, too."""
    op = functools.partial(stats_by_loss, backend="triton") if kept else linear_op
    case = linear_case(37, 200, 40, dtype=dtype, **{k: v for k, v in options.items() if k == "vocab_size"})
    case.targets[3] = -100
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual = outcome_of(op, leaves, case.targets, case.upstream, options)
    truth = outcome_of(linear_token_stats, exact, case.targets, case.upstream, options)
    plain = outcome_of(
        functools.partial(linear_token_stats, backend="reference"), leaves, case.targets, case.upstream, options
    )
    compare(actual, plain, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", EXTRAS)
def test_extras_of_given_logits(dtype, options):
    logits, targets, upstream = logits_case(5, 700, dtype)
    targets = targets % 150

    def run(backend, logits):
        op = functools.partial(token_stats, backend=backend)
        leaves = [logits.detach().requires_grad_()]
        return outcome_of(lambda logits, targets, **o: op(logits, targets, **o), leaves, targets, upstream, options)

    compare(run("triton", logits), run("reference", logits), run(None, logits.double()))


def compare(actual, plain, truth) -> None:
    for name in truth[0]._fields:
        columns = [getattr(stats, name) for stats, _ in (actual, plain, truth)]
        if columns[2] is None or name == "argmax":
            assert columns[0] is columns[2] or torch.equal(columns[0], columns[2])
        else:
            assert_at_most_twice_as_wrong(*(column.detach() for column in columns), what=name)
    for gradients in zip(actual[1], plain[1], truth[1], strict=True):
        assert_at_most_twice_as_wrong(*gradients)


def test_argmax_is_the_first_of_several_and_none_where_there_is_no_distribution():
    logits = torch.zeros(5, 700)
    logits[0, [300, 650]] = 2.0
    logits[1] = -5.0
    logits[2, 17] = math.nan
    logits[3] = -math.inf
    targets = torch.tensor([1, 2, 3, 4, -100])
    stats = logits_op(logits, targets, with_argmax=True)
    assert stats.argmax.tolist() == [300, 0, -1, -1, -1]
    assert stats.max_logit[:2].tolist() == [2.0, -5.0]
    hidden, weight = torch.ones(1, 16), torch.zeros(200, 16)
    weight[[70, 180]] = 1.0
    assert linear_op(hidden, weight, torch.tensor([3]), with_argmax=True).argmax.tolist() == [70]
