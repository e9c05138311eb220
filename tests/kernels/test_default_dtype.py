"""torch's default dtype is a user's affair: results do not depend on it."""

import functools

import pytest
import torch
from kernel_checks import linear_case, run_linear, run_logits, stats_by_loss
from rank_processes import rank_processes
from repirl_kernels import TokenStats, aggregate_weights, linear_token_loss, linear_token_stats, native, token_stats

needs_native = pytest.mark.skipif(not native.is_available(), reason="not built")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]
OPTIONS = {"label_smoothing": 0.1, "temperature": torch.linspace(0.5, 2, 6), "softcap": 20.0}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def default_dtype(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


def equal(left, right):
    assert left.keys() == right.keys()
    for name, outcome in left.items():
        for actual, expected in zip(outcome, right[name], strict=True):
            if expected is not None:
                assert actual.dtype == expected.dtype, name
                assert torch.equal(actual, expected), name


def cases(dtype):
    return [linear_case(6, 1100, 24, dtype=dtype, bias=True, **options) for options in ({}, OPTIONS)]


def outcomes(backend, cases):
    results = {}
    for case in cases:
        options, dtype = case.options, case.hidden.dtype
        for op in (linear_token_stats, stats_by_loss):
            results[op.__name__, len(options)] = run_linear(functools.partial(op, backend=backend), case)
        chunked = functools.partial(stats_by_loss, backend=backend, chunk_bytes=10_000)
        results["chunked", len(options)] = run_linear(chunked, case)
        logits = (case.hidden @ case.weight.T).to(dtype)
        results["logits", len(options)] = run_logits(
            functools.partial(token_stats, backend=backend), logits, case.targets, case.upstream, **options
        )
        largest = linear_token_stats(
            case.hidden, case.weight, case.targets, with_argmax=True, backend=backend, **options
        )
        results["argmax", len(options)] = largest
    return results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager(default_dtype, backend, dtype):
    expected = outcomes(backend, same := cases(dtype))
    torch.set_default_dtype(default_dtype)
    equal(outcomes(backend, same), expected)


@pytest.mark.parametrize("own_products", [True, False])
def test_native(default_dtype, monkeypatch, own_products):
    if not native.is_available():
        pytest.skip("not built")
    if not own_products:
        monkeypatch.setattr(native, "has_products", lambda dtype: False)
    expected = outcomes("native", same := cases(torch.bfloat16))
    torch.set_default_dtype(default_dtype)
    equal(outcomes("native", same), expected)


def test_float64_inputs(default_dtype):
    expected = outcomes(None, same := cases(torch.float64))
    torch.set_default_dtype(default_dtype)
    equal(outcomes(None, same), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(default_dtype, backend):
    case = linear_case(6, 300, 24, bias=True, **OPTIONS)

    def loss_fn(stats, rows):
        return stats.logprob * stats.entropy + stats.logsumexp

    def by_loss(hidden, weight, targets, *, bias, **options):
        result = linear_token_loss(hidden, weight, targets, loss_fn, bias=bias, chunk_bytes=3000, **options)
        return TokenStats(*[result.loss] * 4)

    def compiled_outcomes():
        torch._dynamo.reset()
        results = {}
        for op in (linear_token_stats, by_loss):
            whole = torch.compile(functools.partial(op, backend=backend), backend="aot_eager")
            one = case if op is linear_token_stats else case._replace(upstream=torch.ones(4, dtype=torch.float32))
            results[op.__name__] = run_linear(whole, one)
        return results

    expected = compiled_outcomes()
    torch.set_default_dtype(default_dtype)
    equal(compiled_outcomes(), expected)


def parallel_outcome(group, case, default_dtype):
    """On a rank: the outcome of its shard."""
    torch.set_default_dtype(default_dtype)
    try:
        rank = group.rank()
        sizes = [60, 37]
        case = case._replace(
            weight=case.weight.split(sizes)[rank],
            bias=case.bias.split(sizes)[rank],
            options=case.options | {"tp_group": group},
        )
        largest = linear_token_stats(case.hidden, case.weight, case.targets, with_argmax=True, **case.options)
        return *run_linear(linear_token_stats, case), largest.argmax, largest.max_logit
    finally:
        torch.set_default_dtype(torch.float32)


def test_vocabulary_parallel():
    case = linear_case(6, 97, 16, dtype=torch.bfloat16, bias=True, **OPTIONS)
    with rank_processes(2) as ranks:
        expected = ranks.run(2, parallel_outcome, case, torch.float32)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            for actual, truth in zip(ranks.run(2, parallel_outcome, case, dtype), expected, strict=True):
                for left, right in zip(actual, truth, strict=True):
                    assert left.dtype == right.dtype
                    assert torch.equal(left, right)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
def test_aggregate_weights_are_float32(default_dtype, aggregation):
    cu_seqlens = torch.tensor([0, 3, 7])
    options = {"constant_length": 5} if aggregation == "constant_length" else {}
    expected = aggregate_weights(cu_seqlens, aggregation, **options)
    torch.set_default_dtype(default_dtype)
    actual = aggregate_weights(cu_seqlens, aggregation, **options)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@needs_native
def test_the_native_module_refuses_results_of_another_dtype():
    module = native._native
    arguments = {
        "slab": torch.randn(2, 40),
        "bias": None,
        "temperature": 1.0,
        "temperatures": None,
        "softcap": 0.0,
        "targets": torch.tensor([1, 2]),
        "first_column": 0,
        "maximum": torch.full((2,), -torch.inf),
        "total": torch.zeros(2, dtype=torch.float64),
        "weighted": torch.zeros(2, dtype=torch.float64),
        "target_logit": torch.zeros(2),
        "sum": torch.zeros(2, dtype=torch.float64),
        "argmax": torch.full((2,), -1),
        "num_threads": 1,
    }
    module.update_f32(**arguments)
    assert arguments["total"].all()
    for name, wrong in (
        ("slab", torch.randn(2, 40, dtype=torch.float64)),
        ("bias", torch.zeros(40, dtype=torch.float64)),
        ("temperatures", torch.ones(2, dtype=torch.float64)),
        ("targets", torch.tensor([1, 2], dtype=torch.int32)),
        ("maximum", torch.zeros(2, dtype=torch.float64)),
        ("total", torch.zeros(2)),
        ("weighted", torch.zeros(2)),
        ("target_logit", torch.zeros(2, dtype=torch.float16)),
        ("sum", torch.zeros(2)),
        ("argmax", torch.zeros(2, dtype=torch.int32)),
        ("total", torch.zeros(4, dtype=torch.float64)[::2]),
        ("maximum", None),
    ):
        with pytest.raises(TypeError):
            module.update_f32(**(arguments | {name: wrong}))
    row = {name: torch.zeros(2) for name in ("logsumexp", "mean_logit", "mass", "onehot", "slope", "uniform")}
    shared = {name: arguments[name] for name in ("bias", "temperature", "temperatures", "softcap", "targets")}
    shared |= {"first_column": 0, "num_threads": 1, "slab": arguments["slab"]}
    for wrong in (torch.zeros(2, 40, dtype=torch.float64), torch.zeros(2, 40, dtype=torch.bfloat16).view(torch.uint16)):
        with pytest.raises(TypeError):
            module.gradient_f32(**shared, **row, out=wrong)
