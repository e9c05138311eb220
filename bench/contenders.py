"""Our ops and their peers, each called as in a trainer.

A contender computes values for each token, a mean loss, or both; ``run`` computes each task from these. Peers are
imported when they are first used. If a peer is not installed or cannot run a case, its row of the table says so.
"""

import contextlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from repirl_kernels import linear_token_loss, linear_token_stats, token_stats
from torch import Tensor

from bench.cases import ENTROPY_COEFFICIENT, Case, Inputs
from bench.turns import VARIABLE


class Values(NamedTuple):
    """The log-prob of each row's target and, if the contender computes it, the entropy; each ``[N]``."""

    logprob: Tensor
    entropy: Tensor | None


class Contender(NamedTuple):
    name: str
    packages: tuple[str, ...]
    """Distributions whose versions are recorded with the results."""
    values: Callable[[Inputs], Values] | None = None
    mean_loss: Callable[[Inputs], Tensor] | None = None
    """Mean cross-entropy, if the contender has a function for it that is faster than ``values``."""
    entropy: bool = True
    """Whether ``values`` has entropies, with their gradient. False spares a call; None in ``Values`` says the same."""
    given_logits: bool = False
    """Whether its input is logits; then it runs only the task ``logits``."""
    loss: Callable[[Inputs, Case], Tensor] | None = None
    """The whole loss of a task, for a contender that needs it in the forward pass."""
    ours: bool = False


class CannotRun(Exception):
    """A contender cannot run a case; the message says why."""


def run(contender: Contender, inputs: Inputs, case: Case) -> tuple[Values | None, Tensor | None]:
    """``(values, None)`` in the task ``score``, else ``(None, loss)``, to call ``loss.backward()``. CannotRun if it
    cannot."""
    if case.task == "score":
        if contender.values is None:
            raise CannotRun("has a loss only" if contender.loss is None else "is for training")
        if not contender.entropy:
            raise CannotRun("no entropy")
        with torch.no_grad():
            values = contender.values(inputs)
        if values.entropy is None:
            raise CannotRun("no entropy")
        return values, None
    if contender.loss is not None:
        return None, contender.loss(inputs, case)
    if case.task == "sft" and contender.mean_loss is not None:
        return None, contender.mean_loss(inputs)
    if contender.values is None:
        raise CannotRun("has a mean loss only")
    if not contender.entropy and case.task in ("policy+entropy", "logits"):
        raise CannotRun("no entropy with a gradient")
    values = contender.values(inputs)
    if values.entropy is None and case.task in ("policy+entropy", "logits"):
        raise CannotRun("no entropy with a gradient")
    return None, token_losses(values, inputs, case, slice(None)).sum()


def token_losses(values: Values, inputs: Inputs, case: Case, rows: slice) -> Tensor:
    """Each row's term of the task's loss, ``[N]`` or that of ``rows``; the loss is their sum."""
    counts = inputs.counts[rows]
    if case.task == "sft":
        return -torch.where(counts, values.logprob, 0) / inputs.counts.sum()
    weight = torch.where(counts, inputs.advantage[rows], 0)
    losses = -weight * values.logprob
    if case.task != "policy":
        assert values.entropy is not None
        losses = losses - ENTROPY_COEFFICIENT * torch.where(counts, values.entropy, 0)
    return losses


def _ours(inputs: Inputs) -> Values:
    stats = linear_token_stats(inputs.hidden, inputs.weight, inputs.targets)
    return Values(stats.logprob, stats.entropy)


def _ours_without_entropy(inputs: Inputs) -> Values:
    stats = linear_token_stats(inputs.hidden, inputs.weight, inputs.targets, with_entropy=False)
    return Values(stats.logprob, None)


def _ours_with_argmax(inputs: Inputs) -> Values:
    stats = linear_token_stats(inputs.hidden, inputs.weight, inputs.targets, with_argmax=True)
    return Values(stats.logprob, stats.entropy)


