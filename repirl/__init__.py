"""rePIRL: process reward models for LLM reasoning by inverse reinforcement learning.

What stands in `__all__` is imported when it is first used, so that `import repirl` takes no time and no torch.
"""

import logging as _logging
from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

from repirl.version import __version__

if TYPE_CHECKING:
    from repirl.apps.adapt import adapt
    from repirl.apps.judge import judge
    from repirl.apps.rerank import rerank
    from repirl.apps.sample import sample
    from repirl.apps.score import score
    from repirl.apps.search import search
    from repirl.callbacks import Callback, EarlyStopping
    from repirl.config import Config, ConfigError, RunError
    from repirl.configfile import build_config, list_presets, load_config
    from repirl.evaluate import evaluate_checkpoint
    from repirl.export import export_checkpoint
    from repirl.loop import train
    from repirl.objectives import Objective
    from repirl.prm import PRM, PRMDescription, load_prm
    from repirl.report.log import read_metrics
    from repirl.systems import SYSTEMS, System

__all__ = [
    "PRM",
    "SYSTEMS",
    "Callback",
    "Config",
    "ConfigError",
    "EarlyStopping",
    "Objective",
    "PRMDescription",
    "RunError",
    "System",
    "__version__",
    "adapt",
    "build_config",
    "evaluate_checkpoint",
    "export_checkpoint",
    "judge",
    "list_presets",
    "load_config",
    "load_prm",
    "read_metrics",
    "rerank",
    "sample",
    "score",
    "search",
    "train",
]

# Where each name comes from.
_PLACES = {
    "adapt": "repirl.apps.adapt",
    "judge": "repirl.apps.judge",
    "rerank": "repirl.apps.rerank",
    "sample": "repirl.apps.sample",
    "score": "repirl.apps.score",
    "search": "repirl.apps.search",
    **dict.fromkeys(("Callback", "EarlyStopping"), "repirl.callbacks"),
    **dict.fromkeys(("Config", "ConfigError", "RunError"), "repirl.config"),
    **dict.fromkeys(("build_config", "list_presets", "load_config"), "repirl.configfile"),
    "evaluate_checkpoint": "repirl.evaluate",
    "export_checkpoint": "repirl.export",
    "train": "repirl.loop",
    "Objective": "repirl.objectives",
    **dict.fromkeys(("PRM", "PRMDescription", "load_prm"), "repirl.prm"),
    "read_metrics": "repirl.report.log",
    **dict.fromkeys(("SYSTEMS", "System"), "repirl.systems"),
}

# transformers imports torchao where it is installed, which warns of GPU kernels that it cannot load, as torch does of
# how torchao registers its types; both happen before anything of ours runs.
for _name in ("torchao", "torch.utils._pytree"):
    _logging.getLogger(_name).setLevel(_logging.ERROR)


def __getattr__(name: str) -> _Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'repirl' has no attribute {name!r}")
    try:
        value = getattr(_import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("repirl"):
            raise
        raise ImportError(
            f"repirl.{name} needs {error.name}, which is not installed: pip install 'repirl[train]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
