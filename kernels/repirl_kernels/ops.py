"""``token_stats`` and ``linear_token_stats``: checks, custom operators, gradients, choice of a backend.

Everything that the backends have in common happens here, so that each of them sees only rows that matter:
inputs are checked and flattened, ignored rows are removed before the product, rows without an upstream
gradient are removed before the backward product, and results are scattered back. Rows are removed, never
zeroed and multiplied: a NaN in a row that does not count must not reach a gradient.

How many rows are left depends on the values of the data, so the removal happens inside the custom operators.
To ``torch.compile`` and to fake tensors they have static shapes.

Axes: N rows (tokens), D features, V vocabulary.
"""

import functools
import importlib
import importlib.util
import math
import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from repirl_kernels import native
from repirl_kernels.reference import statistics_dtype
from repirl_kernels.rows import (
    check_target_values,
    compact,
    contiguous,
    empty_stats,
    fake_gradients,
    fold_upstream,
    gradients_or_empty,
    kept_rows,
    live_rows,
    no_context,
    put,
    put_stats,
    refuse_double_backward,
    row_indices,
    skip_below,
    take,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKENDS = ("reference", "triton", "native")
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TokenStats(NamedTuple):
    """Statistics of each row's distribution over the vocabulary at that row's target.

    All four have the shape of ``targets``, are differentiable, and are float32 (float64 for float64 inputs).
    They refer to the final logits, after bias, softcap and temperature. Rows that are ignored hold 0.
    """

    logprob: Tensor
    """log p(target), in nats."""
    logsumexp: Tensor
    """log of the partition function."""
    target_logit: Tensor
    """The target's final logit."""
    entropy: Tensor
    """-sum p log p, in nats."""


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability, logsumexp, target logit and entropy of logits that already exist, reading them once.

    Args:
        logits: ``[*, V]``, float32, bfloat16, float16 or float64.
        targets: ``[*]``, any integer dtype, each in ``[0, vocab_size)`` or equal to ``ignore_index``.
        temperature: final logits are divided by it; > 0.
        softcap: ``c`` in ``c * tanh(logits / c)``, applied before the temperature; > 0, or ``None`` for none.
        ignore_index: rows with this target are ignored, also where it lies inside ``[0, vocab_size)``.
        row_mask: ``[*]`` bool; rows with ``False`` are ignored whatever their target and logits hold.
        vocab_size: only the first ``vocab_size`` columns take part; the others (padding) get zero gradient.
        backend: ``"reference"``, ``"triton"`` or ``"native"`` to force one; see :func:`choose_backend`.

    Returns:
        :class:`TokenStats` with tensors of the shape of ``targets``; ignored rows hold 0
        and pass zero gradients.

    Raises:
        TypeError: a dtype is not supported, or an argument is a DTensor.
        ValueError: a shape, a device, an option or a target's value is wrong. Values of targets are
            checked when the operator runs, also under ``torch.compile``.
        RuntimeError: the forced backend is not installed; or a gradient of a gradient is asked for.
    """
    _check_tensor("logits", logits, SUPPORTED_DTYPES)
    if logits.dim() < 1:
        raise ValueError("logits must have shape [*, V], got a tensor without axes")
    _check_rows("logits", logits, targets, row_mask)
    _check_options(temperature, softcap, backend)
    num_columns = check_vocab_size(logits.shape[-1], vocab_size)
    shape = targets.shape
    outputs = _token_stats(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1).to(torch.int64),
        None if row_mask is None else row_mask.reshape(-1),
        float(temperature),
        None if softcap is None else float(softcap),
        ignore_index,
        num_columns,
        backend or "",
    )
    return TokenStats(*(output.reshape(shape) for output in outputs[:4]))


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    row_mask: Tensor | None = None,
    vocab_size: int | None = None,
    tp_group: "ProcessGroup | None" = None,
    skip_negligible: bool = False,
    backend: str | None = None,
) -> TokenStats:
    """Token statistics of ``softcap(hidden @ weight.T + bias) / temperature`` without holding the logits.

    Statistics are computed in float32 whatever the operands' dtype: with bfloat16 operands the logits are
    never rounded to bfloat16. ``hidden`` and ``weight`` of different dtypes are computed in the dtype that
    both promote to; under ``torch.autocast`` both are cast to the autocast dtype first, as
    ``torch.nn.functional.linear`` does (float64 is left alone by both). Gradients have the dtype of their
    tensor.

    Args:
        hidden: ``[*, D]``, float32, bfloat16, float16 or float64.
        weight: ``[V, D]``, one of the same dtypes. A DTensor is refused: call this inside the ``forward``
            of the FSDP module that owns the weight, or pass ``weight.full_tensor()``.
        targets: ``[*]``, any integer dtype, each in ``[0, vocab_size)`` or equal to ``ignore_index``.
        bias: ``[V]`` or ``None``; ``-inf`` bans a token.
        temperature: final logits are divided by it; > 0.
        softcap: ``c`` in ``c * tanh(z / c)``, applied after the bias, before the temperature; > 0, or
            ``None``.
        ignore_index: rows with this target are ignored, also where it lies inside ``[0, vocab_size)``.
        row_mask: ``[*]`` bool; rows with ``False`` are ignored whatever they hold, and cost no product.
        vocab_size: only the first ``vocab_size`` rows of ``weight`` take part; the others get zero gradient.
        tp_group: a process group whose ranks each hold a part of the vocabulary; see below.
        skip_negligible: leave out of the backward products the parts of a row's vocabulary where every gradient of
            its logits is below the resolution of the operands' dtype (1/32 of its epsilon, relative to the row's
            upstream gradients). Faster where distributions are peaked, at the price of a small bias: many
            negligible terms of one sign can add up to one that is not.
        backend: ``"reference"``, ``"triton"`` or ``"native"`` to force one; see :func:`choose_backend`.

    Vocabulary-parallel: with ``tp_group``, ``weight [V_r, D]`` and ``bias [V_r]`` are this rank's shard: the shards in
    rank order are the vocabulary, they may be uneven, and one may be empty. ``targets`` are global columns and
    ``vocab_size`` counts those. ``hidden``, ``targets``, ``row_mask`` and all options are the same on every rank of the
    group, and so must be the gradients that arrive at the statistics, each as of one process's loss (not divided by
    the number of ranks). All ranks return the same statistics. ``hidden`` gets its whole gradient on every rank,
    summed over the ranks in here: reduce it no further. ``weight`` and ``bias`` get that of their shard.

    Returns:
        :class:`TokenStats` with tensors of the shape of ``targets``; ignored rows hold 0
        and pass zero gradients.

    Raises:
        TypeError: a dtype is not supported, or an argument is a DTensor.
        ValueError: a shape, a device, an option or a target's value is wrong, or ranks disagree about the rows.
            Values of targets are checked when the operator runs, also under ``torch.compile``.
        RuntimeError: the forced backend is not installed; or a gradient of a gradient is asked for.
    """
    if tp_group is not None:
        # Imported when first used: not every build of torch has process groups.
        from repirl_kernels.parallel import vocab_parallel_token_stats

        operands = prepare_linear(
            hidden, weight, targets, bias, temperature, softcap, row_mask, None, backend, is_shard=True
        )
        stats = vocab_parallel_token_stats(
            operands, temperature, softcap, ignore_index, vocab_size, skip_negligible, backend, tp_group
        )
        return TokenStats(*(output.reshape(targets.shape) for output in stats))
    operands = prepare_linear(hidden, weight, targets, bias, temperature, softcap, row_mask, vocab_size, backend)
    outputs = _linear_token_stats(
        operands.hidden,
        operands.weight,
        operands.targets,
        operands.bias,
        operands.row_mask,
        float(temperature),
        None if softcap is None else float(softcap),
        ignore_index,
        operands.vocab_size,
        skip_negligible,
        backend or "",
    )
    return TokenStats(*(output.reshape(targets.shape) for output in outputs[:4]))


class LinearOperands(NamedTuple):
    """Checked operands: rows flattened to ``[N, D]`` and ``[N]``, in the dtype of the product."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    row_mask: Tensor | None
    vocab_size: int


