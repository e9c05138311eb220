"""Shared by the tests of all backends: plain PyTorch, the same in float64, and the check "at most twice as wrong".

Truth is plain PyTorch with autograd in float64. An op passes if its largest error is at most twice that of plain
PyTorch in the op's own dtype, plus the error of rounding the result once.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from repirl_kernels import TokenStats, TokenStatsWithArgmax, linear_token_loss
from repirl_kernels.ops import AnyTokenStats
from torch import Tensor

STATS = TokenStats._fields


def triton_interprets() -> bool:
    """Whether Triton is installed and its interpreter runs: before 3.7 it turns an array into an integer in a way that
    NumPy 2.4 no longer allows."""
    try:
        versions = [importlib.metadata.version(name) for name in ("triton", "numpy")]
    except importlib.metadata.PackageNotFoundError:
        return False
    triton, numpy = (tuple(map(int, version.split(".")[:2])) for version in versions)
    return triton >= (3, 7) or numpy < (2, 4)


needs_interpreter = pytest.mark.skipif(not triton_interprets(), reason="needs Triton from 3.7 on, or NumPy before 2.4")


class LinearCase(NamedTuple):
    """Inputs of ``linear_token_stats`` and upstream gradients ``[4, N]`` of its outputs."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    upstream: Tensor
    options: dict


class Outcome(NamedTuple):
    """Statistics ``[4, N]`` and the gradients of hidden (or logits), weight and bias, or None."""

    stats: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def linear_case(
    num_rows: int,
    num_columns: int,
    num_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    scale: float = 3.0,
    seed: int = 0,
    device: str | torch.device | None = None,
    **options,
) -> LinearCase:
    """A random case with logits of standard deviation ``scale``; ``options`` go to the op.

    The numbers are the same on every ``device``, which is torch's default device unless given.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.empty(0).device if device is None else device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    hidden = normal(num_rows, num_features).to(device, dtype)
    weight = (normal(num_columns, num_features) * scale / num_features**0.5).to(device, dtype)
    bias_V = normal(num_columns).to(device, dtype) if bias else None
    high = options.get("vocab_size") or num_columns
    targets = torch.randint(high, (num_rows,), generator=generator, device="cpu").to(device)
    return LinearCase(hidden, weight, bias_V, targets, normal(4, num_rows).to(device), options)


def plain_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    with_entropy: bool = True,
    with_argmax: bool = False,
) -> AnyTokenStats:
    """Statistics as a codebase without fused ops computes them: full logits, ``log_softmax``, in float32 or float64."""
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    z = z[:, :vocab_size]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    logprobs = torch.log_softmax(z, dim=-1)
    entropy = None
    if with_entropy:
        entropy = -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs.clamp(min=-1e38)).sum(dim=-1)
    target = targets[:, None]
    logprob, target_logit = logprobs.gather(-1, target).squeeze(-1), z.gather(-1, target).squeeze(-1)
    if label_smoothing:
        logprob = -F.cross_entropy(z, targets, reduction="none", label_smoothing=label_smoothing)
        target_logit = (1 - label_smoothing) * target_logit + label_smoothing * z.mean(dim=-1)
    # The gradient of logsumexp is exp(z - L), which with a large common offset would be inexact even in float64.
    z_max = z.detach().amax(dim=-1, keepdim=True)
    logsumexp = z_max.squeeze(-1) + torch.logsumexp(z - z_max, dim=-1)
    stats = TokenStats(logprob, logsumexp, target_logit, entropy)
    if not with_argmax:
        return stats
    argmax = (z == z_max).to(torch.uint8).argmax(dim=-1)  # the first of equal ones
    return TokenStatsWithArgmax(*stats, argmax, z_max.squeeze(-1))


def stacked(stats: AnyTokenStats) -> Tensor:
    """The four statistics ``[4, N]``; an entropy that was not computed is 0."""
    return torch.stack([torch.zeros_like(stats.logprob) if column is None else column for column in stats[:4]])


def run_linear(op: Callable[..., TokenStats], case: LinearCase) -> Outcome:
    """``op(hidden, weight, targets, bias=, **options)`` with its gradients for ``case.upstream``."""
    hidden = case.hidden.detach().clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    bias = None if case.bias is None else case.bias.detach().clone().requires_grad_()
    stats = stacked(op(hidden, weight, case.targets, bias=bias, **case.options))
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    gradients = torch.autograd.grad(stats, leaves, case.upstream.to(stats.dtype))
    return Outcome(stats.detach(), gradients[0], gradients[1], gradients[2] if bias is not None else None)


def run_logits(op: Callable[..., TokenStats], logits: Tensor, targets: Tensor, upstream: Tensor, **options) -> Outcome:
    """``op(logits, targets, **options)`` with its gradient for ``upstream [4, N]``."""
    logits = logits.detach().clone().requires_grad_()
    stats = stacked(op(logits, targets, **options))
    (gradient,) = torch.autograd.grad(stats, [logits], upstream.to(stats.dtype))
    return Outcome(stats.detach(), gradient, None, None)


class _StatsByLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options):
        ctx.save_for_backward(hidden, weight, bias)
        ctx.targets, ctx.options = targets, options
        # On a GPU, the backward pass runs in another thread, which does not know the dtype of autocast.
        kind = hidden.device.type
        ctx.autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        result = linear_token_loss(hidden, weight, targets, lambda stats, rows: stats.logprob, bias=bias, **options)
        ctx.mark_non_differentiable(*result.stats[4:])
        return tuple(result.stats)

    @staticmethod
    def backward(ctx, *upstream):
        upstream = upstream[: 4 if ctx.options.get("with_entropy", True) else 3]
        hidden, weight, bias = leaves = [
            tensor if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        flat = [gradient.reshape(-1) for gradient in upstream]

        def loss_fn(stats, rows):
            return sum(gradient[rows] * column for gradient, column in zip(flat, stats[: len(flat)], strict=True))

        with torch.enable_grad(), ctx.autocast:
            loss = linear_token_loss(hidden, weight, ctx.targets, loss_fn, bias=bias, **ctx.options).loss
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        gradients = iter(torch.autograd.grad(loss, wanted))
        return *(None if leaf is None or not leaf.requires_grad else next(gradients) for leaf in leaves), None, None


def stats_by_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options
) -> AnyTokenStats:
    """``linear_token_loss`` with the interface of ``linear_token_stats``; its loss is statistics times upstream
    gradients."""
    result = _StatsByLoss.apply(hidden, weight, bias, targets, options)
    return TokenStatsWithArgmax(*result) if options.get("with_argmax") else TokenStats(*result)


def plain_linear(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options
) -> AnyTokenStats:
    """:func:`plain_stats` of a matrix product in the operands' dtype."""
    return plain_stats(F.linear(hidden, weight, bias), targets, **options)


