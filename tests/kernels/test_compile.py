"""The ops under ``torch.compile``: checkpointed regions, saved-tensors hooks, any number of rows, CUDA graphs."""

import functools
import math
import shutil

import pytest
import torch
from kernel_checks import linear_case, plain_linear, run_linear
from repirl_kernels import linear_loss, linear_token_loss, linear_token_stats, native, ops, parallel, token_stats
from torch.utils.checkpoint import checkpoint

needs_native = pytest.mark.skipif(not native.is_available(), reason="not built")


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request):
    torch._dynamo.reset()
    return request.param


def coupled(stats, targets):
    """A loss of whole sequences, of 3 tokens of a prompt that are ignored and 3 of a response."""
    ratio = (stats.logprob + 3).view(-1, 6).mean(dim=1, keepdim=True).exp()
    return (-ratio.clamp(max=1.5).expand(-1, 6) * torch.where(targets.view(-1, 6) == -100, 0.0, 1.0)).flatten() + (
        0.1 * stats.entropy
    )


def prompts_and_responses(num_sequences=3, **options):
    case = linear_case(6 * num_sequences, 60, 8, **options)
    case.targets.view(-1, 6)[:, :3] = -100
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_couples_rows(backend, compiled, dtype):
    case = prompts_and_responses(dtype=dtype)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]

    def loss(hidden, weight):
        return linear_token_loss(
            hidden, weight, case.targets, lambda stats, rows: coupled(stats, case.targets[rows]), backend=backend
        ).loss

    value = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(*leaves)
    stats = linear_token_stats(*leaves, case.targets, backend=backend)
    expected = coupled(stats, case.targets)[case.targets != -100].sum()
    torch.testing.assert_close(value, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    gradients = [torch.autograd.grad(result, leaves) for result in (value, expected)]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * right.abs().max().item())


def loss_fn_of(case):
    def loss_fn(stats, rows):
        return stats.logprob * stats.entropy * case.upstream[0, rows] + stats.logsumexp

    return loss_fn


@pytest.mark.parametrize("fullgraph", [False, True])
def test_checkpointed_inside_a_compiled_function(backend, fullgraph):
    case = linear_case(9, 60, 8)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def head(hidden, weight):
        return linear_token_loss(hidden.sin(), weight, case.targets, loss_fn_of(case), backend=backend).loss

    def loss(hidden, weight):
        return 2 * checkpoint(head, hidden.tanh(), weight, use_reentrant=False)

    def gradients(function):
        return torch.autograd.grad(function(hidden, weight), [hidden, weight])

    stats = plain_linear(hidden.tanh().sin(), weight, case.targets)
    expected = torch.autograd.grad(2 * loss_fn_of(case)(stats, slice(None)).sum(), [hidden, weight])
    compiled = torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")
    # And eagerly afterwards, and not checkpointed, in the same process.
    for function in (compiled, loss, compiled, lambda *leaves: 2 * head(leaves[0].tanh(), leaves[1])):
        for left, right in zip(gradients(function), expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooks_while_traced", [False, True])
def test_saved_tensors_hooks_around_a_compiled_function(backend, hooks_while_traced):
    case = linear_case(9, 60, 8)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]

    def loss(hidden, weight):
        return linear_token_loss(hidden.sin(), weight, case.targets, loss_fn_of(case), backend=backend).loss

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    if not hooks_while_traced:
        compiled(*leaves)
    with torch.autograd.graph.save_on_cpu():
        offloaded = torch.autograd.grad(compiled(*leaves), leaves)
    for gradients in (offloaded, torch.autograd.grad(compiled(*leaves), leaves)):
        for left, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float32), pytest.param("native", torch.bfloat16, marks=needs_native)]
)
def test_any_number_of_rows_needs_few_graphs(backend, dtype):
    torch._dynamo.reset()
    weight = linear_case(1, 50, 8, dtype=dtype).weight.requires_grad_()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def loss(hidden, weight, targets, advantage):
        return linear_token_loss(
            hidden,
            weight,
            targets,
            lambda stats, rows: advantage[rows] * stats.logprob - 0.1 * stats.entropy,
            backend=backend,
            chunk_bytes=8 * 50 * 4,
        ).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counting)
    for number in (5, 1, 2, 9, 17, 33, 65, 75):
        case = linear_case(number, 50, 8, dtype=dtype, seed=number)
        hidden = case.hidden.requires_grad_()
        operands = hidden, weight, case.targets, case.upstream[0]
        results = []
        for function in (loss, compiled):
            value = function(*operands)
            results.append([value, *torch.autograd.grad(value, [hidden, weight])])
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * right.abs().max().item())
    # One for each power of two up to 16 chunks, and that of a single row.
    assert len(graphs) <= math.log2(16) + 1 + 1, len(graphs)


