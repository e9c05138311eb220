"""OUTPUT_DIR/run.json: when, where and by what a run was started, and with which configuration.

It holds {"starts": [...]}, one entry for the start of the run and one for each time that it went on:

    step           finished turns at that time
    time           ISO 8601, UTC
    version        of repirl
    revision       commit of the sources, with "+changes" where they differ from it; null where it is not known
    machine        {"cpu", "cores", "memory_gib", "gpu", "processes", "system"}; gpu: null on a CPU
    packages       versions of python, torch and transformers
    command        the command line
    configuration  all options
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from repirl.config import Config, first_line
from repirl.report.log import explained
from repirl.version import __version__

logger = logging.getLogger(__name__)

NAME = "run.json"


def record_start(config: Config, start_step: int, device: torch.device, num_processes: int) -> None:
    """Add a start to the file; a new run begins a new file.

    Args:
        config: the run's.
        start_step: the number of finished steps of a resumed run; 0 for a new one.
        device: on which it computes.
        num_processes: that share it.

    Raises:
        LogError: the file cannot be written.
    """
    path = Path(config.output_dir) / NAME
    starts = read_starts(config.output_dir) if start_step else []
    entry = {
        "step": start_step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "revision": revision(),
        "machine": _machine(device) | {"processes": num_processes},
        "packages": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "configuration": config.model_dump(mode="json"),
    }
    temporary = path.with_name(NAME + ".tmp")
    with explained(path, "how the run was started"):
        temporary.write_text(json.dumps({"starts": [*starts, entry]}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def read_starts(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The entries of a run's file, the first start first. None where there is no file; where it is damaged, a warning
    says so."""
    path = Path(output_dir) / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        starts = content["starts"]
        if not isinstance(starts, list) or not all(isinstance(entry, dict) for entry in starts):
            raise ValueError("'starts' is no list of objects")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be used (%s): how the run was started is not known", path, first_line(error))
        return []
    return starts


@cache
def revision() -> str | None:
    """The commit of the sources that run, in a checkout or installed from a repository; None where it is not known."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        try:
            commit = _git(root, "rev-parse", "--short=12", "HEAD")
            changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "repirl", "kernels", "csrc")
        except (OSError, subprocess.SubprocessError):
            return None
        return commit + "+changes" * bool(changed)
    try:
        described = Distribution.from_name("repirl").read_text("direct_url.json")
        commit = json.loads(described or "{}").get("vcs_info", {}).get("commit_id")
    except (PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit[:12] if isinstance(commit, str) else None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _machine(device: torch.device) -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.system(),
    }