def prepare_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    row_mask: Tensor | None,
    vocab_size: int | None,
    backend: str | None,
    is_shard: bool = False,
) -> LinearOperands:
    """Check the arguments of a linear op, whose docstring names the errors, and bring them into one form.

    A shard of the vocabulary may be empty.
    """
    _check_tensor("hidden", hidden, SUPPORTED_DTYPES)
    _check_tensor("weight", weight, SUPPORTED_DTYPES)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [*, D] and weight [V, D], got hidden {tuple(hidden.shape)} and "
            f"weight {tuple(weight.shape)}"
        )
    if weight.shape[1] == 0:
        raise ValueError("hidden and weight have no features: D = 0")
    _check_device("weight", weight, "hidden", hidden)
    _check_rows("hidden", hidden, targets, row_mask)
    _check_options(temperature, softcap, backend)
    num_columns = weight.shape[0] if is_shard else check_vocab_size(weight.shape[0], vocab_size)
    if bias is not None:
        _check_tensor("bias", bias, SUPPORTED_DTYPES)
        _check_device("bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"expected bias [{weight.shape[0]}] (V of weight), got {tuple(bias.shape)}")
    dtype = _product_dtype(hidden, weight)
    if bias is not None and bias.dtype != dtype:
        # A bias more precise than a half-precision product costs nothing to keep: it is added in float32.
        bias = bias.to(statistics_dtype(dtype))
    return LinearOperands(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        targets.reshape(-1).to(torch.int64),
        bias,
        None if row_mask is None else row_mask.reshape(-1),
        num_columns,
    )


def choose_backend(device: torch.device | str, dtype: torch.dtype, backend: str | None = None) -> str:
    """The name of the backend that runs for tensors of this device and dtype.

    float64 always runs ``"reference"``. Else a CUDA or ROCm device runs ``"triton"`` and a CPU ``"native"``;
    where those are not installed, and on other devices, it is ``"reference"``. ``backend`` forces one.

    Raises:
        ValueError: ``backend`` is not a backend's name, or does not run on ``device``.
        TypeError: ``backend`` does not run in ``dtype``.
        RuntimeError: ``backend`` is not installed.
    """
    device = torch.device(device)
    if backend is None:
        if dtype == torch.float64:
            return "reference"
        if device.type == "cuda" and _triton_installed():
            return "triton"
        if device.type == "cpu":
            if native.is_available():
                return "native"
            _warn_once(
                "repirl_kernels: the native CPU backend is not built, running the slower reference backend. "
                "Reinstall with a C++17 compiler to get it, or pass backend='reference' to silence this."
            )
        elif device.type == "cuda":
            _warn_once(
                "repirl_kernels: triton is not installed, running the slower reference backend. "
                "Install triton to use the GPU kernels, or pass backend='reference' to silence this."
            )
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, expected one of {', '.join(BACKENDS)} or None")
    if backend == "reference":
        return backend
    if dtype == torch.float64:
        raise TypeError(f"backend={backend!r} does not run in float64, expected backend='reference' or None")
    if backend == "native":
        if device.type != "cpu":
            raise ValueError(f"backend='native' runs on the CPU, got tensors on {device}")
        if not native.is_available():
            raise RuntimeError("backend='native' is not built: reinstall repirl with a C++17 compiler")
        return backend
    if not _triton_installed():
        raise RuntimeError("backend='triton' needs the triton package: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' runs on a GPU, got tensors on {device} (for tests on the CPU, "
            "set TRITON_INTERPRET=1 before the first import of repirl_kernels)"
        )
    return backend


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor: call this inside the forward of the FSDP "
            f"module that owns it, where the parameter is gathered, or pass {name}.full_tensor()"
        )
    if tensor.dtype not in dtypes:
        expected = ", ".join(_dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{name} has dtype {_dtype_name(tensor.dtype)}, expected one of {expected}")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one of them"
        )