# A loss function and what it is given.


def test_changing_statistics_in_place_changes_no_result(backend):
    case = linear_case(9, 60, 8)
    weight = case.weight.requires_grad_()

    def loss_fn(stats, rows):
        with torch.no_grad():
            for column in (stats.entropy, stats.logsumexp, stats.target_logit, stats.argmax, stats.max_logit):
                column.zero_()
        return stats.logprob * 1.5

    options = {"with_argmax": True, "backend": backend}
    expected = linear_token_stats(case.hidden, weight, case.targets, **options)
    (gradient,) = torch.autograd.grad(1.5 * expected.logprob.sum(), weight)

    def call(weight, **more):
        return linear_token_loss(case.hidden, weight, case.targets, loss_fn, **options, **more)

    compiled = torch.compile(call, backend="aot_eager")
    checkpointed = functools.partial(checkpoint, call, use_reentrant=False)
    for function in (call, functools.partial(call, chunk_bytes=1000), compiled, checkpointed):
        result = function(weight)
        for column, other in zip(result.stats, expected, strict=True):
            torch.testing.assert_close(column, other.detach())
        torch.testing.assert_close(torch.autograd.grad(result.loss, weight)[0], gradient, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for function in (call, functools.partial(call, chunk_bytes=1000)):
            assert torch.equal(function(weight).stats.entropy, expected.entropy)
    _, pull_back = torch.func.vjp(lambda weight: call(weight).loss, weight.detach())
    torch.testing.assert_close(pull_back(torch.tensor(1.0))[0], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_depends_on_its_chunk_is_refused(backend, compiled):
    case = linear_case(12, 60, 8)
    hidden = case.hidden.requires_grad_()

    def normalised(stats, rows):
        return stats.logprob - stats.logprob.mean()

    def call(hidden, loss_fn, chunk_bytes=None):
        return linear_token_loss(hidden, case.weight, case.targets, loss_fn, backend=backend, chunk_bytes=chunk_bytes)

    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    odd = torch.ones(12)
    odd[3], odd[7] = torch.nan, torch.inf
    for leaf in (hidden, hidden.detach()):
        with pytest.raises(ValueError, match=r"loss_fn gives row \d+ the loss .* in its chunk and .* among all rows"):
            call(leaf, normalised, 4 * 60 * 4)
        assert call(leaf, normalised).loss.isfinite()
        # Another row's statistics, within one chunk and across two.
        with pytest.raises(ValueError, match="row 6 "):
            call(leaf, lambda stats, rows: stats.logprob + (stats.logprob[:1] if rows.start > 5 else 0), 9 * 60 * 4)
        # NaN and infinite losses are the same in both.
        assert call(leaf, lambda stats, rows: stats.logprob * odd[rows], 4 * 60 * 4).loss.isnan()


# Registration.


def test_operators_that_read_values_are_no_part_of_cuda_graphs():
    modules = ops, linear_loss, parallel  # which register them
    operators = {
        value._opoverload for module in modules for value in vars(module).values() if hasattr(value, "_opoverload")
    }
    names = {operator._schema.name.split("::")[1] for operator in operators}
    assert len(names) == 10, names
    unsafe = {
        operator._schema.name.split("::")[1] for operator in operators if torch.Tag.cudagraph_unsafe in operator.tags
    }
    assert names - unsafe == {"attach_gradients"}  # a copy


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)
def test_reduce_overhead_traces(backend):
    case = linear_case(6, 60, 8)
    case = case._replace(options={"backend": backend})
    compiled = torch.compile(linear_token_stats, mode="reduce-overhead", fullgraph=True)
    actual, expected = run_linear(compiled, case), run_linear(linear_token_stats, case)
    for left, right in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": torch.linspace(0.5, 2, 6), "label_smoothing": 0.1},
        {"with_entropy": False, "with_argmax": True, "softcap": 5.0},
    ],
)
def test_options_compile(backend, options):
    case = linear_case(6, 60, 8, bias=True, **options)
    case.upstream[3] *= options.get("with_entropy", True)
    op = functools.partial(linear_token_stats, backend=backend)
    actual, expected = (run_linear(f, case) for f in (torch.compile(op, fullgraph=True, backend="aot_eager"), op))
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)
    logits = torch.randn(6, 60)
    function = functools.partial(token_stats, backend=backend, **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for left, right in zip(compiled(logits, case.targets), function(logits, case.targets), strict=True):
        torch.testing.assert_close(left, right)