def in_float64(case: LinearCase) -> LinearCase:
    """The same numbers in float64."""
    return case._replace(
        hidden=case.hidden.double(),
        weight=case.weight.double(),
        bias=None if case.bias is None else case.bias.double(),
        upstream=case.upstream.double(),
    )


def assert_at_most_twice_as_wrong(actual: Tensor, plain: Tensor, truth: Tensor, what: str = "result") -> None:
    """``max |actual - truth| <= 2 max |plain - truth| + tiny``, NaN and infinities where the truth has them.

    ``tiny`` is 1e-6 of the largest finite value: a few roundings in float32, whatever the dtype.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)} for {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    finite = truth.isfinite()
    special = ~finite
    torch.testing.assert_close(actual[special].double(), truth[special].double(), equal_nan=True, msg=what)
    assert bool(actual[finite].isfinite().all()), f"{what}: not finite where the truth is"
    if not bool(finite.any()):
        return
    error = (actual.double() - truth)[finite].abs().max().item()
    plain_error = (plain.double() - truth)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    tiny = 1e-6 * truth[finite].abs().max().item() + 1e-30
    assert error <= 2 * plain_error + tiny, f"{what}: error {error:.3g}, plain PyTorch {plain_error:.3g}"


def assert_outcome(actual: Outcome, plain: Outcome, truth: Outcome) -> None:
    """Each statistic and each gradient is at most twice as wrong as plain PyTorch's."""
    for name, *values in zip(STATS, actual.stats, plain.stats, truth.stats, strict=True):
        assert_at_most_twice_as_wrong(*values, what=name)
    for name in ("dhidden", "dweight", "dbias"):
        values = [getattr(outcome, name) for outcome in (actual, plain, truth)]
        if values[2] is not None:
            assert_at_most_twice_as_wrong(*values, what=name)


def assert_largest(
    actual: TokenStatsWithArgmax, plain: TokenStatsWithArgmax, truth: TokenStatsWithArgmax, logits: Tensor
) -> None:
    """The largest logit is at most twice as wrong, and its column's logit ``[N, V]`` is the largest up to rounding."""
    assert_at_most_twice_as_wrong(actual.max_logit, plain.max_logit, truth.max_logit, what="max_logit")
    assert actual.argmax.dtype == torch.int64
    chosen, largest = logits.gather(-1, actual.argmax[:, None]).squeeze(-1), logits.amax(dim=-1)
    assert bool((chosen >= largest - 1e-2 * largest.abs() - 1e-6).all())


def check_linear(op: Callable[..., TokenStats], case: LinearCase) -> None:
    """The whole comparison for one case of the linear op, in poisoned memory (see below)."""
    with poisoned_memory():
        actual = run_linear(op, case)
    assert_outcome(actual, run_linear(plain_linear, case), run_linear(plain_linear, in_float64(case)))
    if case.options.get("with_argmax"):
        operands = case.hidden, case.weight, case.targets
        with torch.no_grad():
            largest = op(*operands, bias=case.bias, **case.options)
            plain = plain_linear(*operands, bias=case.bias, **case.options)
            double = in_float64(case)
            product = F.linear(double.hidden, double.weight, double.bias)
            truth = plain_stats(product, case.targets, **case.options)
            assert_largest(largest, plain, truth, product[:, : case.options.get("vocab_size")])


def check_logits(op: Callable[..., TokenStats], logits: Tensor, targets: Tensor, upstream: Tensor, **options) -> None:
    """The whole comparison for one case of ``token_stats``, in poisoned memory (see below)."""
    with poisoned_memory():
        actual = run_logits(op, logits, targets, upstream, **options)
    plain = run_logits(plain_stats, logits, targets, upstream, **options)
    truth = run_logits(plain_stats, logits.double(), targets, upstream.double(), **options)
    assert_outcome(actual, plain, truth)
    if options.get("with_argmax"):
        with torch.no_grad():
            results = [run(logits, targets, **options) for run in (op, plain_stats)]
            double = logits.double()
            truth = plain_stats(double, targets, **options)
            assert_largest(*results, truth, double[:, : options.get("vocab_size")])


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` returns NaN, which shows where an op leaves memory unwritten."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