def _ours_loss(inputs: Inputs, case: Case) -> Tensor:
    def loss_fn(stats, rows):  # type: ignore[no-untyped-def]
        return token_losses(Values(stats.logprob, stats.entropy), inputs, case, rows)

    return linear_token_loss(inputs.hidden, inputs.weight, inputs.targets, loss_fn).loss


def _ours_logits(inputs: Inputs) -> Values:
    stats = token_stats(inputs.hidden, inputs.targets)
    return Values(stats.logprob, stats.entropy)


def _eager_from(logits: Tensor, targets: Tensor) -> Values:
    logprobs = F.log_softmax(logits.float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return Values(logprobs.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1), entropy)


def _eager(inputs: Inputs) -> Values:
    return _eager_from(F.linear(inputs.hidden, inputs.weight), inputs.targets)


def _eager_mean_loss(inputs: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(inputs.hidden, inputs.weight).float(), inputs.targets)


def _eager_logprob(inputs: Inputs) -> Values:
    losses = F.cross_entropy(F.linear(inputs.hidden, inputs.weight).float(), inputs.targets, reduction="none")
    return Values(-losses, None)


_compiled: dict[Callable, Callable] = {}


def _compile(function: Callable) -> Callable:
    """A function that compiles ``function`` when it is first called."""

    def call(inputs: Inputs):  # type: ignore[no-untyped-def]
        if function not in _compiled:
            _compiled[function] = torch.compile(function)
        return _compiled[function](inputs)

    return call


def _torch_mean_loss(inputs: Inputs) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # chunked
    return F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, options=options)


def _torch_logprob(inputs: Inputs) -> Values:
    options = torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, reduction="none", options=options)
    return Values(-losses, None)


def _trl(inputs: Inputs) -> Values:
    # As TRL's fused head calls it: on a GPU it removes ignored rows first, elsewhere it computes and then masks them.
    from trl.trainer import utils

    counts = inputs.counts
    compact = inputs.hidden.is_cuda
    hidden = inputs.hidden[counts] if compact else inputs.hidden
    targets = inputs.targets[counts] if compact else inputs.targets.clamp(min=0)
    logprob, entropy, *_ = utils._ChunkedLogProbFunction.apply(
        hidden,
        inputs.weight,
        None,
        targets,
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    if not compact:
        return Values(logprob.masked_fill(~counts, 0), entropy.masked_fill(~counts, 0))
    empty = logprob.new_zeros(counts.shape)
    return Values(empty.masked_scatter(counts, logprob), empty.masked_scatter(counts, entropy))


def _trl_logits(inputs: Inputs) -> Values:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprob, entropy = selective_log_softmax_and_entropy(inputs.hidden, inputs.targets.clamp(min=0))
    return Values(logprob, entropy)


def _liger_scaled(inputs: Inputs) -> Values:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    loss, entropy, *_ = LigerFusedLinearScaledCrossEntropyFunction.apply(
        inputs.hidden, inputs.weight, inputs.targets, 1.0, -100, 1, True
    )
    return Values(-loss, entropy)


def _liger_mean_loss(inputs: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if not inputs.hidden.is_cuda:
        raise CannotRun("Triton only")
    return LigerFusedLinearCrossEntropyFunction.apply(inputs.hidden, inputs.weight, inputs.targets)[0]


def _liger_sm90_mean_loss(inputs: Inputs) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    if not inputs.hidden.is_cuda:
        raise CannotRun("CUDA only")
    return liger_fused_linear_cross_entropy_sm90(inputs.hidden, inputs.weight, inputs.targets)


def _cut_cross_entropy(inputs: Inputs, reduction: str) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        reduction=reduction,
        filter_eps=None,  # skip no tiles: the other contenders do not either
        impl="cce" if inputs.hidden.is_cuda else "torch_compile",
    )


def _verl(inputs: Inputs) -> Values:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    if not inputs.hidden.is_cuda:
        raise CannotRun("Triton only")
    logprob, entropy = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets.clamp(min=0), 1.0, "none")
    return Values(logprob, entropy)


