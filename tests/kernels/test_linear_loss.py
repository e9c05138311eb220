"""``linear_token_loss`` beyond the edge cases: chunks, scales, ``main_grad``, memory, and what it refuses."""

import functools
import itertools

import pytest
import torch
from kernel_checks import check_linear, linear_case, run_linear, stats_by_loss
from repirl_kernels import TokenStats, linear_loss, linear_token_loss, linear_token_stats, native, policy_loss
from repirl_kernels.operands import Options
from repirl_kernels.rows import RowStats
from torch.utils.checkpoint import checkpoint

BACKENDS = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(not native.is_available(), reason="not built")),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def loss_of(case, **options):
    """The upstream gradients' product with the statistics."""

    def loss_fn(stats, rows):
        return (case.upstream[:, rows] * torch.stack(list(stats))).sum(dim=0)

    options = {"bias": case.bias, **case.options, **options}
    return linear_token_loss(case.hidden, case.weight, case.targets, loss_fn, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_in_a_chunk", [1, 5, 8])
@pytest.mark.parametrize("shape", [(17, 70, 9), (16, 997, 33)])
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_chunks(backend, shape, rows_in_a_chunk, dtype, softcap):
    op = functools.partial(stats_by_loss, backend=backend, chunk_bytes=rows_in_a_chunk * shape[1] * 4)
    check_linear(op, linear_case(*shape, dtype=dtype, bias=True, temperature=0.8, softcap=softcap))


needs_products = pytest.mark.skipif(
    not native.has_products(torch.bfloat16), reason="on this machine logits are kept, and by torch's products"
)


# Several groups of columns, one of 48 columns, a part of one; more rows than features, whose values do not all fit into
# the memory of the weight's gradient, and fewer.
@needs_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 2100, 64), (20, 300, 4097), (130, 1009, 31), (9, 31, 8)])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.05}, {"softcap": 5.0}, {"vocab_size": 30}],  # 0.05: e^-60 and less beside 1
)
@pytest.mark.parametrize("frozen", [False, True])
def test_values_kept_for_the_gradients(shape, dtype, options, frozen, monkeypatch):
    lent = []
    original = linear_loss._chunk_backward
    monkeypatch.setattr(linear_loss, "_chunk_backward", lambda *args: lent.append(args[18]) or original(*args))
    case = linear_case(*shape, dtype=dtype, bias=True, **options)
    case.upstream[:, ::3] = 0  # rows that are there in the forward pass and not in the backward pass
    case.upstream[3, 1::3] = 0  # no entropy: their logarithms are not needed
    case.bias[:7], case.targets[2] = -torch.inf, 3  # banned tokens, one of them a target
    leaves = [case.hidden.requires_grad_(), case.bias.requires_grad_(), *([] if frozen else [case.weight])]
    case.weight.requires_grad_(not frozen)
    result = loss_of(case, backend="native")
    stats = linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias, backend="native", **options)
    assert torch.equal(torch.stack(list(result.stats)), torch.stack(list(stats)).detach())
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-5
    actual = torch.autograd.grad(result.loss, leaves)
    expected = torch.autograd.grad(list(stats), leaves, list(case.upstream))
    for gradient, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=2 * tolerance, atol=tolerance * other.abs().max().item())
    assert [dweight is None for dweight in lent] == [frozen]
    if not frozen and "softcap" not in options:
        op = functools.partial(stats_by_loss, backend="native")
        check_linear(op, case._replace(targets=case.targets.clamp(min=7)))


@needs_products
def test_nan_and_infinity_pass_through_kept_exponentials():
    case = linear_case(12, 700, 16, dtype=torch.bfloat16)
    case.hidden[3, 2], case.hidden[5] = torch.nan, 1e38  # logits of both signs beyond float32
    actual = run_linear(functools.partial(stats_by_loss, backend="native"), case)
    expected = run_linear(functools.partial(linear_token_stats, backend="native"), case)
    poisoned = torch.tensor([3, 5])
    assert actual.dhidden[poisoned].isnan().all()
    assert expected.dhidden[poisoned].isnan().all()
    assert torch.equal(actual.dhidden.isfinite(), expected.dhidden.isfinite())
    assert actual.dweight.isnan().all()


