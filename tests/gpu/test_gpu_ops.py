"""Both ops on a GPU with the Triton backend: against float64, at sizes and in ways that a CPU cannot show."""

import functools
import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_checks import check_linear, check_logits, linear_case, run_linear, run_logits
from repirl_kernels import linear_token_stats, token_stats

pytestmark = pytest.mark.gpu

linear_op = functools.partial(linear_token_stats, backend="triton")
logits_op = functools.partial(token_stats, backend="triton")

SHAPES = [(1, 1, 64), (7, 2, 1000), (129, 997, 576), (300, 32000, 1000), (64, 50257, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits_case(num_rows, num_columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, num_columns, generator=generator)).to("cuda", dtype)
    targets = torch.randint(num_columns, (num_rows,), generator=generator).cuda()
    return logits, targets, torch.randn(4, num_rows, generator=generator).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 64), (7, 2, 1000), (129, 997, 576), (300, 32000, 1000), (64, 50257, 33)]
)
def test_linear(dtype, shape):
    check_linear(linear_op, linear_case(*shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [576, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_options(dtype, num_features, bias, softcap):
    case = linear_case(
        130,
        1100,
        num_features,
        dtype=dtype,
        device="cuda",
        bias=bias,
        softcap=softcap,
        temperature=0.7,
        vocab_size=997,
    )
    check_linear(linear_op, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 2, 997, 32000, 50257, 151936])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}])
def test_logits(dtype, num_columns, options):
    check_logits(logits_op, *logits_case(9, num_columns, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_banned_tokens_and_low_temperature(dtype):
    logits, targets, upstream = logits_case(9, 5000, dtype)
    check_logits(logits_op, 3e3 * logits, targets, upstream)
    check_logits(logits_op, logits + 1e4, targets, upstream, temperature=0.7)
    check_logits(logits_op, logits, targets, upstream, temperature=0.01)
    case = linear_case(9, 5000, 64, dtype=dtype, device="cuda", bias=True)
    case.bias[1000:4500] = -math.inf
    check_linear(linear_op, case._replace(targets=case.targets % 1000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_in_its_row(dtype):
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
def test_run_to_run(dtype):
    case = linear_case(500, 5000, 256, dtype=dtype, device="cuda", bias=True)
    first, second = run_linear(linear_op, case), run_linear(linear_op, case)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_features", [256, 33])
def test_a_row_alone_equals_that_row_in_a_batch(dtype, num_features):
    case = linear_case(500, 50257, num_features, dtype=dtype, device="cuda")
    logits, targets, upstream = logits_case(500, 50257, dtype)
    with torch.no_grad():
        batch = torch.stack(list(linear_op(case.hidden, case.weight, case.targets)))
    logits_batch = run_logits(logits_op, logits, targets, upstream)
    for row in (0, 130, 499):
        one = slice(row, row + 1)
        with torch.no_grad():
            alone = torch.stack(list(linear_op(case.hidden[one], case.weight, case.targets[one])))
        assert torch.equal(alone, batch[:, one])
        logits_alone = run_logits(logits_op, logits[one], targets[one], upstream[:, one])
        assert torch.equal(logits_alone.stats, logits_batch.stats[:, one])
        assert torch.equal(logits_alone.dhidden, logits_batch.dhidden[one])


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.1f} are")


def test_more_than_2_to_the_31_logits():
    """Row 16000 of [16384, 151936] starts beyond 2**31 elements."""
    needs_memory(16)
    num_rows, num_columns = 16384, 151936
    logits = torch.empty(num_rows, num_columns, dtype=torch.bfloat16, device="cuda").normal_()
    logits.requires_grad_()
    targets = torch.arange(num_rows, device="cuda")
    stats = logits_op(logits, targets)
    sum(s.sum() for s in stats).backward()
    last = logits.detach()[-16:].clone()
    upstream = torch.ones(4, 16, device="cuda")
    expected = run_logits(logits_op, last, targets[-16:], upstream)
    assert torch.equal(torch.stack(list(stats))[:, -16:].detach(), expected.stats)
    assert torch.equal(logits.grad[-16:], expected.dhidden)
    check_logits(logits_op, last, targets[-16:], upstream)


def test_linear_with_more_than_2_to_the_31_logits_and_weights():
    """V * D and N * V above 2**31; only the last columns' weights are large enough to matter."""
    needs_memory(40)
    num_rows, num_columns, num_features = 8200, 270000, 8192
    assert num_rows * num_columns > 2**31
    assert num_columns * num_features > 2**31
    hidden = torch.empty(num_rows, num_features, dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.zeros(num_columns, num_features, dtype=torch.bfloat16, device="cuda")
    weight[-1000:].normal_(std=0.05)
    targets = torch.arange(num_rows, device="cuda") % 1000 + num_columns - 1000
    hidden.requires_grad_()
    weight.requires_grad_()
    stats = torch.stack(list(linear_op(hidden, weight, targets)))
    stats[0, -64:].sum().backward()
    z = hidden.detach()[-64:].double() @ weight.detach()[-1000:].double().T
    total = torch.logaddexp(
        z.logsumexp(dim=-1), torch.tensor(math.log(num_columns - 1000.0), dtype=torch.float64, device="cuda")
    )
    logprob = z.gather(-1, targets[-64:, None] - (num_columns - 1000)).squeeze(-1) - total
    torch.testing.assert_close(stats[0, -64:].double(), logprob, rtol=1e-5, atol=1e-4)
    dz = -(z - total[:, None]).exp()
    dz.scatter_add_(-1, targets[-64:, None] - (num_columns - 1000), torch.ones_like(dz[:, :1]))
    dweight = dz.T @ hidden.detach()[-64:].double()
    error = (weight.grad[-1000:].double() - dweight).abs().max()
    assert error <= 2e-2 * dweight.abs().max()
    assert not hidden.grad[:-64].any()


def test_memory():
    """Beyond its gradients, backward holds a slab, the float32 gradient of hidden, and no [N, V]."""
    num_rows, num_columns, num_features = 8192, 100000, 1024
    case = linear_case(num_rows, num_columns, num_features, dtype=torch.bfloat16, device="cuda")
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sum(s.sum() for s in linear_op(hidden, weight, case.targets)).backward()
    extra = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    assert extra < 128 * 2**20 + 4 * hidden.numel() + 2 * hidden.numel() + 32 * 2**20
