"""Peers of one's own: ``--peer module:function``; ``PROTOCOL`` says what the function gets and returns."""

import importlib
import importlib.metadata
import inspect
import operator
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.contenders import CannotRun, Contender, Values

PROTOCOL = """`--peer module:function` measures a function of your own beside the others. It is imported from the
folder where the command is started, and called with tensors on the device, in the case's dtype:

| call | tasks | arguments |
|---|---|---|
| `function(hidden, weight, targets)` | all but `logits` | `hidden [N, D]`, `weight [V, D]`, `targets [N]` |
| `function(logits, targets)` | `logits` | `logits [N, V]`, `targets [N]` |

`targets` are int64, and -100 where a row is ignored. What it may return:

| result | tasks |
|---|---|
| log-probs of the targets, `[N]` | `sft`, `policy` |
| `(log-probs, entropies)`, both `[N]` and in nats | all |
| mean cross-entropy over the rows that are not ignored, a tensor without axes | `sft` |

What stands in ignored rows does not matter, as long as it is finite. Gradients come from `backward()`; in the task
`score` it is called under `torch.no_grad()`. A function that cannot run a case raises an exception, whose message
stands in the table. Results are compared with float64 before anything is timed, on 256 rows or `--check-rows`; the
function's error is listed beside ours, and one whose results differ by more than the dtype's rounding is not timed.
"""

EXAMPLE = """import torch


def plain(hidden, weight, targets):
    logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1), entropies
"""


def load_peer(name: str) -> Contender:
    """The contender for ``module:function``.

    Raises:
        ValueError: it cannot be imported, or takes other arguments than ``PROTOCOL`` says.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError("is not of the form module:function")
    if "" not in sys.path and "." not in sys.path:
        sys.path.append("")  # the folder where the command is started
    try:
        function = operator.attrgetter(attribute)(importlib.import_module(module))
        num_arguments = len(_required(function))
    except Exception as error:  # whatever the module raises when it is imported
        raise ValueError(f"cannot be loaded: {type(error).__name__}: {error}") from error
    if num_arguments not in (2, 3):
        raise ValueError(f"takes {num_arguments} arguments; expected (hidden, weight, targets) or (logits, targets)")
    top = module.partition(".")[0]
    given_logits = num_arguments == 2
    return Contender(
        name,
        tuple(importlib.metadata.packages_distributions().get(top, [])),
        values=lambda inputs: _values(_call(function, inputs, given_logits), inputs),
        mean_loss=lambda inputs: _mean_loss(_call(function, inputs, given_logits), inputs),
        given_logits=given_logits,
    )


def _required(function: Callable[..., object]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]


def _call(function: Callable[..., object], inputs: Inputs, given_logits: bool) -> Tensor | Values:
    """What the function returns, checked: a mean loss, or values for each row."""
    arguments = (inputs.hidden,) if given_logits else (inputs.hidden, inputs.weight)
    returned = function(*arguments, inputs.targets)
    if isinstance(returned, Tensor) and returned.ndim == 0:
        return returned
    parts = returned if isinstance(returned, tuple | list) else (returned, None)
    tensors = parts if isinstance(returned, tuple | list) else parts[:1]
    if len(parts) != 2 or not all(isinstance(p, Tensor) and p.shape == inputs.targets.shape for p in tensors):
        shapes = ", ".join(str(list(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in tensors)
        raise ValueError(f"returned ({shapes}); expected log-probs [N], (log-probs, entropies), or a mean loss")
    return Values(*parts)


def _values(returned: Tensor | Values, inputs: Inputs) -> Values:
    if isinstance(returned, Tensor):
        raise CannotRun("has a mean loss only")
    return returned


def _mean_loss(returned: Tensor | Values, inputs: Inputs) -> Tensor:
    if isinstance(returned, Tensor):
        return returned
    return -torch.where(inputs.counts, returned.logprob, 0).sum() / inputs.counts.sum()
