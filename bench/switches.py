"""``python -m bench.switches``: what each switch for small memory saves, and what it costs in time.

Each run makes two steps of the dual loop with one switch, or with none; the runs take turns. Policy, PRM and frozen
reference are models of SmolLM2-135M's shape with random weights, in float32 (the reward is a log-ratio, so that all
three are needed). The lengths of the data are at the configuration's limits. Peaks are of resident memory, of the
largest process; seconds are of the last step, the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.figures import described, machine, save
from bench.plan_check import RETURNED, make_files, settings_of, train
from repirl.configfile import build_config, describe, merge
from repirl.plan.plan import GIB

BASE: dict[str, Any] = {"prm": {"reward": "logprob"}, "irl": {"base_measure": "reference"}}
THREADS = 2


def both(options: dict[str, Any]) -> dict[str, Any]:
    return {"policy": options, "prm": options}


# Label, processes, changes.
SWITCHES: list[tuple[str, int, dict[str, Any]]] = [
    ("none", 1, {}),
    ("batch.tokens_per_microbatch: 256", 1, {"batch": {"tokens_per_microbatch": 256}}),
    ("gradient_checkpointing, both", 1, both({"gradient_checkpointing": True})),
    ("adapters: {rank: 16}", 1, {"adapters": {"rank": 16}}),
    ("offload_idle: true", 1, {"offload_idle": True}),
    ("optimizer.state_bits: 8, both", 1, both({"optimizer": {"state_bits": 8}})),
    ("compute_dtype: bfloat16", 1, {"compute_dtype": "bfloat16"}),
    ("two processes", 2, {}),
    (
        "adapters, smaller micro-batches, checkpointing and state_bits 8",
        1,
        merge(
            {"batch": {"tokens_per_microbatch": 256}, "adapters": {"rank": 16}},
            both({"gradient_checkpointing": True, "optimizer": {"state_bits": 8}}),
        ),
    ),
]


def measure(folder: Path, processes: int, changes: dict[str, Any]) -> dict[str, float]:
    """Peak bytes and seconds of one run's last step."""
    config = build_config(settings_of(folder, merge(BASE, changes)))
    metrics = train(folder, describe(config), processes, RETURNED, threads=THREADS // processes)
    return {"peak": metrics["memory/peak_bytes"]} | {k: v for k, v in metrics.items() if k.startswith("seconds/")}


def rows(result: dict[str, Any]) -> list[str]:
    """The table's rows: medians, and their ratios to those of the run without any switch."""
    medians = {
        label: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for label, rounds in result["rounds"].items()
    }
    plain, lines = medians["none"], []
    for label, values in medians.items():
        seconds = [r["seconds/step"] for r in result["rounds"][label]]
        cells = [
            f"`{label}`" if ":" in label else label,
            f"{values['peak'] / GIB:.2f}",
            f"{values['peak'] / plain['peak']:.2f}",
            f"{values['seconds/step']:.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
            f"{values['seconds/step'] / plain['seconds/step']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What each switch saves, and costs",
        "",
        *(__doc__ or "").splitlines()[2:],
        f"{THREADS} threads in all, divided among the processes; `MALLOC_MMAP_THRESHOLD_=131072` (plan.md says why).",
        "",
        f"Made by `{result['command']}`; {described(result['machine'])}.",
        "",
        "| switch | peak, GiB | ratio to none | seconds a step | ratio to none |",
        "|---|---:|---:|---:|---:|",
        *rows(result),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all switches in turns; the results are written after each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.switches", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON, and beside them as Markdown")
    options = parser.parse_args(arguments)
    command = " ".join(["python", "-m", "bench.switches", *(arguments or sys.argv[1:])])
    result: dict[str, Any] = {"command": command, "machine": machine(), "rounds": {}}
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        for _ in range(options.rounds):
            for label, processes, changes in SWITCHES:
                result["rounds"].setdefault(label, []).append(measure(Path(folder), processes, changes))
                print(rows(result)[list(result["rounds"]).index(label)], flush=True)
                if options.output:
                    save(options.output, result, page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