@needs_products
def test_no_row_has_a_gradient():
    case = linear_case(6, 40, 8)
    case.weight.requires_grad_()
    case.upstream.zero_()  # nothing runs backward, and what was kept stands in the gradient's memory
    loss_of(case, backend="native").loss.backward()
    assert torch.equal(case.weight.grad, torch.zeros(40, 8))


@pytest.mark.parametrize("instruction_set", ["baseline", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instruction_sets(instruction_set, dtype):
    if instruction_set not in native.instruction_sets():
        pytest.skip(f"no {instruction_set} on this machine")
    before = native.instruction_set()
    native.use_instruction_set(instruction_set)
    try:
        op = functools.partial(stats_by_loss, backend="native", chunk_bytes=9 * 1100 * 4)
        check_linear(op, linear_case(37, 1100, 49, dtype=dtype, bias=True, vocab_size=1090))
    finally:
        native.use_instruction_set(before)


def test_chunks_cover_each_row_once_and_say_which():
    case = linear_case(10, 50, 8)
    seen = []

    def loss_fn(stats, rows):
        seen.append((rows.start, rows.stop))
        return stats.logprob

    result = linear_token_loss(case.hidden, case.weight, case.targets, loss_fn, chunk_bytes=4 * 50 * 4)
    # The last calls check that no row depends on its chunk.
    assert seen == [(0, 3), (3, 6), (6, 10), (0, 10), (0, 10)]
    expected = linear_token_stats(case.hidden, case.weight, case.targets)
    torch.testing.assert_close(result.token_loss, expected.logprob)
    for column, other in zip(result.stats, expected, strict=True):
        torch.testing.assert_close(column, other)
        assert not column.requires_grad


def test_a_policy_loss_has_the_gradients_of_linear_token_stats(backend):
    case = linear_case(24, 90, 16)
    hidden, weight = case.hidden.view(2, 12, 16).requires_grad_(), case.weight.requires_grad_()
    targets, mask = case.targets.view(2, 12), torch.arange(24).view(2, 12) % 5 > 0
    old_logprob, advantage, weights = torch.randn(24) - 4.5, torch.randn(24), torch.rand(24)

    def loss_fn(stats, rows):
        tokens = policy_loss(
            stats.logprob, old_logprob[rows], advantage[rows], entropy=stats.entropy, entropy_coefficient=0.01
        )
        return tokens.loss * weights[rows]

    result = linear_token_loss(hidden, weight, targets, loss_fn, row_mask=mask, backend=backend, chunk_bytes=2000)
    stats = linear_token_stats(hidden, weight, targets, row_mask=mask, backend=backend)
    tokens = loss_fn(TokenStats(*(column.flatten() for column in stats)), slice(0, 24)) * mask.flatten()
    torch.testing.assert_close(result.token_loss, tokens.view(2, 12).detach())
    torch.testing.assert_close(result.loss, tokens.sum())
    expected = torch.autograd.grad(tokens.sum(), [hidden, weight])
    for actual, other in zip(torch.autograd.grad(result.loss, [hidden, weight]), expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-6)


def test_upstream_gradients_scale(backend):
    case = linear_case(9, 40, 8, bias=True)
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_(), case.bias.requires_grad_()]
    once = torch.autograd.grad(loss_of(case, backend=backend).loss, leaves)
    scaled = torch.autograd.grad(loss_of(case, backend=backend).loss * 2.5 - 1, leaves)
    for left, right in zip(once, scaled, strict=True):
        torch.testing.assert_close(2.5 * left, right)
    # Several times through one graph, into .grad: what is kept must not have become the accumulator.
    loss = loss_of(case, backend=backend).loss
    for _ in range(3):
        loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [None, 4 * 40 * 4])
