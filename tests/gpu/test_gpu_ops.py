"""The Triton backend on a GPU: against float64, at large sizes, and in cases that only a GPU has."""

import functools
import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_checks import check_linear, check_logits, linear_case, run_linear, run_logits, stats_by_loss
from repirl_kernels import linear_token_loss, linear_token_stats, token_stats
from repirl_kernels.triton import tiles

pytestmark = pytest.mark.gpu

stats_op = functools.partial(linear_token_stats, backend="triton")
logits_op = functools.partial(token_stats, backend="triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[linear_token_stats, stats_by_loss], ids=["stats", "loss"])
def linear_op(request):
    return functools.partial(request.param, backend="triton")


def logits_case(num_rows, num_columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, num_columns, generator=generator)).to("cuda", dtype)
    targets = torch.randint(num_columns, (num_rows,), generator=generator).cuda()
    return logits, targets, torch.randn(4, num_rows, generator=generator).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 64), (7, 2, 1000), (1024, 997, 576), (300, 32000, 1000), (64, 50257, 33), (128, 151936, 64)],
)
def test_linear(linear_op, dtype, shape):
    check_linear(linear_op, linear_case(*shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [576, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_options(linear_op, dtype, num_features, bias, softcap):
    options = {"bias": bias, "softcap": softcap, "temperature": 0.7, "vocab_size": 997}
    check_linear(linear_op, linear_case(130, 1100, num_features, dtype=dtype, device="cuda", **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_in_a_chunk", [1, 64, 100])
def test_loss_in_chunks(dtype, rows_in_a_chunk):
    op = functools.partial(stats_by_loss, backend="triton", chunk_bytes=rows_in_a_chunk * 997 * 4)
    check_linear(op, linear_case(130, 1000, 72, dtype=dtype, device="cuda", bias=True, vocab_size=997))


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad(dtype):
    case = linear_case(130, 1000, 72, dtype=dtype, device="cuda")
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    arguments = (hidden, weight, case.targets, lambda stats, rows: -stats.logprob)
    linear_token_loss(*arguments, backend="triton").loss.backward()
    expected, weight.grad = weight.grad, None
    main_grad = torch.ones(1000, 72, device="cuda")
    linear_token_loss(*arguments, main_grad=main_grad, backend="triton").loss.backward()
    assert weight.grad is None
    # The usual gradient is rounded to the weight's dtype; this one is not.
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    tolerance = rounding * expected.abs().max().item()
    torch.testing.assert_close(main_grad - 1, expected.float(), rtol=rounding, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 2, 997, 32000, 50257, 151936])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}])
def test_logits(dtype, num_columns, options):
    check_logits(logits_op, *logits_case(9, num_columns, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_banned_tokens_and_low_temperature(linear_op, dtype):
    logits, targets, upstream = logits_case(9, 5000, dtype)
    check_logits(logits_op, 3e3 * logits, targets, upstream)
    check_logits(logits_op, logits + 1e4, targets, upstream, temperature=0.7)
    check_logits(logits_op, logits, targets, upstream, temperature=0.01)
    case = linear_case(9, 5000, 64, dtype=dtype, device="cuda", bias=True)
    case.bias[1000:4500] = -math.inf
    check_linear(linear_op, case._replace(targets=case.targets % 1000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(linear_op, dtype):
    case = linear_case(300, 2000, 64, dtype=dtype, device="cuda")
    clean = run_linear(linear_op, case)
    hidden = case.hidden.clone()
    hidden[77, 3] = math.nan
    dirty = run_linear(linear_op, case._replace(hidden=hidden))
    others = torch.arange(300, device="cuda") != 77
    assert dirty.stats[:, 77].isnan().all()
    assert torch.equal(dirty.stats[:, others], clean.stats[:, others])
    assert dirty.dhidden[77].isnan().all()
    assert torch.equal(dirty.dhidden[others], clean.dhidden[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_run_to_run(linear_op, dtype):
    case = linear_case(500, 5000, 256, dtype=dtype, device="cuda", bias=True)
    first, second = run_linear(linear_op, case), run_linear(linear_op, case)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    logits, targets, upstream = logits_case(500, 50257, dtype)
    first, second = (run_logits(logits_op, logits, targets, upstream) for _ in range(2))
    assert torch.equal(first.stats, second.stats)
    assert torch.equal(first.dhidden, second.dhidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [256, 33])
def test_a_row_alone_equals_that_row_in_a_batch(dtype, num_features):
    """Equal to the bit where no vendor's product is involved: statistics, and the gradient of given logits."""
    case = linear_case(500, 50257, num_features, dtype=dtype, device="cuda")
    logits, targets, upstream = logits_case(500, 50257, dtype)
    with torch.no_grad():
        batch = torch.stack(list(stats_op(case.hidden, case.weight, case.targets)))
    logits_batch = run_logits(logits_op, logits, targets, upstream)
    for rows in (slice(0, 1), slice(130, 131), slice(499, 500), slice(100, 400)):
        with torch.no_grad():
            alone = torch.stack(list(stats_op(case.hidden[rows], case.weight, case.targets[rows])))
        assert torch.equal(alone, batch[:, rows])
        logits_alone = run_logits(logits_op, logits[rows], targets[rows], upstream[:, rows])
        assert torch.equal(logits_alone.stats, logits_batch.stats[:, rows])
        assert torch.equal(logits_alone.dhidden, logits_batch.dhidden[rows])


def test_masked_rows_change_nothing_for_the_others():
    case = linear_case(500, 5000, 256, dtype=torch.bfloat16, device="cuda")
    kept = torch.rand(500, device="cuda") < 0.4
    case.hidden[~kept] = math.nan
    with torch.no_grad():
        masked = torch.stack(list(stats_op(case.hidden, case.weight, case.targets, row_mask=kept)))
        alone = torch.stack(list(stats_op(case.hidden[kept], case.weight, case.targets[kept])))
    assert torch.equal(masked[:, kept], alone)
    assert not masked[:, ~kept].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_negligible(monkeypatch, dtype):
    """Slabs with negligible probability are left out of the products; nothing else changes."""
    monkeypatch.setattr(tiles, "slab_width", lambda *args: 512)
    case = linear_case(130, 2048, 72, dtype=dtype, device="cuda", bias=True)
    case.bias[1024:] -= 50
    case = case._replace(targets=case.targets % 1024)
    expected = run_linear(stats_op, case)
    skipped = run_linear(stats_op, case._replace(options={"skip_negligible": True}))
    assert expected.dweight[1024:].any() or dtype == torch.float16  # in float16 such gradients are 0
    assert not skipped.dweight[1024:].any()
    assert torch.equal(skipped.stats, expected.stats)
    for actual, other in zip(skipped[1:], expected[1:], strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * other.abs().max().item()
        torch.testing.assert_close(actual, other, rtol=0, atol=tolerance)


def test_on_a_stream_other_than_the_default_one():
    case = linear_case(300, 5000, 256, dtype=torch.bfloat16, device="cuda")
    expected = run_linear(stats_op, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = run_linear(stats_op, case)
    torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(linear_op, dtype):
    case = linear_case(130, 1000, 72, device="cuda", bias=True)
    rounded = case._replace(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    expected = run_linear(linear_op, rounded)
    with torch.autocast("cuda", dtype):
        actual = run_linear(linear_op, case)
    assert torch.equal(actual.stats, expected.stats)
    assert torch.equal(actual.dhidden, expected.dhidden.float())
    assert torch.equal(actual.dweight, expected.dweight.float())


def test_compiled_whole_with_the_default_compiler():
    """As in a training step: compiled by inductor, with a dynamic number of rows, in one graph."""
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16).mul_(0.3).requires_grad_()

    def loss(hidden, weight, targets):
        stats = stats_op(torch.tanh(hidden), weight, targets, temperature=0.8)
        return (stats.logprob * stats.entropy.detach() + 0.01 * stats.entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for num_rows in (30, 77):
        hidden = torch.randn(num_rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(1000, (num_rows,), device="cuda")
        results = []
        for function in (loss, compiled):
            value = function(hidden, weight, targets)
            results.append((value, *torch.autograd.grad(value, [hidden, weight])))
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-2)


def extra_memory(step) -> int:
    """Peak memory of ``step()`` in bytes above that before it; a first call allocates what is allocated only once."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture
def large_head():
    """``hidden``, ``weight`` (bfloat16) and ``targets``, of a size at which logits would take 9.3 GiB in float32."""
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of free GPU memory, {free / 2**30:.1f} are")
    hidden = torch.empty(16384, 4096, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight = torch.empty(151936, 4096, dtype=torch.bfloat16, device="cuda").normal_(std=0.05).requires_grad_()
    return hidden, weight, torch.randint(151936, (16384,), device="cuda")


def test_memory_of_the_statistics(large_head):
    """No ``[N, V]``: forward allocates almost nothing, backward a slab and the float32 gradient of hidden."""
    hidden, weight, targets = large_head
    gradients = 2 * (hidden.numel() + weight.numel())

    def forward():
        with torch.no_grad():
            stats_op(hidden, weight, targets)

    def step():
        sum(s.sum() for s in stats_op(hidden, weight, targets)).backward()
        hidden.grad = weight.grad = None

    assert extra_memory(forward) < 64 * 2**20
    assert extra_memory(step) - gradients < 0.6 * 2**30


def test_memory_of_the_loss(large_head):
    """Only the logits of one chunk and, if there are several chunks, the float32 sum of the weight's gradient."""
    hidden, weight, targets = large_head
    chunk_bytes = 512 * 2**20

    def step(main_grad=None):
        result = linear_token_loss(
            hidden, weight, targets, lambda stats, rows: -stats.logprob, main_grad=main_grad, chunk_bytes=chunk_bytes
        )
        result.loss.backward()
        hidden.grad = weight.grad = None

    # Besides a chunk's logits, two slabs of its gradient (each half a chunk at most), gradients of hidden, workspace.
    held = 2 * chunk_bytes + 6 * hidden.numel() + 128 * 2**20
    assert extra_memory(step) < held + (4 + 2) * weight.numel()
    main_grad = torch.zeros(weight.shape, dtype=torch.float32, device="cuda")
    assert extra_memory(functools.partial(step, main_grad)) < held
