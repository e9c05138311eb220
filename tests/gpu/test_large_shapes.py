"""Edge case 9 on a GPU: more than 2**31 logits, and more than 2**31 weights."""

import math

import pytest
import torch
from repirl_kernels import linear_token_loss, linear_token_stats, token_stats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Rows on both sides of the element 2**31 of [2**16 + 1, 2**15 + 1].
NUM_ROWS, NUM_COLUMNS = 2**16 + 1, 2**15 + 1
SOME = [0, 2**15, 2**16 - 1, 2**16]


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / 2**30:.1f} are")


def head(num_features: int = 64):
    hidden = torch.randn(NUM_ROWS, num_features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(NUM_COLUMNS, num_features, device="cuda", dtype=torch.bfloat16) / 8
    return hidden, weight, torch.randint(NUM_COLUMNS, (NUM_ROWS,), device="cuda")


def test_edge_case_09_more_than_2_to_31_given_logits():
    needs_memory(20)
    logits = torch.randn(NUM_ROWS, NUM_COLUMNS, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(NUM_COLUMNS, (NUM_ROWS,), device="cuda")
    stats = token_stats(logits, targets)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    few = logits.detach()[SOME].double().requires_grad_()
    truth = token_stats(few, targets[SOME])
    (truth.logprob.sum() + truth.entropy.sum()).backward()
    for actual, expected in zip(stats, truth, strict=True):
        torch.testing.assert_close(actual[SOME].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad[SOME].double(), few.grad, rtol=1e-2, atol=1e-5)


def test_edge_case_09_more_than_2_to_31_logits_in_a_product():
    hidden, weight, targets = head()
    stats = linear_token_stats(hidden, weight, targets)
    truth = linear_token_stats(hidden[SOME].double(), weight.double(), targets[SOME])
    for actual, expected in zip(stats, truth, strict=True):
        torch.testing.assert_close(actual[SOME].double(), expected, rtol=1e-5, atol=1e-5)


def test_edge_case_09_more_than_2_to_31_logits_in_a_chunk():
    needs_memory(24)
    hidden, weight, targets = head()
    hidden.requires_grad_()
    one_chunk = NUM_ROWS * NUM_COLUMNS * 4
    result = linear_token_loss(
        hidden, weight, targets, lambda stats, rows: stats.logprob + stats.entropy, chunk_bytes=one_chunk
    )
    result.loss.backward()
    few = hidden.detach()[SOME].double().requires_grad_()
    truth = linear_token_stats(few, weight.double(), targets[SOME])
    (truth.logprob.sum() + truth.entropy.sum()).backward()
    torch.testing.assert_close(result.stats.entropy[SOME].double(), truth.entropy.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad[SOME].double(), few.grad, rtol=2e-2, atol=2e-2)


def test_edge_case_09_more_than_2_to_31_logits_and_weights():
    """Only the last columns' weights are large enough to matter, and only the last rows have a gradient."""
    needs_memory(40)
    num_rows, num_columns, num_features, num_large = 8200, 270000, 8192, 1000
    assert num_rows * num_columns > 2**31
    assert num_columns * num_features > 2**31
    hidden = torch.randn(num_rows, num_features, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.zeros(num_columns, num_features, dtype=torch.bfloat16, device="cuda")
    weight[-num_large:].normal_(std=0.05)
    weight.requires_grad_()
    targets = torch.arange(num_rows, device="cuda") % num_large + num_columns - num_large
    stats = linear_token_stats(hidden, weight, targets)
    stats.logprob[-64:].sum().backward()
    z = hidden.detach()[-64:].double() @ weight.detach()[-num_large:].double().T
    others = torch.full((64,), math.log(num_columns - num_large), dtype=torch.float64, device="cuda")
    total = torch.logaddexp(z.logsumexp(dim=-1), others)
    columns = targets[-64:, None] - (num_columns - num_large)
    logprob = z.gather(-1, columns).squeeze(-1) - total
    torch.testing.assert_close(stats.logprob[-64:].detach().double(), logprob, rtol=1e-5, atol=1e-4)
    dz = -(z - total[:, None]).exp()
    dz.scatter_add_(-1, columns, torch.ones_like(dz[:, :1]))
    dweight = dz.T @ hidden.detach()[-64:].double()
    error = (weight.grad[-num_large:].double() - dweight).abs().max()
    assert error <= 2e-2 * dweight.abs().max()
    assert not hidden.grad[:-64].any()
