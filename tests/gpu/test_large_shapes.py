"""Edge case 9 on a GPU: more than 2**31 logits, and more than 2**31 weights."""

import pytest
import torch
from repirl_kernels import linear_token_stats, token_stats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def needs_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def test_edge_case_09_more_than_2_to_31_given_logits():
    needs_memory(20)
    num_rows, num_columns = 2**16 + 1, 2**15 + 1
    logits = torch.randn(num_rows, num_columns, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(num_columns, (num_rows,), device="cuda")
    stats = token_stats(logits, targets)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    some = torch.tensor([0, 2**15, 2**16 - 1, 2**16], device="cuda")
    few = logits.detach()[some].double().requires_grad_()
    truth = token_stats(few, targets[some])
    (truth.logprob.sum() + truth.entropy.sum()).backward()
    for actual, expected in zip(stats, truth, strict=True):
        torch.testing.assert_close(actual[some].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad[some].double(), few.grad, rtol=1e-2, atol=1e-5)


def test_edge_case_09_more_than_2_to_31_logits_in_a_product():
    num_rows, num_columns = 2**16 + 1, 2**15 + 1
    hidden = torch.randn(num_rows, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(num_columns, 64, device="cuda", dtype=torch.bfloat16) / 8
    targets = torch.randint(num_columns, (num_rows,), device="cuda")
    stats = linear_token_stats(hidden, weight, targets)
    some = torch.tensor([0, 2**15, 2**16 - 1, 2**16], device="cuda")
    truth = linear_token_stats(hidden[some].double(), weight.double(), targets[some])
    for actual, expected in zip(stats, truth, strict=True):
        torch.testing.assert_close(actual[some].double(), expected, rtol=1e-5, atol=1e-5)


def test_edge_case_09_more_than_2_to_31_weights():
    needs_memory(24)
    num_columns, num_features = 2**19 + 1, 2**12
    hidden = torch.randn(64, num_features, device="cuda", dtype=torch.bfloat16)
    weight = torch.empty(num_columns, num_features, device="cuda", dtype=torch.bfloat16)
    weight = weight.normal_(std=1 / 64).requires_grad_()
    # The last rows of weight lie beyond 2**31 elements.
    targets = num_columns - 1 - torch.arange(64, device="cuda")
    stats = linear_token_stats(hidden, weight, targets)
    stats.logprob.sum().backward()
    truth = (hidden.double() * weight.detach()[targets].double()).sum(dim=-1)
    torch.testing.assert_close(stats.target_logit.double(), truth, rtol=1e-4, atol=1e-4)
    # p(target) is about 2**-19, so the target's own row gets its hidden state.
    torch.testing.assert_close(weight.grad[targets], hidden, rtol=2e-2, atol=2e-2)
