"""Record what training computes, to see that a change moved nothing: `python tests/support/record_runs.py --to FILE`.

Short runs of every kind through the command line, in processes of their own: each run's metrics without times and
memory, and the digest of every exported weight. `--against FILE` compares with an earlier record, to the bit: equal on
one machine with the same libraries; on another one, rounding differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from shared import MEASURED
from tiny import make_data, make_model

from repirl.configfile import merge

NUM_TURNS = 6

# What each run says beside the base; `processes` and `resumed_at` are for this script.
RUNS: dict[str, dict[str, Any]] = {
    "demo": {"preset": "demo", "rollout": {"prompts_per_step": 4}},
    "sft": {"objective": "sft"},
    "rloo": {"objective": "rloo", "loss": {"kl_coefficient": 0.01, "whiten": True}},
    **{
        f"repirl {reward}": {"prm": {"reward": reward, "gamma": 0.9}}
        for reward in ("value", "logit", "soft_q", "logprob", "implicit")
    },
    "repirl weights": {
        "irl": {
            "base_measure": "reference",
            "weights": "per_decision",
            "target_ess": 0.5,
            "smooth": "psis",
            "truncate": 4.0,
            "experts_per_step": 5,
            "reward_l2": 0.01,
            "group": "batch",
        },
        "policy": {"updates_per_step": 2},
        "prm": {"updates_per_step": 2},
    },
    "prm only": {"loss": {"outcome_coefficient": 0.0}, "irl": {"use_outcome": False}, "order": "policy_first"},
    "adapters": {"adapters": {"rank": 4}, "prm": {"reward": "implicit"}},
    "offloaded": {"offload_idle": True, "policy": {"gradient_checkpointing": True}},
    "resumed": {"resumed_at": 3, "checkpoint": {"asynchronous": True}},
    "two processes": {"processes": 2},
    "two processes, adapters": {"processes": 2, "adapters": {"rank": 4}},
}


def base_values(folder: Path, data: dict[str, str]) -> dict[str, Any]:
    return {
        "steps": NUM_TURNS,
        "device": "cpu",
        "num_threads": 1,
        "policy": {"model": str(folder / "model"), "optimizer": {"lr": 1e-3}},
        "prm": {"optimizer": {"lr": 1e-3}},
        "data": data,
        "rollout": {"prompts_per_step": 3, "samples_per_prompt": 3, "max_response_tokens": 12},
        "batch": {"tokens_per_microbatch": 128},
        "eval": {"every": 2, "num_prompts": 4},
        "checkpoint": {"every": 3},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }


def call(*arguments: str, processes: int = 1) -> None:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "repirl.cli", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"repirl {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")


def record_run(folder: Path, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Train, export, and read what came of it."""
    output = folder / name.replace(" ", "-").replace(",", "")
    values = values | {"output_dir": str(output)}
    processes, resumed_at = values.pop("processes", 1), values.pop("resumed_at", None)
    file = output.with_suffix(".yaml")
    if resumed_at is not None:
        file.write_text(yaml.safe_dump(values | {"steps": resumed_at}))
        call("train", "--config", str(file), processes=processes)
    file.write_text(yaml.safe_dump(values))
    call("train", "--config", str(file), *["--resume"] * (resumed_at is not None), processes=processes)
    call("export", "--checkpoint", str(output), "--output", str(output / "export"))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]
    weights = {
        f"{part.parent.name}/{key}": hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()[:16]
        for part in sorted((output / "export").rglob("*.safetensors"))
        for key, tensor in sorted(load_file(part).items())
    }
    return {"metrics": metrics, "weights": weights}


def record(names: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as threads:
        folder = Path(temporary)
        make_model(folder / "model")
        base = base_values(folder, make_data(folder))
        records = threads.map(lambda name: record_run(folder, name, merge(base, RUNS[name])), names)
        return dict(zip(names, records, strict=True))


def differences(now: Any, before: Any, path: str = "") -> list[str]:
    """Where two records differ; figures that are new are no difference."""
    if isinstance(now, dict) and isinstance(before, dict):
        keys = sorted(before)
        return [d for k in keys for d in differences(now.get(k), before.get(k), f"{path}/{k}")]
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        pairs = enumerate(zip(now, before, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if now == before else [f"{path}: {before!r} before, {now!r} now"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", metavar="FILE", help="write the record here")
    parser.add_argument("--against", metavar="FILE", help="an earlier record")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args()
    now = record(options.only)
    if options.to:
        Path(options.to).write_text(json.dumps(now, indent=1) + "\n")
    if options.against:
        before = json.loads(Path(options.against).read_text())
        changed = differences(now, {name: before.get(name) for name in options.only})
        print("\n".join(changed[:50]) or f"{len(now)} runs are equal to the bit")
        return bool(changed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