def test_main_grad(backend, dtype, chunk_bytes):
    case = linear_case(9, 40, 8, dtype=dtype)
    case = case._replace(hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_())
    expected = torch.autograd.grad(loss_of(case, backend="reference").loss, [case.hidden, case.weight])
    main_grad = torch.ones(40, 8)
    loss = loss_of(case, backend=backend, main_grad=main_grad, chunk_bytes=chunk_bytes).loss
    loss.backward()
    assert case.weight.grad is None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(case.hidden.grad, expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(main_grad - 1, expected[1].float(), rtol=tolerance, atol=tolerance)
    with pytest.raises(RuntimeError, match=r"upstream gradient of 1, got 0\.5"):
        (loss_of(case, backend=backend, main_grad=main_grad).loss / 2).backward()


def test_nothing_is_computed_that_is_not_wanted(monkeypatch):
    calls = []
    original = linear_loss._chunk_backward
    monkeypatch.setattr(linear_loss, "_chunk_backward", lambda *args: calls.append(args[7:10]) or original(*args))
    case = linear_case(6, 40, 8, bias=True)
    buffers = []
    forward = linear_loss._chunk_forward
    monkeypatch.setattr(linear_loss, "_chunk_forward", lambda *args: buffers.append(args[6]) or forward(*args))
    assert not loss_of(case).loss.requires_grad
    case.weight.requires_grad_()
    with torch.no_grad():
        assert not loss_of(case).loss.requires_grad
    assert calls == []
    assert buffers == [None, None]  # no logits are kept either
    loss_of(case._replace(hidden=case.hidden.requires_grad_(), weight=case.weight.detach())).loss.backward()
    assert calls == [(True, False, False)]


def test_the_logits_held_are_those_of_one_chunk(monkeypatch):
    sizes = []
    original = linear_loss._chunk_forward
    monkeypatch.setattr(linear_loss, "_chunk_forward", lambda *args: sizes.append(args[6].nbytes) or original(*args))
    case = linear_case(100, 50, 8)
    loss_of(case._replace(hidden=case.hidden.requires_grad_()), chunk_bytes=3000)
    assert max(sizes) <= 3000
    assert len(sizes) == 7


def test_under_activation_checkpointing_and_offloading():
    case = linear_case(8, 40, 8)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    expected = torch.autograd.grad(loss_of(case).loss, [hidden, weight])

    def loss(hidden, weight):
        return loss_of(case._replace(hidden=hidden.sin(), weight=weight)).loss

    plain = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    for use_reentrant in (False, True):
        value = checkpoint(loss, hidden, weight, use_reentrant=use_reentrant)
        value.backward()
        assert torch.equal(hidden.grad, plain[0])
        assert torch.equal(weight.grad, plain[1])
        hidden.grad = weight.grad = None
    with torch.autograd.graph.save_on_cpu():
        offloaded = torch.autograd.grad(loss_of(case).loss, [hidden, weight])
    assert all(torch.equal(left, right) for left, right in zip(offloaded, expected, strict=True))


def test_what_the_loss_function_may_not_do():
    case = linear_case(6, 40, 8)
    learned = torch.ones(6, requires_grad=True)
    call = functools.partial(linear_token_loss, case.hidden.requires_grad_(), case.weight, case.targets)
    with pytest.raises(ValueError, match=r"one loss for each of the rows, \(6,\), got \(\)"):
        call(lambda stats, rows: stats.logprob.mean())
    with pytest.raises(ValueError, match="got float"):
        call(lambda stats, rows: 1.0)
    with pytest.raises(ValueError, match=r"requires a gradient.*detach it"):
        call(lambda stats, rows: stats.logprob * learned[rows])
    with pytest.raises(ValueError, match="chunk_bytes must be > 0, got 0"):
        call(lambda stats, rows: stats.logprob, chunk_bytes=0)
    for wrong in (torch.zeros(8, 40).T, torch.zeros(8, 40)):
        with pytest.raises(ValueError, match=r"main_grad must be contiguous and of .* \(40, 8\) on cpu, got"):
            call(lambda stats, rows: stats.logprob, main_grad=wrong)
    with pytest.raises(ValueError, match="main_grad is on the meta device"):
        call(lambda stats, rows: stats.logprob, main_grad=torch.zeros(40, 8, device="meta"))
    with pytest.raises(TypeError, match="main_grad has dtype bfloat16, expected one of float32"):
        call(lambda stats, rows: stats.logprob, main_grad=torch.zeros(40, 8, dtype=torch.bfloat16))
    # Where no gradient is wanted none is missed.
    with torch.no_grad():
        assert call(lambda stats, rows: stats.logprob * learned[rows]).loss.isfinite()
        with pytest.raises(ValueError, match="one loss for each"):
            call(lambda stats, rows: stats.logprob.mean())
    # A loss that depends on none of the statistics has gradients, and they are zero.
    constant = call(lambda stats, rows: torch.ones(6))
    constant.loss.backward()
    assert constant.loss == 6
    assert torch.equal(case.hidden.grad, torch.zeros(6, 8))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(backend, masked):
    case = linear_case(6, 30, 8, bias=masked)
    mask = torch.tensor([True, False, True, True, True, False]) if masked else None
    temperature = torch.linspace(0.5, 2, 6) if masked else None
    case.targets.clamp_(max=27)
    options = Options(0.7, None, -100, 28, 0.0, True, False, backend)
    if masked:
        options = Options(1.0, 3.0, -100, 28, 0.1, False, True, backend)
    logits = torch.empty(6, 28)
    dweight = None
    if backend == "native" and native.has_products(torch.float32):
        size = native.buffer_bytes(6, 8, torch.float32, options, True)
        logits, dweight = torch.empty(size, dtype=torch.uint8), torch.empty(30, 8)
    operands = (case.hidden, case.weight, case.targets, case.bias, mask, temperature)
    forward = (*operands, logits, dweight, *options)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_loss._chunk_forward, forward, test_utils=utilities)
    stats = RowStats(*linear_loss._chunk_forward(*forward))
    entropy, g_entropy = (None, None) if masked else (stats.entropy, case.upstream[3])
    for *needs, with_sum in itertools.product([False, True], repeat=4):
        if dweight is not None and (with_sum or not needs[1]):
            continue
        weight_sum = torch.zeros(30, 8) if with_sum else None
        backward = (*case.upstream[:3], g_entropy, stats.logsumexp, entropy, stats.logsumexp_low, *needs, *operands)
        backward += (logits, weight_sum, dweight, *options)
        torch.library.opcheck(linear_loss._chunk_backward, backward, test_utils=utilities)
    leaves = [tensor.clone().requires_grad_() for tensor in (case.hidden, case.weight)]
    gradients = [torch.randn(6, 8), torch.randn(30, 8), torch.randn(30)]
    torch.library.opcheck(linear_loss._attach_gradients, (torch.randn(()), *leaves, None, *gradients))
    losses = torch.randn(6)
    torch.library.opcheck(linear_loss._check_chunks, (losses.sum(), *[losses] * 3, 2), test_utils=utilities)


