"""Checks the arguments of the ops, and puts their options into one value.

Axes: N rows (tokens), D features, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("reference", "triton", "native")
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TARGET_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
# The range of temperatures and softcaps: float32 holds these numbers and their inverses.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-126, 2.0**126


class Options(NamedTuple):
    """The options of an op. They are the last arguments of every operator, in this order."""

    temperature: float
    """1 if each row has its own temperature."""
    softcap: float | None
    ignore_index: int
    vocab_size: int
    label_smoothing: float
    with_entropy: bool
    with_argmax: bool
    backend: str
    """Empty for the one that :func:`repirl_kernels.choose_backend` chooses."""


class LinearOperands(NamedTuple):
    """Checked operands: rows flattened to ``[N, D]`` and ``[N]``, in the dtype of the product."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    row_mask: Tensor | None
    row_temperature: Tensor | None


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of ``dtype`` inputs are computed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare_linear(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    row_mask: Tensor | None,
    vocab_size: int | None,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str | None,
    is_shard: bool = False,
) -> tuple[LinearOperands, Options]:
    """Check the arguments of a linear op, and flatten and cast them. The op's docstring lists the errors.

    A shard of the vocabulary may be empty; the caller has to check its ``vocab_size``.
    """
    _check_tensor("hidden", hidden, SUPPORTED_DTYPES)
    _check_weight(weight)
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [*, D] and weight [V, D], got hidden {tuple(hidden.shape)} and "
            f"weight {tuple(weight.shape)}"
        )
    if weight.shape[1] == 0:
        raise ValueError("hidden and weight have no features: D = 0")
    _check_device("weight", weight, "hidden", hidden)
    _check_rows("hidden", hidden, targets, row_mask)
    if bias is not None:
        _check_tensor("bias", bias, SUPPORTED_DTYPES)
        _check_device("bias", bias, "hidden", hidden)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"expected bias [{weight.shape[0]}] (V of weight), got {tuple(bias.shape)}")
    refuse_forward_mode(hidden, weight, bias)
    dtype = _product_dtype(hidden, weight)
    if bias is not None and bias.dtype != dtype:
        # A bias that is more precise than half-precision operands is kept: it is added in float32 in any case.
        bias = bias.to(statistics_dtype(dtype))
    if is_shard:
        if vocab_size is not None:
            check_integer("vocab_size", vocab_size)  # of all shards; parallel.py checks it
        num_columns = weight.shape[0]
    else:
        num_columns = check_vocab_size(weight.shape[0], vocab_size)
    temperature, row_temperature = _split_temperature(temperature, targets, statistics_dtype(dtype))
    options = _make_options(
        temperature, softcap, ignore_index, num_columns, label_smoothing, with_entropy, with_argmax, backend, dtype
    )
    operands = LinearOperands(
        hidden.reshape(-1, hidden.shape[-1]).to(dtype),
        weight.to(dtype),
        _as_int64(targets.reshape(-1)),
        bias,
        None if row_mask is None else row_mask.reshape(-1),
        row_temperature,
    )
    return operands, options


def prepare_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    row_mask: Tensor | None,
    vocab_size: int | None,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str | None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], Options]:
    """Like :func:`prepare_linear`, for given logits ``[N, V]`` with targets, mask and temperatures ``[N]``."""
    _check_tensor("logits", logits, SUPPORTED_DTYPES)
    if logits.dim() < 1:
        raise ValueError("logits must have shape [*, V], got a tensor without axes")
    _check_rows("logits", logits, targets, row_mask)
    refuse_forward_mode(logits)
    num_columns = check_vocab_size(logits.shape[-1], vocab_size)
    temperature, row_temperature = _split_temperature(temperature, targets, statistics_dtype(logits.dtype))
    options = _make_options(
        temperature, softcap, ignore_index, num_columns, label_smoothing, with_entropy, with_argmax, backend,
        logits.dtype,
    )  # fmt: skip
    rows = (
        logits.reshape(-1, logits.shape[-1]),
        _as_int64(targets.reshape(-1)),
        None if row_mask is None else row_mask.reshape(-1),
        row_temperature,
    )
    return rows, options


def check_vocab_size(num_columns: int, vocab_size: int | None) -> int:
    """The number of columns that are not padding. ValueError if ``vocab_size`` is out of range."""
    if num_columns == 0:
        raise ValueError("the vocabulary is empty: V = 0")
    if vocab_size is None:
        return num_columns
    vocab_size = check_integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= num_columns:
        raise ValueError(f"vocab_size must lie in [1, {num_columns}] (the number of columns), got {vocab_size}")
    return vocab_size


