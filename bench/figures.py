"""What published figures come with: the machine that made them, and their spread."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers


def machine() -> dict[str, Any]:
    """The machine and the versions with which the figures were measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": revision,
    }


def described(facts: dict[str, Any]) -> str:
    """What `machine` says, as text."""
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def spread(values: list[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean and standard error as text.

    Args:
        values: one a seed.
        scale: what they are multiplied by; 100 makes percent of shares.
        digits: behind the point.
    """
    if not values:
        return "-"
    text = f"{scale * mean(values):.{digits}f}"
    return f"{text} ± {scale * standard_error(values):.{digits}f}" if len(values) > 1 else text


def save(output: Path, content: dict[str, Any], page: str) -> None:
    """Write results as JSON, and their page beside them as Markdown."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    output.with_suffix(".md").write_text(page)
