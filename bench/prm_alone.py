"""A PRM that learns alone, on the demo task: what the gate and its recipe are worth, by reward and seed.

    python -m bench.prm_alone                                    every arm, 5 seeds
    python -m bench.prm_alone --arms "value;value, no gate" --seeds 3
    python -m bench.prm_alone --seeds 0                          the page, from the results that are there

Runs are trained one after the other in one thread. What is in the output is not trained again, so that a run which was
stopped goes on where it was. The sentences below the tables are kept in the output, too (`notes`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench.figures import described, machine, save, spread
from bench.study.runner import prepare, train_and_judge
from repirl.config import Config
from repirl.configfile import build_config, load_preset, merge

NO_GATE: dict[str, Any] = {"irl": {"gate": None}}
GATE: dict[str, Any] = {"irl": {"gate": 2.0}}
# The policy's learning rate grows with z: from 0 to whole around the gate of 2, or in a wider range.
RATE: dict[str, Any] = {"irl": {"gate": 1.0, "gate_full": 3.0}}
SLOW_RATE: dict[str, Any] = {"irl": {"gate": 0.5, "gate_full": 4.0}}
# With an outcome reward for the policy, and its verdicts for the PRM.
VERIFIER: dict[str, Any] = {"loss": {"outcome_coefficient": 1.0}, "irl": {"use_outcome": True, "gate": None}}
# Arm -> preset, and what is changed in it.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "value": ("demo-prm-only-value", {}),
    "value, no gate": ("demo-prm-only-value", NO_GATE),
    "value, one update": ("demo-prm-only-value", {"prm": {"updates_per_step": 1}}),
    "value, experts of all prompts": ("demo-prm-only-value", {"irl": {"experts": "all"}}),
    "value, half the policy rate": ("demo-prm-only-value", {"policy": {"optimizer": {"lr": 1e-4}}}),
    "value, rate by z": ("demo-prm-only-value", RATE),
    "value, rate by z, slow": ("demo-prm-only-value", SLOW_RATE),
    # Rollouts with more kinds of errors, and a limit on how far the policy moves instead of the gate.
    "value, temperature 1.5": ("demo-prm-only-value", {"rollout": {"temperature": 1.5}}),
    "value, KL 0.1, no gate": ("demo-prm-only-value", merge(NO_GATE, {"loss": {"kl_coefficient": 0.1}})),
    "logprob": ("demo-prm-only", {}),
    "logprob, no gate": ("demo-prm-only", NO_GATE),
    "logprob, rate by z": ("demo-prm-only", RATE),
    "logit": ("demo-prm-only", {"prm": {"reward": "logit"}}),
    "logit, rate by z": ("demo-prm-only", merge(RATE, {"prm": {"reward": "logit"}})),
    "soft_q": ("demo-prm-only", {"prm": {"reward": "soft_q"}}),
    "soft_q, rate by z": ("demo-prm-only", merge(RATE, {"prm": {"reward": "soft_q"}})),
    "implicit": ("demo-prm-only", {"prm": {"reward": "implicit"}}),
    "verifier, value": ("demo-prm-only-value", VERIFIER),
    "verifier, value, gate": ("demo-prm-only-value", merge(VERIFIER, GATE)),
    "verifier, logprob": ("demo", NO_GATE),
    "verifier, logprob, gate": ("demo", GATE),
}
# Arms that are compared seed by seed, from the same starts.
PAIRS = (
    ("value, rate by z", "value"),
    ("value, rate by z, slow", "value"),
    ("logprob, rate by z", "logprob"),
    ("logit, rate by z", "logit"),
    ("soft_q, rate by z", "soft_q"),
    ("verifier, logprob, gate", "verifier, logprob"),
)


def arm_config(folder: Path, arm: str, seed: int) -> Config:
    """The configuration of one run; `folder`: where starts and runs are."""
    preset, changes = ARMS[arm]
    start = folder / "starts" / f"plain_{seed}"
    values = {
        "seed": seed,
        "output_dir": str(folder / "runs" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"),
        "num_threads": 1,
        "policy": {"model": str(start / "start")},
        "data": {name: str(start / "data" / f"{name}.jsonl") for name in ("train", "eval")},
        "eval": {"every": 5},
        "log": {"tensorboard": False},
    }
    return build_config(merge(merge(load_preset(preset), changes), values))


def run_arm(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one run. Returns accuracies by turn, the turns that held the policy, and the AUROC of planted errors."""
    prepare(folder, "plain", seed)
    tests = folder / "starts" / f"plain_{seed}" / "tests.json"
    lines, result = train_and_judge(arm_config(folder, arm, seed), tests)
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": result["curve"],
        "z": [line.get("policy/gate_z") for line in lines[1:]],
        "held": result["held"],
        "auroc": result["planted"]["auroc"],
        "seconds": result["seconds"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row for each arm: means and standard errors over the seeds, in percent and points."""
    lines = [
        "| arm | seeds | start | end | gain | best minus end | turns held | AUROC of errors | end by seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    for arm in ARMS:
        mine = sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"])
        if not mine:
            continue
        curves = [[100 * accuracy for _, accuracy in r["accuracy"]] for r in mine]
        columns = [
            arm,
            ", ".join(str(r["seed"]) for r in mine),
            spread([curve[0] for curve in curves], 1),
            spread([curve[-1] for curve in curves], 1),
            spread([curve[-1] - curve[0] for curve in curves], 1),
            spread([max(curve) - curve[-1] for curve in curves], 1),
            spread([r["held"] for r in mine], 1),
            spread([r["auroc"] for r in mine], 1, 3),
            ", ".join(f"{curve[-1]:.1f}" for curve in curves),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def differences(results: list[dict[str, Any]]) -> str:
    """Markdown, a row for each pair of arms: differences of the same seeds from the same start, in points."""
    lines = ["| arm | less | seeds | at the end | over the run | AUROC of errors |", "|---|---|---|---|---|---|"]
    for arm, base in PAIRS:
        ours, theirs = ({r["seed"]: r for r in results if r["arm"] == name} for name in (arm, base))
        seeds = [s for s in sorted(ours.keys() & theirs) if ours[s]["accuracy"][0] == theirs[s]["accuracy"][0]]
        if not seeds:
            continue
        curves = [[[100 * value for _, value in side[seed]["accuracy"]] for side in (ours, theirs)] for seed in seeds]
        columns = [
            arm,
            base,
            ", ".join(map(str, seeds)),
            spread([one[-1] - other[-1] for one, other in curves], 1),
            spread([mean(one) - mean(other) for one, other in curves], 1),
            spread([ours[seed]["auroc"] - theirs[seed]["auroc"] for seed in seeds], 1, 3),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def page(content: dict[str, Any]) -> str:
    """The results as a page of Markdown."""
    parts = [
        "# A PRM that learns alone",
        f"`{content['command']}`: {described(content['machine'])}; one thread a run.",
        "Greedy held-out accuracy on the demo task in percent, measured every five of 40 turns, and differences in "
        "points; mean ± standard error over seeds.",
        table(content["runs"]),
        "Differences of runs of the same seed from the same start, at the end and of the mean accuracy over the run:",
        differences(content["runs"]),
        *content["notes"],
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=";".join(ARMS), help='which, such as "value;logprob"')
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--folder", type=Path, default=Path("runs/prm_alone"), help="starts and runs")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/prm_alone.json"))
    options = parser.parse_args()
    arms = options.arms.split(";")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms: {', '.join(unknown)}; there are {'; '.join(ARMS)}")
    torch.set_num_threads(1)
    about = machine()
    revision = about.pop("revision")
    content: dict[str, Any] = {"command": "python -m bench.prm_alone", "machine": about, "notes": [], "runs": []}
    if options.output.exists():
        content |= json.loads(options.output.read_text())
    known = {(r["arm"], r["seed"]) for r in content["runs"]}
    for seed in range(options.seeds):
        for arm in arms:
            if (arm, seed) in known:
                continue
            content["runs"].append(run_arm(options.folder, arm, seed) | {"revision": revision})
            content["machine"] = about | {"revision": ", ".join(sorted({r["revision"][:12] for r in content["runs"]}))}
            save(options.output, content, page(content))
    save(options.output, content, page(content))
    print(table(content["runs"]))


if __name__ == "__main__":
    main()