def test_a_wrong_row_is_named_before_anything_is_added():
    case = linear_case(12, 50, 16)
    case.targets[11], main_grad = 99, torch.zeros(50, 16)
    with pytest.raises(ValueError, match="target 99 in row 11"):
        loss_of(case._replace(weight=case.weight.requires_grad_()), chunk_bytes=1000, main_grad=main_grad)
    assert not main_grad.any()


def test_main_grad_is_not_the_weight():
    case = linear_case(4, 50, 16)
    with pytest.raises(ValueError, match="main_grad is the weight itself"):
        loss_of(case, main_grad=case.weight)


def test_a_loss_function_may_change_what_it_is_given(backend):
    case = linear_case(12, 50, 16)
    hidden = case.hidden.requires_grad_()
    changed = linear_token_loss(
        hidden, case.weight, case.targets, lambda stats, rows: stats.entropy.clamp_(max=2.0), backend=backend
    )
    expected = linear_token_stats(hidden, case.weight, case.targets, backend=backend).entropy
    torch.testing.assert_close(changed.stats.entropy, expected.detach())
    actual, truth = (torch.autograd.grad(loss, hidden)[0] for loss in (changed.loss, expected.clamp(max=2.0).sum()))
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-6)


def test_losses_are_real_numbers():
    case = linear_case(4, 50, 16)
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.complex64"):
        linear_token_loss(case.hidden, case.weight, case.targets, lambda s, rows: torch.complex(s.logprob, s.entropy))
