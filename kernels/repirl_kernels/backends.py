"""Chooses the backend for a device and dtype, and imports it."""

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from repirl_kernels import native
from repirl_kernels.operands import BACKENDS


def choose_backend(device: torch.device | str, dtype: torch.dtype, backend: str | None = None) -> str:
    """The name of the backend that runs for tensors of this device and dtype.

    For float64 it is always ``"reference"``. For other dtypes it is ``"triton"`` on a CUDA or ROCm device and
    ``"native"`` on a CPU; if that one is not installed, and on other devices, it is ``"reference"``.

    Args:
        device: the tensors' device.
        dtype: the tensors' dtype.
        backend: the backend to force; ``None`` chooses by device and dtype.

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
                f"repirl_kernels: the native CPU backend {native.why_not()}, running the slower reference backend. "
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
            raise RuntimeError(f"backend='native' {native.why_not()}: reinstall repirl with a C++17 compiler")
        return backend
    if not _triton_installed():
        raise RuntimeError("backend='triton' needs the triton package: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' runs on a GPU, got tensors on {device} (for tests on the CPU, "
            "set TRITON_INTERPRET=1 before the first import of repirl_kernels)"
        )
    return backend


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def repeats_products(tensor: Tensor, backend: str) -> bool:
    """Whether the backend computes the same bits for a row's logits, no matter how many other rows there are."""
    name = choose_backend(tensor.device, tensor.dtype, backend or None)
    return name == "triton" or (name == "native" and native.has_products(tensor.dtype))


def backend_module(tensor: Tensor, backend: str) -> ModuleType:
    name = choose_backend(tensor.device, tensor.dtype, backend or None)
    # Import a backend only when it is used: importing the Triton kernels is slow.
    return importlib.import_module(f"repirl_kernels.{name}")
