"""rePIRL: process reward models for LLM reasoning by inverse reinforcement learning."""

import logging as _logging
from importlib.metadata import version

__version__ = version("repirl")

# transformers imports torchao where it is installed, which warns of GPU kernels that it cannot load, as torch does of
# how torchao registers its types; both happen before anything of ours runs.
for _name in ("torchao", "torch.utils._pytree"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)