def _quack_mean_loss(inputs: Inputs) -> Tensor:
    if not inputs.hidden.is_cuda:
        raise CannotRun("CUDA only")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets)


CONTENDERS = [
    Contender("ours: linear_token_stats", ("repirl",), values=_ours, ours=True),
    Contender("ours: linear_token_loss", ("repirl",), loss=_ours_loss, ours=True),
    # The same op with other options.
    Contender("ours: stats, no entropy", ("repirl",), values=_ours_without_entropy, entropy=False, ours=True),
    Contender("ours: stats, argmax", ("repirl",), values=_ours_with_argmax, ours=True),
    Contender("ours: token_stats", ("repirl",), values=_ours_logits, given_logits=True, ours=True),
    Contender("eager", ("torch",), values=_eager, mean_loss=_eager_mean_loss),
    Contender("eager, cross_entropy", ("torch",), values=_eager_logprob, entropy=False),
    Contender("torch.compile", ("torch",), values=_compile(_eager), mean_loss=_compile(_eager_mean_loss)),
    Contender("torch linear_cross_entropy", ("torch",), _torch_logprob, _torch_mean_loss, entropy=False),
    Contender("TRL chunked head", ("trl",), values=_trl),
    Contender("Liger fused scaled CE", ("liger-kernel",), values=_liger_scaled),
    Contender("Liger fused linear CE", ("liger-kernel",), mean_loss=_liger_mean_loss),
    Contender("Liger linear CE, sm_90", ("liger-kernel",), mean_loss=_liger_sm90_mean_loss),
    Contender(
        "cut-cross-entropy",
        ("cut-cross-entropy",),
        values=lambda inputs: Values(-_cut_cross_entropy(inputs, "none"), None),
        mean_loss=lambda inputs: _cut_cross_entropy(inputs, "mean"),
        entropy=False,
    ),
    Contender("verl linear_cross_entropy", ("verl",), values=_verl),
    Contender("quack linear_cross_entropy", ("quack-kernels",), mean_loss=_quack_mean_loss),
    Contender(
        "eager from logits",
        ("torch",),
        values=lambda inputs: _eager_from(inputs.hidden, inputs.targets),
        given_logits=True,
    ),
    Contender(
        "torch.compile from logits",
        ("torch",),
        values=_compile(lambda inputs: _eager_from(inputs.hidden, inputs.targets)),
        given_logits=True,
    ),
    Contender("TRL from logits", ("trl",), values=_trl_logits, given_logits=True),
]


# The module that a peer imports when it is first used.
_MODULES = {
    "trl": "trl.trainer.utils",
    "liger-kernel": "liger_kernel.ops.fused_linear_scaled_cross_entropy",
    "cut-cross-entropy": "cut_cross_entropy",
}


def preload(contenders: list[Contender], device: str) -> None:
    """Import the peers and initialise the device while other processes measure (see ``bench/turns.py``)."""
    if os.environ.get(VARIABLE) is None:
        return
    if device == "cuda":
        torch.zeros(1, device=device)
    for package in {package for contender in contenders for package in contender.packages}:
        with contextlib.suppress(Exception):  # the table says why a peer could not run
            importlib.import_module(_MODULES.get(package, "torch"))


def versions(others: list[Contender]) -> dict[str, str | None]:
    """Versions of the packages of CONTENDERS and ``others``; None for those that are not installed."""
    result: dict[str, str | None] = {}
    packages = {package for contender in [*CONTENDERS, *others] for package in contender.packages}
    for package in sorted({*packages, "triton"}):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    # With the build (+cu130), which the metadata of a wheel from PyPI leaves out.
    return result | {"torch": torch.__version__}
