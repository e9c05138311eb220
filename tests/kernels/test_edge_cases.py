"""The numbered edge cases of the fused ops, each for every backend that runs on this CPU.

``tests/gpu`` runs the same on a GPU: what a test makes, it makes on torch's default device.

``linear_op`` stands for ``linear_token_stats``, and for ``linear_token_loss`` with a loss that has any gradients.
"""

import functools
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from kernel_checks import (
    check_linear,
    check_logits,
    in_float64,
    linear_case,
    plain_linear,
    poisoned_memory,
    run_linear,
    run_logits,
    stats_by_loss,
)
from repirl_kernels import linear_token_loss, linear_token_stats, native, token_stats
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(
    params=[
        "reference",
        pytest.param("native", marks=pytest.mark.skipif(not native.is_available(), reason="not built")),
    ]
)
def backend(request):
    return request.param


@pytest.fixture(params=[linear_token_stats, stats_by_loss], ids=["stats", "loss"])
def linear_op(request, backend):
    return functools.partial(request.param, backend=backend)


@pytest.fixture
def stats_op(backend):
    return functools.partial(linear_token_stats, backend=backend)


@pytest.fixture
def logits_op(backend):
    return functools.partial(token_stats, backend=backend)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_edge_case_01_large_logits(linear_op, logits_op, scale, offset):
    case = linear_case(7, 97, 16)
    logits = torch.randn(7, 97) * scale + offset
    check_logits(logits_op, logits, case.targets, case.upstream)
    check_linear(linear_op, case._replace(weight=case.weight * scale, bias=torch.full((97,), offset)))


