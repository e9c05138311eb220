"""The reference backend: its formulas against plain PyTorch and finite differences, in float64."""

import functools
import math

import pytest
import torch
from kernel_checks import in_float64, linear_case, plain_linear, plain_stats, run_linear, run_logits
from repirl_kernels import linear_token_stats, reference, token_stats

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 2.0},
    {"temperature": 1.5, "softcap": 3.0},
    {"vocab_size": 9},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_linear_gradients_pass_gradcheck(options):
    case = in_float64(linear_case(5, 11, 4, bias=True, **options))
    targets = case.targets.clone()
    targets[1] = -100
    leaves = [tensor.requires_grad_() for tensor in (case.hidden, case.weight, case.bias)]

    def op(hidden, weight, bias):
        return tuple(linear_token_stats(hidden, weight, targets, bias=bias, backend="reference", **options))

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_gradients_pass_gradcheck(options):
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, 3, -100, 5])
    assert torch.autograd.gradcheck(lambda z: tuple(token_stats(z, targets, backend="reference", **options)), [logits])


@pytest.mark.parametrize("options", OPTIONS)
def test_float64_equals_plain_pytorch(options):
    case = in_float64(linear_case(9, 13, 5, bias=True, **options))
    actual, expected = (run_linear(op, case) for op in (linear_token_stats, plain_linear))
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    logits = torch.randn(9, 13, dtype=torch.float64) * 4
    actual, expected = (
        run_logits(op, logits, case.targets, case.upstream, **options) for op in (token_stats, plain_stats)
    )
    for left, right in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_values_by_hand():
    # p = (1/2, 1/4, 1/4): every statistic is a multiple of log 2.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]], dtype=torch.float64) + 3.0
    stats = token_stats(logits, torch.tensor([1]))
    assert stats.logprob.item() == pytest.approx(-2 * math.log(2.0))
    assert stats.logsumexp.item() == pytest.approx(3.0 + 2 * math.log(2.0))
    assert stats.target_logit.item() == 3.0
    assert stats.entropy.item() == pytest.approx(1.5 * math.log(2.0))


def test_row_chunks_do_not_change_results(monkeypatch):
    case = linear_case(7, 50, 6, bias=True)
    op = functools.partial(linear_token_stats, backend="reference")
    whole = run_linear(op, case)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 100)
    chunked = run_linear(op, case)
    for left, right in zip(whole, chunked, strict=True):
        torch.testing.assert_close(left, right)
