"""rePIRL: process reward models for LLM reasoning by inverse reinforcement learning."""

import logging as _logging
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

try:
    __version__ = _version("repirl")
except _PackageNotFoundError:
    # Run from the sources, where nothing could be installed (bench/gpu.py).
    __version__ = "unknown"

# transformers imports torchao where it is installed, which warns of GPU kernels that it cannot load, as torch does of
# how torchao registers its types; both happen before anything of ours runs.
for _name in ("torchao", "torch.utils._pytree"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)
