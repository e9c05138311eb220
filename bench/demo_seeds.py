"""The demo over several seeds: mean and standard error of every figure.

python bench/demo_seeds.py --seeds 5 --threads 1 --output bench/results/cpu/demo.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers

from repirl.apps.demo import run


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


def standard_error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: every figure's mean and standard error, and paired differences of a PRM alone and others."""
    lines = [f"| figure | mean ± standard error, {len(results)} seeds | by seed |", "|---|---|---|"]
    figures = {name: [r["summary"][name] for r in results] for name in results[0]["summary"]}
    for name in ("RLOO", "SFT"):
        figures[f"accuracy/rePIRL, PRM only minus {name}"] = [
            r["summary"]["accuracy/rePIRL, PRM only"] - r["summary"][f"accuracy/{name}"] for r in results
        ]
    figures["seconds"] = [r["seconds"] for r in results]
    for name, values in figures.items():
        by_seed = ", ".join(f"{v:.3f}" for v in values)
        lines.append(f"| {name} | {mean(values):.3f} ± {standard_error(values):.3f} | {by_seed} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/demo.json"))
    options = parser.parse_args()
    described, results = machine(), []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run(f"{folder}/demo", seed, options.threads)
            results.append(json.loads(Path(folder, "demo", "results.json").read_text()))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": " ".join(["python", *sys.argv]),
            "machine": described,
            "threads": options.threads,
            "runs": results,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    text = table(results)
    about = ", ".join(f"{key} {value}" for key, value in described.items())
    page = f"# The demo, {options.seeds} seeds\n\n`{content['command']}`: {about}.\n\n{text}\n"
    options.output.with_suffix(".md").write_text(page)
    print(text)


if __name__ == "__main__":
    main()