def test_edge_case_01_logprob_and_entropy_keep_their_precision_at_an_offset(logits_op):
    # Exactly representable, so that the offset changes nothing but the representation.
    logits = torch.randint(-64, 64, (5, 50)) / 16.0
    targets = torch.arange(5)
    near, far = logits_op(logits, targets), logits_op(logits + 8192.0, targets)
    torch.testing.assert_close(far.logprob, near.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(far.entropy, near.entropy, rtol=1e-6, atol=1e-6)


def test_edge_case_01_gradients_keep_their_precision_at_an_offset(logits_op):
    logits = torch.randint(-64, 64, (5, 50)) / 16.0
    upstream = torch.randn(4, 5)
    near = run_logits(logits_op, logits, torch.arange(5), upstream)
    far = run_logits(logits_op, logits + 8192.0, torch.arange(5), upstream)
    torch.testing.assert_close(far.dhidden, near.dhidden, rtol=1e-5, atol=1e-6)


def test_edge_case_02_all_logits_very_negative(linear_op, logits_op):
    case = linear_case(6, 65, 8)
    for level in (-1e4, -3e4, -1e30):
        check_logits(logits_op, torch.randn(6, 65) + level, case.targets, case.upstream)
    check_linear(linear_op, case._replace(bias=torch.full((65,), -3e4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_columns", "num_features"), [(1, 1), (2, 3), (3, 17), (31, 64), (997, 33), (1025, 100)])
def test_edge_case_03_odd_shapes(linear_op, logits_op, num_columns, num_features, dtype):
    case = linear_case(5, num_columns, num_features, dtype=dtype, bias=True)
    check_linear(linear_op, case)
    check_logits(logits_op, torch.randn(5, num_columns).to(dtype) * 2, case.targets, case.upstream)


def test_edge_case_04_no_rows_and_one_row(linear_op, logits_op):
    check_linear(linear_op, linear_case(1, 40, 8, bias=True))
    case = linear_case(0, 40, 8, bias=True)
    outcome = run_linear(linear_op, case)
    assert outcome.stats.shape == (4, 0)
    assert outcome.dhidden.shape == (0, 8)
    assert torch.equal(outcome.dweight, torch.zeros(40, 8))
    assert torch.equal(outcome.dbias, torch.zeros(40))
    assert run_logits(logits_op, torch.zeros(0, 40), case.targets, case.upstream).dhidden.shape == (0, 40)


@pytest.mark.parametrize("how", ["ignore_index", "row_mask"])
def test_edge_case_05_every_row_ignored(linear_op, logits_op, how):
    case = linear_case(3, 40, 8, bias=True)
    targets = torch.full((3,), -100) if how == "ignore_index" else case.targets
    options = {} if how == "ignore_index" else {"row_mask": torch.zeros(3, dtype=torch.bool)}
    case = case._replace(hidden=torch.full((3, 8), torch.nan), targets=targets, options=options)
    with poisoned_memory():
        outcome = run_linear(linear_op, case)
        logits = run_logits(logits_op, torch.full((3, 40), torch.nan), targets, case.upstream, **options)
    for tensor in (*outcome, logits.stats, logits.dhidden):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_edge_case_05_ignored_rows_leak_nothing(linear_op, logits_op):
    case = linear_case(8, 40, 6, bias=True)
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    poisoned = case._replace(hidden=case.hidden.clone(), options={"row_mask": keep})
    poisoned.hidden[~keep] = torch.nan
    few = case._replace(hidden=case.hidden[keep], targets=case.targets[keep], upstream=case.upstream[:, keep])
    with poisoned_memory():
        actual, expected = run_linear(linear_op, poisoned), run_linear(linear_op, few)
    assert torch.equal(actual.stats[:, keep], expected.stats)
    assert torch.equal(actual.stats[:, ~keep], torch.zeros(4, 3))
    assert torch.equal(actual.dhidden[keep], expected.dhidden)
    assert torch.equal(actual.dhidden[~keep], torch.zeros(3, 6))
    assert torch.equal(actual.dweight, expected.dweight)
    assert torch.equal(actual.dbias, expected.dbias)
    logits = torch.randn(8, 40)
    logits[~keep] = torch.nan
    outcome = run_logits(logits_op, logits, case.targets, case.upstream, row_mask=keep)
    assert torch.equal(outcome.dhidden[~keep], torch.zeros(3, 40))
    assert bool(outcome.dhidden[keep].isfinite().all())


def test_edge_case_05_rows_without_upstream_gradient_leak_nothing(linear_op):
    case = linear_case(8, 40, 6, bias=True)
    case.hidden[2] = torch.nan
    case.upstream[:, 2] = 0
    outcome = run_linear(linear_op, case)
    assert bool(outcome.stats[:, 2].isnan().all())
    others = torch.arange(8) != 2
    few = case._replace(hidden=case.hidden[others], targets=case.targets[others], upstream=case.upstream[:, others])
    expected = run_linear(linear_op, few)
    assert torch.equal(outcome.dweight, expected.dweight)
    assert torch.equal(outcome.dhidden[2], torch.zeros(6))


@pytest.mark.parametrize("value", [-1, 40, 2**31])
def test_edge_case_06_targets_out_of_range(linear_op, logits_op, value):
    case = linear_case(3, 40, 8)
    case.targets[1] = value
    message = rf"target {value} in row 1 is outside \[0, 40\)"
    with pytest.raises(ValueError, match=message):
        linear_op(case.hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match=message):
        logits_op(torch.zeros(3, 40), case.targets)
    with pytest.raises(ValueError, match=r"outside \[0, 30\)"):
        logits_op(torch.zeros(3, 40), torch.tensor([0, 30, 1]), vocab_size=30)
    mask = torch.tensor([True, False, True])
    assert linear_op(case.hidden, case.weight, case.targets, row_mask=mask).logprob[1] == 0


def test_edge_case_07_ignore_index_inside_the_vocabulary(linear_op, logits_op):
    case = linear_case(4, 10, 8)
    targets = torch.tensor([3, 5, 3, 0])
    outcome = run_linear(linear_op, case._replace(targets=targets, options={"ignore_index": 3}))
    masked = run_linear(linear_op, case._replace(targets=targets, options={"row_mask": targets != 3}))
    assert torch.equal(outcome.stats, masked.stats)
    assert torch.equal(outcome.dweight, masked.dweight)
    assert torch.equal(logits_op(torch.randn(4, 10), targets, ignore_index=3).logprob == 0, targets == 3)


def test_edge_case_08_strided_inputs_and_upstream_gradients(linear_op, logits_op):
    case = linear_case(6, 40, 8, bias=True)
    expected = run_linear(linear_op, case)

    def strided(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] * 2), torch.nan, dtype=tensor.dtype)
        wide[:, ::2] = tensor
        return wide[:, ::2]

    layouts = [strided, lambda tensor: tensor.T.contiguous().T]
    for layout in layouts:
        hidden, weight = layout(case.hidden).requires_grad_(), layout(case.weight).requires_grad_()
        bias = torch.stack([case.bias, case.bias], dim=1)[:, 0].requires_grad_()
        stats = torch.stack(list(linear_op(hidden, weight, case.targets, bias=bias)))
        assert torch.equal(stats, expected.stats)
        gradients = torch.autograd.grad(stats, [hidden, weight, bias], layout(case.upstream))
        for gradient, other in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6)
        logits = torch.randn(6, 40)
        assert torch.equal(logits_op(layout(logits), case.targets).entropy, logits_op(logits, case.targets).entropy)
    # sum() sends back one number expanded to every row.
    ones = run_linear(linear_op, case._replace(upstream=torch.ones(4, 6)))
    weight = case.weight.clone().requires_grad_()
    stats = linear_op(case.hidden, weight, case.targets, bias=case.bias)
    sum(output.sum() for output in stats).backward()
    torch.testing.assert_close(weight.grad, ones.dweight, rtol=0, atol=1e-6)
    # One hidden state expanded to all rows, and batch axes.
    expanded = linear_op(case.hidden[:1].expand(6, 8), case.weight, case.targets, bias=case.bias)
    torch.testing.assert_close(expanded.entropy, expected.stats[3, :1].expand(6))
    batched = linear_op(case.hidden.view(2, 3, 8), case.weight, case.targets.view(2, 3), bias=case.bias)
    assert torch.equal(batched.logprob.flatten(), expected.stats[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_case_08_one_feature_transposed(linear_op, dtype):
    # Such a tensor is contiguous to torch whatever its strides say.
    case = linear_case(5, 7, 1, dtype=dtype)
    transposed = case._replace(hidden=case.hidden.view(1, 5).T, weight=case.weight.view(1, 7).T)
    check_linear(linear_op, transposed)
    stats = linear_op(transposed.hidden, transposed.weight, case.targets)
    assert torch.equal(stats.entropy, linear_op(case.hidden, case.weight, case.targets).entropy)


def test_edge_case_09_more_than_2_to_31_logits():
    # V * D > 2**31 needs more memory than a test on a CPU should take: tests/gpu has it.
    num_rows, num_columns = 2**16 + 1, 2**15 + 1
    hidden, weight = torch.randn(num_rows, 1), torch.randn(num_columns, 1)
    targets = torch.randint(num_columns, (num_rows,))
    stats = linear_token_stats(hidden, weight, targets)
    some = torch.tensor([0, 1, 2**15, 2**16 - 1, 2**16])
    expected = plain_linear(hidden[some].double(), weight.double(), targets[some])
    for actual, truth in zip(stats, expected, strict=True):
        torch.testing.assert_close(actual[some].double(), truth, rtol=2e-6, atol=2e-6)


def test_edge_case_10_a_nan_row_leaves_the_others_untouched(linear_op, logits_op):
    case = linear_case(6, 70, 8)
    clean = run_linear(linear_op, case)
    case.hidden[3, 2] = torch.nan
    outcome = run_linear(linear_op, case)
    others = torch.arange(6) != 3
    assert bool(outcome.stats[:, 3].isnan().all())
    assert torch.equal(outcome.stats[:, others], clean.stats[:, others])
    assert torch.equal(outcome.dhidden[others], clean.dhidden[others])
    # A NaN in one column is not lost beside banned ones, wherever it lies.
    for column in (0, 35, 69):
        logits = torch.full((2, 70), -torch.inf)
        logits[0, column] = torch.nan
        logits[1, 7] = 0.0
        stats = logits_op(logits, torch.tensor([7, 7]))
        assert math.isnan(stats.logprob[0])
        assert math.isnan(stats.entropy[0])
        assert stats.logprob[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_case_11_banned_tokens(linear_op, logits_op, dtype):
    case = linear_case(6, 2100, 8, dtype=dtype, bias=True)
    case.bias[:1500] = -torch.inf  # more than one block, so that a whole block is banned
    case.bias[1700:1800] = -torch.inf
    targets = 1500 + case.targets % 200
    check_linear(linear_op, case._replace(targets=targets))
    logits = torch.randn(6, 2100).to(dtype)
    logits[:, :1300] = -torch.inf
    check_logits(logits_op, logits, targets, case.upstream)
    with torch.no_grad():
        banned = logits_op(logits, torch.zeros(6, dtype=torch.int64))
    assert bool((banned.logprob == -torch.inf).all())
    assert bool(banned.entropy.isfinite().all())


def test_edge_case_11_a_banned_target_passes_finite_gradients(linear_op):
    case = linear_case(4, 50, 8, bias=True)
    case.bias[5] = -torch.inf
    case = case._replace(targets=torch.full((4,), 5))
    case.upstream[2] = 0  # the target logit alone is -inf, its gradient is not
    outcome = run_linear(linear_op, case)
    expected = run_linear(plain_linear, in_float64(case))
    torch.testing.assert_close(outcome.dbias.double(), expected.dbias, rtol=1e-5, atol=1e-6)


def test_edge_case_11_rows_without_a_distribution_are_nan(logits_op):
    logits = torch.zeros(3, 40)
    logits[0, 3] = torch.inf
    logits[1] = -torch.inf
    outcome = run_logits(logits_op, logits, torch.zeros(3, dtype=torch.int64), torch.ones(4, 3))
    assert bool(outcome.stats[[0, 1, 3], :2].isnan().all())
    assert bool(outcome.dhidden[:2].isnan().all())
    assert outcome.stats[3, 2].item() == pytest.approx(math.log(40))
    assert bool(outcome.dhidden[2].isfinite().all())


def test_edge_case_12_confident_target_with_gradient_on_logsumexp_alone(linear_op, logits_op):
    # p(target) = 1 - 1e-7: an implementation that filters small p - 1[target] loses the gradient, which is p.
    logits = torch.zeros(1, 11)
    logits[0, 4] = math.log((1 - 1e-7) / 1e-8)
    logits.requires_grad_()
    logits_op(logits, torch.tensor([4])).logsumexp.sum().backward()
    assert logits.grad[0, 4].item() == pytest.approx(1.0, abs=1e-6)
    assert logits.grad[0, 0].item() == pytest.approx(1e-8, rel=1e-4)
    bias = logits.detach()[0].clone().requires_grad_()
    linear_op(torch.zeros(1, 3), torch.zeros(11, 3), torch.tensor([4]), bias=bias).logsumexp.sum().backward()
    torch.testing.assert_close(bias.grad, logits.grad[0])


def test_edge_case_13_one_hot_and_uniform_rows(logits_op):
    logits = torch.zeros(2, 1000)
    logits[0, 17] = 500.0
    upstream = torch.ones(4, 2)
    outcome = run_logits(logits_op, logits, torch.tensor([17, 17]), upstream)
    assert outcome.stats[:, 0].tolist() == [0.0, 500.0, 500.0, 0.0]
    torch.testing.assert_close(outcome.stats[:, 1], torch.tensor([-1.0, 1.0, 0.0, 1.0]) * math.log(1000))
    check_logits(logits_op, logits, torch.tensor([17, 3]), torch.randn(4, 2))


@pytest.mark.parametrize("outputs", [[0], [1], [2], [3], [0, 1, 2, 3]])
def test_edge_case_14_each_gradient_alone(linear_op, logits_op, outputs):
    case = linear_case(6, 60, 8, bias=True, temperature=0.8, softcap=4.0)
    upstream = torch.zeros(4, 6)
    upstream[outputs] = case.upstream[outputs]
    check_linear(linear_op, case._replace(upstream=upstream))
    check_logits(logits_op, torch.randn(6, 60), case.targets, upstream)
    # The same through one output's own graph, where the other outputs get no gradient at all.
    hidden = case.hidden.clone().requires_grad_()
    stats = linear_op(hidden, case.weight, case.targets, bias=case.bias, **case.options)
    loss = sum((stats[index] * upstream[index]).sum() for index in outputs)
    expected = run_linear(linear_op, case._replace(upstream=upstream)).dhidden
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_edge_case_15_only_one_input_requires_a_gradient(linear_op, needed):
    case = linear_case(6, 60, 8, bias=True)
    expected = run_linear(linear_op, case)
    inputs = {name: getattr(case, name).clone() for name in ("hidden", "weight", "bias")}
    inputs[needed].requires_grad_()
    stats = torch.stack(list(linear_op(inputs["hidden"], inputs["weight"], case.targets, bias=inputs["bias"])))
    stats.backward(case.upstream)
    assert torch.equal(inputs[needed].grad, getattr(expected, "d" + needed))
    assert [name for name, tensor in inputs.items() if tensor.grad is not None] == [needed]


def test_edge_case_16_no_grad_equals_grad_mode(linear_op, logits_op):
    case = linear_case(6, 60, 8)
    logits = torch.randn(6, 60, requires_grad=True)
    with_grad = (
        linear_op(case.hidden, case.weight.requires_grad_(), case.targets),
        logits_op(logits, case.targets),
    )
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            without = linear_op(case.hidden, case.weight, case.targets), logits_op(logits, case.targets)
        for left, right in zip(with_grad, without, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_edge_case_17_compiles_whole_with_a_dynamic_number_of_rows(stats_op, logits_op):
    weight = torch.randn(60, 8, requires_grad=True)

    def loss(hidden, weight, targets):
        fused = stats_op(hidden, weight, targets, temperature=0.9)
        unfused = logits_op(hidden @ weight.T, targets)
        return (fused.logprob * fused.entropy + unfused.logsumexp - unfused.target_logit).sum()

    check_compiled(loss, weight)


def test_edge_case_17_compiles_whole_with_a_loss_function(backend):
    weight = torch.randn(60, 8, requires_grad=True)

    def loss(hidden, weight, targets):
        advantage = targets / 30 - 1

        def loss_fn(stats, rows):
            return advantage[rows] * stats.logprob * stats.entropy

        return 3 * linear_token_loss(hidden, weight, targets, loss_fn, backend=backend).loss

    check_compiled(loss, weight)


def check_compiled(loss, weight):
    """Values and gradients, one graph for every number of rows, and the errors that depend on values."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (3, 7, 12):
        hidden = torch.randn(num_rows, 8, requires_grad=True)
        targets = torch.randint(60, (num_rows,))
        targets[1] = -100
        results = []
        for function in (loss, compiled):
            value = function(hidden, weight, targets)
            results.append((value, *torch.autograd.grad(value, [hidden, weight])))
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with pytest.raises(ValueError, match="target 60 in row 0"):
        compiled(torch.randn(3, 8), weight, torch.tensor([60, 0, 0]))


def test_edge_case_18_activation_checkpointing_and_retain_graph(linear_op):
    case = linear_case(6, 60, 8)
    expected = run_linear(linear_op, case)

    def stacked(hidden, weight):
        return torch.stack(list(linear_op(hidden, weight, case.targets)))

    for use_reentrant in (False, True):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        checkpoint(stacked, hidden, weight, use_reentrant=use_reentrant).backward(case.upstream)
        assert torch.equal(hidden.grad, expected.dhidden)
        assert torch.equal(weight.grad, expected.dweight)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    stats = stacked(hidden, weight)
    first = torch.autograd.grad(stats, [hidden, weight], case.upstream, retain_graph=True)
    second = torch.autograd.grad(stats, [hidden, weight], case.upstream)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_edge_case_19_autocast_casts_as_linear_does(linear_op):
    case = linear_case(6, 60, 8, bias=True)
    rounded = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    expected = run_linear(linear_op, rounded)
    with torch.autocast(case.hidden.device.type, torch.bfloat16):
        actual = run_linear(linear_op, case)
        assert F.linear(case.hidden, case.weight).dtype == torch.bfloat16
        in_double = run_linear(linear_token_stats, in_float64(case))
    assert torch.equal(actual.stats, expected.stats)
    assert actual.stats.dtype == torch.float32
    assert actual.dweight.dtype == torch.float32
    assert torch.equal(actual.dweight, expected.dweight.float())
    assert in_double.stats.dtype == torch.float64


@pytest.mark.parametrize("hidden_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_edge_case_19_mixed_dtypes_promote(linear_op, hidden_dtype, weight_dtype):
    case = linear_case(6, 60, 8, bias=True)
    case = case._replace(hidden=case.hidden.to(hidden_dtype), weight=case.weight.to(weight_dtype))
    common = torch.promote_types(hidden_dtype, weight_dtype)
    outcome = run_linear(linear_op, case)
    expected = run_linear(linear_op, case._replace(hidden=case.hidden.to(common), weight=case.weight.to(common)))
    assert torch.equal(outcome.stats, expected.stats)
    assert outcome.dhidden.dtype == hidden_dtype
    assert outcome.dweight.dtype == weight_dtype
    assert outcome.dbias.dtype == torch.float32
    assert torch.equal(outcome.dweight, expected.dweight.to(weight_dtype))


class _Head(torch.nn.Linear):
    def forward(self, hidden, targets):
        return torch.stack(list(linear_token_stats(hidden, self.weight, targets)))


def fsdp_rank(rank: int, init_file: str, num_ranks: int, device: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{init_file}", rank=rank, world_size=num_ranks)
    torch.set_num_threads(1)
    case = linear_case(12, 257, 8, device=device)
    head = _Head(8, 257, bias=False, device=device)
    with torch.no_grad():
        head.weight.copy_(case.weight)
    fully_shard(head, mesh=init_device_mesh(device, (num_ranks,)))
    with pytest.raises(TypeError, match=r"DTensor.*full_tensor"):
        linear_token_stats(case.hidden, head.weight, case.targets)
    share = 12 // num_ranks
    mine = slice(share * rank, share * (rank + 1))
    stats = head(case.hidden[mine], case.targets[mine])
    stats.backward(case.upstream[:, mine])
    expected = run_linear(linear_token_stats, case)
    torch.testing.assert_close(stats, expected.stats[:, mine], rtol=1e-6, atol=1e-6)
    assert isinstance(head.weight.grad, DTensor)
    torch.testing.assert_close(head.weight.grad.full_tensor() * num_ranks, expected.dweight, rtol=1e-5, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def test_edge_case_20_fsdp_weights_in_uneven_shards(tmp_path):
    # 257 rows do not divide by 2: the shards are 129 and 128 rows.
    mp.spawn(fsdp_rank, args=(str(tmp_path / "rendezvous"), 2, "cpu"), nprocs=2)


def test_edge_case_21_tied_embeddings(linear_op):
    weight = torch.randn(50, 8, dtype=torch.float32, requires_grad=True)
    tokens = torch.randint(50, (9,))
    gradients = []
    for op in (linear_op, plain_linear):
        stats = op(F.embedding(tokens, weight).tanh(), weight, tokens.roll(-1))
        gradients.append(torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1, 37, 63])
def test_edge_case_21_padded_columns(linear_op, logits_op, vocab_size):
    case = linear_case(6, 64, 8, bias=True, vocab_size=vocab_size)
    check_linear(linear_op, case)
    case.weight[vocab_size:] = torch.nan
    with poisoned_memory():
        outcome = run_linear(linear_op, case)
        logits = torch.randn(6, 64)
        logits[:, vocab_size:] = torch.nan
        dlogits = run_logits(logits_op, logits, case.targets, case.upstream, vocab_size=vocab_size).dhidden
    assert bool(outcome.stats.isfinite().all())
    assert bool(outcome.dhidden.isfinite().all())
    for padding in (outcome.dweight[vocab_size:], outcome.dbias[vocab_size:], dlogits[:, vocab_size:]):
        assert torch.equal(padding, torch.zeros_like(padding))


def test_edge_case_22_run_to_run_bitwise(linear_op, logits_op):
    case = linear_case(64, 3000, 32, bias=True)
    first, second = run_linear(linear_op, case), run_linear(linear_op, case)
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    logits = torch.randn(64, 3000)
    first, second = (run_logits(logits_op, logits, case.targets, case.upstream) for _ in range(2))
    assert torch.equal(first.dhidden, second.dhidden)


def test_edge_case_22_a_row_alone_equals_that_row_in_a_batch(linear_op, logits_op):
    case = linear_case(64, 3000, 32)
    batch = run_linear(linear_op, case)
    logits = torch.randn(64, 3000)
    in_batch = run_logits(logits_op, logits, case.targets, case.upstream)
    for row in (0, 17, 63):
        one = slice(row, row + 1)
        alone = run_linear(
            linear_op,
            case._replace(hidden=case.hidden[one], targets=case.targets[one], upstream=case.upstream[:, one]),
        )
        torch.testing.assert_close(alone.stats, batch.stats[:, one], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(alone.dhidden, batch.dhidden[one], rtol=1e-5, atol=1e-6)
        # Without a product nothing is left to differ.
        alone = run_logits(logits_op, logits[one], case.targets[one], case.upstream[:, one])
        assert torch.equal(alone.stats, in_batch.stats[:, one])
        assert torch.equal(alone.dhidden, in_batch.dhidden[one])


@pytest.mark.parametrize("options", [{"temperature": 0.01}, {"softcap": 0.5}, {"temperature": 0.01, "softcap": 1.0}])
def test_edge_case_23_low_temperature_and_saturated_softcap(linear_op, logits_op, options):
    # Logits of standard deviation 20 under a softcap of 0.5: tanh is 1 in float32, its slope 0.
    case = linear_case(6, 60, 8, scale=20.0, **options)
    check_linear(linear_op, case)
    check_logits(logits_op, torch.randn(6, 60) * 20, case.targets, case.upstream, **options)


def test_edge_case_24_double_backward_refuses(stats_op, logits_op, backend):
    case = linear_case(4, 20, 8)
    hidden = case.hidden.requires_grad_()
    result = linear_token_loss(
        hidden, case.weight, case.targets, lambda stats, rows: stats.logprob.square(), backend=backend
    )
    with pytest.raises(RuntimeError, match="gradient of a gradient"):
        torch.autograd.grad(result.loss, hidden, create_graph=True)
    for stats in (
        stats_op(hidden, case.weight, case.targets),
        logits_op(hidden @ case.weight.T, case.targets),
    ):
        (gradient,) = torch.autograd.grad(stats.logprob.sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="gradient of a gradient"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_edge_case_25_unsupported_dtypes(linear_op, logits_op, dtype):
    good, bad = torch.zeros(3, 8), torch.zeros(3, 8).to(dtype)
    targets = torch.zeros(3, dtype=torch.int64)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"hidden has dtype {name}"):
        linear_op(bad, good, targets)
    with pytest.raises(TypeError, match=f"weight has dtype {name}"):
        linear_op(good, bad, targets)
    with pytest.raises(TypeError, match=f"bias has dtype {name}"):
        linear_op(good, good, targets, bias=bad[:, 0])
    with pytest.raises(TypeError, match=f"logits has dtype {name}"):
        logits_op(bad, targets)


def test_edge_case_25_targets_and_masks_of_the_wrong_dtype(linear_op, logits_op):
    hidden, targets = torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="targets has dtype float32"):
        linear_op(hidden, hidden, targets.float())
    with pytest.raises(TypeError, match="row_mask has dtype int64"):
        logits_op(hidden, targets, row_mask=targets)
    stats = logits_op(hidden, targets.int())
    assert torch.equal(stats.logprob, logits_op(hidden, targets).logprob)