def _check_rows(name: str, rows: Tensor, targets: Tensor, row_mask: Tensor | None) -> None:
    _check_tensor("targets", targets, _TARGET_DTYPES)
    _check_device("targets", targets, name, rows)
    if targets.shape != rows.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of {name} without its last axis, {tuple(rows.shape[:-1])}, got "
            f"{tuple(targets.shape)}"
        )
    if row_mask is not None:
        _check_tensor("row_mask", row_mask, (torch.bool,))
        _check_device("row_mask", row_mask, name, rows)
        if row_mask.shape != targets.shape:
            raise ValueError(
                f"row_mask must have the shape of targets, {tuple(targets.shape)}, got "
                f"{tuple(row_mask.shape)}"
            )


def _check_options(temperature: float, softcap: float | None, backend: str | None) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a finite number > 0 or None, got {softcap}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, expected one of {', '.join(BACKENDS)} or None")


def check_vocab_size(num_columns: int, vocab_size: int | None) -> int:
    if num_columns == 0:
        raise ValueError("the vocabulary is empty: V = 0")
    if vocab_size is None:
        return num_columns
    if not 1 <= vocab_size <= num_columns:
        raise ValueError(f"vocab_size must lie in [1, {num_columns}] (the number of columns), got {vocab_size}")
    return vocab_size


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return promoted


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def backend_module(tensor: Tensor, backend: str) -> ModuleType:
    name = choose_backend(tensor.device, tensor.dtype, backend or None)
    # Imported when first used: the Triton kernels are of no use, and slow to import, where there is no GPU.
    return importlib.import_module(f"repirl_kernels.{name}")


