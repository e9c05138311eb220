"""The version of repirl, and the versions beside it that a bug report needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

# What a run's numbers and speed depend on.
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "accelerate", "peft", "torchao", "vllm", "numpy")


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed. Nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Without an installation (bench/gpu.py runs from the sources) there is no version.
__version__ = version_of("repirl") or "unknown"


def environment() -> dict[str, str]:
    """The versions and the machine, by name. It imports torch, which takes seconds."""
    import torch
    from repirl_kernels import native

    told = {"repirl": __version__, "python": platform.python_version(), "platform": platform.platform()}
    told |= {name: installed for name in _PACKAGES if (installed := version_of(name)) is not None}
    if native.is_available():
        told["native CPU kernels"] = f"{native.instruction_set()} (of {', '.join(native.instruction_sets())})"
    else:
        told["native CPU kernels"] = "not built: reinstall repirl with a C++17 compiler for a faster CPU path"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        told["GPU"] = f"{', '.join(names)} (CUDA {torch.version.cuda or torch.version.hip})"
    else:
        told["GPU"] = "none that PyTorch sees"
    return told


def environment_text() -> str:
    """What `repirl --version` prints: `repirl VERSION` first, then a line for each of `environment`."""
    told = environment()
    lines = [f"repirl {told.pop('repirl')}"]
    width = max(map(len, told))
    return "\n".join(lines + [f"{name:<{width}}  {value}" for name, value in told.items()])
