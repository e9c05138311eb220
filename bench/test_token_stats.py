"""The ops on this CPU: native, reference and eager PyTorch beside one bare matrix product.

Run with ``make bench``. All columns of one run are from one machine in one state, so their ratios mean
something; absolute times are for this machine only. The shape is that of a small model's head on one
micro-batch.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from repirl_kernels import TokenStats, linear_token_stats, native, token_stats
from torch import Tensor

NUM_ROWS, NUM_FEATURES, NUM_COLUMNS = 512, 576, 49152
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager_token_stats(logits: Tensor, targets: Tensor) -> TokenStats:
    """The four statistics as they are usually written, from whole logits in float32."""
    logits = logits.float()
    logprobs = torch.log_softmax(logits, dim=-1)
    target = targets[:, None]
    return TokenStats(
        logprob=logprobs.gather(-1, target).squeeze(-1),
        logsumexp=logits.logsumexp(dim=-1),
        target_logit=logits.gather(-1, target).squeeze(-1),
        entropy=-(logprobs.exp() * logprobs).sum(dim=-1),
    )


def linear_op(implementation: str) -> Callable[..., TokenStats]:
    if implementation == "eager":
        return lambda hidden, weight, targets: eager_token_stats(F.linear(hidden, weight), targets)
    return lambda hidden, weight, targets: linear_token_stats(hidden, weight, targets, backend=implementation)


def logits_op(implementation: str) -> Callable[..., TokenStats]:
    if implementation == "eager":
        return eager_token_stats
    return lambda logits, targets: token_stats(logits, targets, backend=implementation)


def inputs(dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(NUM_ROWS, NUM_FEATURES).to(DTYPES[dtype])
    weight = (torch.randn(NUM_COLUMNS, NUM_FEATURES) * 0.05).to(DTYPES[dtype])
    return hidden, weight, torch.randint(NUM_COLUMNS, (NUM_ROWS,))


def backward_of_all(stats: TokenStats) -> None:
    (stats.logprob + stats.logsumexp + stats.target_logit + stats.entropy).sum().backward()


def measure(benchmark, function: Callable[[], object]) -> None:
    benchmark.pedantic(function, rounds=5, warmup_rounds=1)


@pytest.fixture(params=["native", "reference", "eager"])
def implementation(request):
    if request.param == "native" and not native.is_available():
        pytest.skip("the C++ module is not built")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="linear")
def test_bare_matrix_product(benchmark, dtype):
    hidden, weight, _ = inputs(dtype)
    measure(benchmark, lambda: F.linear(hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="linear")
def test_linear_forward(benchmark, implementation, dtype):
    hidden, weight, targets = inputs(dtype)
    op = linear_op(implementation)
    with torch.no_grad():
        measure(benchmark, lambda: op(hidden, weight, targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="linear")
def test_linear_forward_and_backward(benchmark, implementation, dtype):
    hidden, weight, targets = inputs(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    op = linear_op(implementation)
    measure(benchmark, lambda: backward_of_all(op(hidden, weight, targets)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="logits")
def test_logits_forward_and_backward(benchmark, implementation, dtype):
    hidden, weight, targets = inputs(dtype)
    logits = F.linear(hidden, weight).requires_grad_()
    op = logits_op(implementation)
    measure(benchmark, lambda: backward_of_all(op(logits, targets)))