@torch.library.custom_op("repirl_kernels::token_stats", mutates_args=())
def _token_stats(
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    keep = kept_rows(targets, row_mask, ignore_index)
    check_target_values(targets, keep, vocab_size)
    functions = backend_module(logits, backend)
    rows = row_indices(keep)
    num_rows = logits.shape[0]
    if num_rows == 0 or (rows is not None and rows.shape[0] == 0):
        return empty_stats(logits)
    with torch.autocast(logits.device.type, enabled=False):
        logprob, logsumexp, target_logit, entropy, _ = functions.logits_forward(
            take(logits, rows), take(targets, rows), temperature, softcap, vocab_size
        )
    return put_stats(logprob, logsumexp, target_logit, entropy, rows, num_rows)


@_token_stats.register_fake
def _token_stats_fake(
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_stats(logits)


@torch.library.custom_op("repirl_kernels::token_stats_backward", mutates_args=())
def _token_stats_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    backend: str,
) -> Tensor:
    upstream = (g_logprob, g_logsumexp, g_target_logit, g_entropy)
    stats = (logsumexp, entropy, logsumexp_low)
    rows = row_indices(live_rows(upstream, kept_rows(targets, row_mask, ignore_index)))
    num_rows = logits.shape[0]
    if num_rows == 0 or (rows is not None and rows.shape[0] == 0):
        return torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    taken = [take(column, rows) for column in (*upstream, *stats)]
    mass, onehot, slope, mean_logit = fold_upstream(*taken)
    with torch.autocast(logits.device.type, enabled=False):
        dlogits = backend_module(logits, backend).logits_backward(
            torch.zeros_like(mass), mass, onehot, slope, take(logits, rows), take(targets, rows),
            taken[4], mean_logit, temperature, softcap, vocab_size,
        )  # fmt: skip
    return put(dlogits, rows, num_rows)


@_token_stats_backward.register_fake
def _token_stats_backward_fake(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_mask: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    backend: str,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    backend: str,
    logits: Tensor | None = None,
    dweight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The four statistics and what logsumexp lost; the first rows of ``logits`` get those of rows that count.

    ``logits`` may be a buffer of the native backend's (without rows), which comes with ``dweight`` if that is its, too.
    """
    keep = kept_rows(targets, row_mask, ignore_index)
    check_target_values(targets, keep, vocab_size)
    functions = backend_module(hidden, backend)
    rows = row_indices(keep)
    num_rows = hidden.shape[0]
    num_kept = num_rows if rows is None else rows.shape[0]
    if num_kept == 0:
        return empty_stats(hidden)
    kept: dict[str, Any] = {} if logits is None else {"logits": logits[:num_kept]}
    if logits is not None and logits.dim() == 1:
        kept = {"logits": logits, "dweight": dweight}
    with torch.autocast(hidden.device.type, enabled=False):
        logprob, logsumexp, target_logit, entropy, _ = functions.linear_forward(
            take(hidden, rows), take(weight, None), take(targets, rows), contiguous(bias), temperature,
            softcap, vocab_size, **kept,
        )  # fmt: skip
    return put_stats(logprob, logsumexp, target_logit, entropy, rows, num_rows)


def linear_backward(
    upstream: tuple[Tensor, ...],
    stats: tuple[Tensor, ...],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    logits: Tensor | None = None,
    weight_sum: Tensor | None = None,
    dweight: Tensor | None = None,
    skip_negligible: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; one that is not needed is returned as an empty tensor.

    ``stats`` are logsumexp, entropy and what logsumexp lost. ``logits`` are those that :func:`linear_forward` left, and
    are overwritten. With ``weight_sum`` the weight's gradient is added to that; with ``dweight``, the forward pass's,
    it is written there; here it is an empty tensor then.
    """
    keep = kept_rows(targets, row_mask, ignore_index)
    live = live_rows(upstream, keep)
    rows = row_indices(live)
    num_rows = hidden.shape[0]
    num_live = num_rows if rows is None else rows.shape[0]
    need_bias = need_bias and bias is not None
    dhidden: Tensor | None = None
    new_dweight: Tensor | None = None
    dbias: Tensor | None = None
    if num_live == 0:
        if need_hidden:
            dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if dweight is not None:
            dweight.zero_()
        elif need_weight and weight_sum is None:
            new_dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        if bias is not None and need_bias:
            dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
        return gradients_or_empty(hidden, weight, dhidden, new_dweight, dbias)
    kept: dict[str, Any] = {}
    if logits is not None:
        still_live = live[keep]
        places = row_indices(still_live)
        kept = {"logits": logits, "num_logits_rows": len(still_live), "logits_rows": places, "dweight": dweight}
        if logits.dim() == 2:
            if places is not None:
                compact(logits, places)
            kept = {"logits": logits[:num_live]}
    taken = [take(column, rows) for column in (*upstream, *stats)]
    mass, onehot, slope, mean_logit = fold_upstream(*taken)
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden, new_dweight, dbias = backend_module(hidden, backend).linear_backward(
            torch.zeros_like(mass), mass, onehot, slope, take(hidden, rows), take(weight, None),
            take(targets, rows), contiguous(bias), taken[4], mean_logit, temperature, softcap,
            vocab_size, need_hidden, need_weight, need_bias,
            dweight_sum=weight_sum if need_weight else None,
            skip_below=skip_below(mass, onehot, slope, hidden.dtype) if skip_negligible else None,
            **kept,
        )  # fmt: skip
    if dhidden is not None:
        dhidden = put(dhidden, rows, num_rows)
    return gradients_or_empty(hidden, weight, dhidden, None if dweight is not None else new_dweight, dbias)


@torch.library.custom_op("repirl_kernels::linear_token_stats", mutates_args=())
def _linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    skip_negligible: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return linear_forward(
        hidden, weight, targets, bias, row_mask, temperature, softcap, ignore_index, vocab_size, backend
    )


@_linear_token_stats.register_fake
def _linear_token_stats_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    skip_negligible: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_stats(hidden)


@torch.library.custom_op("repirl_kernels::linear_token_stats_backward", mutates_args=())
def _linear_token_stats_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    skip_negligible: bool,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; one that is not needed is returned as an empty tensor."""
    return linear_backward(
        (g_logprob, g_logsumexp, g_target_logit, g_entropy),
        (logsumexp, entropy, logsumexp_low),
        hidden,
        weight,
        targets,
        bias,
        row_mask,
        temperature,
        softcap,
        ignore_index,
        vocab_size,
        backend,
        need_hidden,
        need_weight,
        need_bias,
        skip_negligible=skip_negligible,
    )


@_linear_token_stats_backward.register_fake
def _linear_token_stats_backward_fake(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    skip_negligible: bool,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _token_stats_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, targets, row_mask, *ctx.options = inputs
    _, logsumexp, _, entropy, logsumexp_low = output
    ctx.save_for_backward(logits, targets, row_mask, logsumexp, entropy, logsumexp_low)


def _token_stats_autograd(ctx, *gradients):  # type: ignore[no-untyped-def]
    logits, targets, row_mask, *stats = ctx.saved_tensors
    upstream = [gradient.contiguous() for gradient in gradients[:4]]
    dlogits = _token_stats_backward(*upstream, logits, targets, row_mask, *stats, *ctx.options)
    return dlogits, *[None] * 7


def _linear_token_stats_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, row_mask, *ctx.options = inputs
    _, logsumexp, _, entropy, logsumexp_low = output
    ctx.save_for_backward(hidden, weight, targets, bias, row_mask, logsumexp, entropy, logsumexp_low)


def _linear_token_stats_autograd(ctx, *gradients):  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, row_mask, *stats = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    upstream = [gradient.contiguous() for gradient in gradients[:4]]
    dhidden, dweight, dbias = _linear_token_stats_backward(
        *upstream,
        hidden,
        weight,
        targets,
        bias,
        row_mask,
        *stats,
        *ctx.options,
        need_hidden,
        need_weight,
        need_bias,
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * 7,
    )


_token_stats.register_autograd(_token_stats_autograd, setup_context=_token_stats_context)
_linear_token_stats.register_autograd(_linear_token_stats_autograd, setup_context=_linear_token_stats_context)
_token_stats_backward.register_autograd(refuse_double_backward, setup_context=no_context)
_linear_token_stats_backward.register_autograd(refuse_double_backward, setup_context=no_context)