def refuse_forward_mode(*tensors: Tensor | None, what: str = "token statistics") -> None:
    """Raise NotImplementedError for a dual tensor, because its tangent would be lost silently."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"repirl_kernels: {what} have no forward-mode derivatives (torch.func.jvp, "
                "torch.autograd.forward_ad). Use reverse mode, or compute them from plain PyTorch logits"
            )


def check_main_grad(main_grad: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError unless a gradient of ``weight`` can be added up in ``main_grad``."""
    _check_tensor("main_grad", main_grad, (dtype,))
    if main_grad is weight or _shares_memory(main_grad, weight):
        raise ValueError("main_grad is the weight itself: its gradient would be added to it; give a buffer of its own")
    fits = (main_grad.shape, main_grad.device) == (weight.shape, weight.device)
    if not fits or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad must be contiguous and of the weight's shape {tuple(weight.shape)} on {weight.device}, got "
            f"{tuple(main_grad.shape)}, strides {main_grad.stride()}, on {main_grad.device}"
        )


def _shares_memory(left: Tensor, right: Tensor) -> bool:
    """Whether both begin at the same address; False if that is unknown because tensors are wrapped or traced."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    storages = (left.untyped_storage()._cdata, right.untyped_storage()._cdata)
    return storages[0] == storages[1] and left.storage_offset() == right.storage_offset()


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
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values; expected a tensor on a CPU or a GPU")


def _check_weight(weight: Tensor) -> None:
    _check_tensor("weight", weight, SUPPORTED_DTYPES)
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            "weight is a DeepSpeed ZeRO-3 parameter that is not gathered here, and has no elements: call this inside "
            "the forward of the module that owns it, or inside deepspeed.zero.GatheredParameters([weight])"
        )


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}; move one of them")


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
                f"row_mask must have the shape of targets, {tuple(targets.shape)}, got {tuple(row_mask.shape)}"
            )


def _as_int64(targets: Tensor) -> Tensor:
    result = targets.to(torch.int64)
    if targets.dtype == torch.uint64:  # beyond int64: neither a column nor the ignore_index
        result = torch.where(result < 0, torch.iinfo(torch.int64).max, result)
    return result


def _split_temperature(temperature: float | Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """``(temperature, None)`` for a number; else 1 and temperatures ``[N]``, whose values the operator checks later."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    _check_tensor("temperature", temperature, SUPPORTED_DTYPES)
    _check_device("temperature", temperature, "targets", targets)
    refuse_forward_mode(temperature)
    if temperature.requires_grad:
        raise ValueError(
            "temperature requires a gradient, and would get none: detach it. To learn one, divide hidden by it "
            "before the call (with a softcap or a bias it has to stand after those: use plain PyTorch logits)"
        )
    if temperature.dim() > 0 and temperature.shape != targets.shape:
        raise ValueError(
            f"temperature must be a number or have the shape of targets, {tuple(targets.shape)}, got "
            f"{tuple(temperature.shape)}"
        )
    return 1.0, temperature.expand(targets.shape).reshape(-1).to(dtype)


def _make_options(
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str | None,
    dtype: torch.dtype,
) -> Options:
    in_float32 = dtype != torch.float64
    temperature = _check_number("temperature", temperature)
    _check_scale("temperature", temperature, in_float32, "")
    if softcap is not None:
        softcap = _check_number("softcap", softcap)
        _check_scale("softcap", softcap, in_float32, " or None")
    ignore_index = check_integer("ignore_index", ignore_index)
    label_smoothing = _check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
    for name, value in (("with_entropy", with_entropy), ("with_argmax", with_argmax)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be a 64-bit integer, got {ignore_index}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown, expected one of {', '.join(BACKENDS)} or None")
    return Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend or ""
    )


def _check_number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and _is_of_numpy(value):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


def _is_of_numpy(value: Any) -> bool:
    """Whether ``value`` is a NumPy number, or a NumPy array that holds one."""
    return not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0 and hasattr(value, "item")


def _check_scale(name: str, value: float, in_float32: bool, or_none: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0{or_none}, got {value}")
    if in_float32 and not SMALLEST_SCALE <= value <= LARGEST_SCALE:
        raise ValueError(
            f"{name} must lie in [{SMALLEST_SCALE:.3g}, {LARGEST_SCALE:.3g}], so that float32 holds it and its "
            f"inverse, got {value}"
        )


def check_integer(name: str, value: Any) -> Any:
    if not isinstance(value, (int, torch.SymInt)) and _is_of_numpy(value):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    return value


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    device_type = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return promoted


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
