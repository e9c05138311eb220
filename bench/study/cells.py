"""What the study trains: tasks, arms, and which arm is trained on which task.

A cell is one training run: a task, an arm and a seed. Cells with the same configuration are one run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repirl.apps.demo import DEMOS
from repirl.apps.start import Start
from repirl.config import Config
from repirl.configfile import build_config, load_preset, merge

# The start models. `plain` is the demo's; the student of `hard` loses nearly every ten; `code` is that of the demo of
# programs.
_EXPERTS = (8, 16, 64)
STARTS = {
    "plain": Start(num_experts=_EXPERTS),
    "hard": Start(num_experts=_EXPERTS, slip=0.85),
    "code": DEMOS["code"].start,
}
# What the start models were taught, as in repirl.apps.start.TASKS.
LESSONS = {"plain": "arithmetic", "hard": "arithmetic", "code": "code"}


@dataclass(frozen=True)
class Task:
    """One setting. verifier: None for the exact one. num_experts: expert solutions; None for one a training prompt.
    presets: what the names of its presets begin with, in place of "demo"."""

    title: str
    start: str = "plain"
    verifier: str | None = None
    num_experts: int | None = None
    turns: int = 40
    presets: str = "demo"


@dataclass(frozen=True)
class Arm:
    """One system with its options.

    Args:
        preset: the preset that it starts from.
        options: changes of the preset.
        reads_experts: whether it learns from expert solutions.
        reads_verdicts: whether it learns from the verifier.
    """

    preset: str
    options: dict[str, Any] = field(default_factory=dict)
    reads_experts: bool = True
    reads_verdicts: bool = True


TASKS = {
    "exact": Task("An exact verifier and all experts"),
    "last-digit": Task("A verifier that reads only the last digit", verifier="last_digit"),
    "lenient": Task("A verifier that accepts 30% of the wrong responses", verifier="lenient"),
    "experts-8": Task("8 expert solutions", num_experts=8),
    "experts-16": Task("16 expert solutions", num_experts=16),
    "experts-64": Task("64 expert solutions", num_experts=64),
    "last-digit-16": Task(
        "A verifier that reads only the last digit, and 16 expert solutions", verifier="last_digit", num_experts=16
    ),
    "hard": Task("A harder start", start="hard"),
    "hard-120": Task("A harder start, 120 turns", start="hard", turns=120),
    "code": Task(
        "Programs, judged by running them on tests, and 16 expert solutions",
        start="code",
        num_experts=16,
        turns=30,
        presets="demo-code",
    ),
}

_APART = {"irl": {"use_outcome": False}}
_VALUE = {"prm": {"reward": "value"}}
_UNIFORM = {"irl": {"weights": "uniform"}}


def _updates(number: int) -> dict[str, Any]:
    return {"policy": {"updates_per_step": number}}


ARMS = {
    "SFT": Arm("demo-sft", reads_verdicts=False),
    "RLOO": Arm("demo-rloo", reads_experts=False),
    "GRPO": Arm("demo-grpo", reads_experts=False),
    "PRIME": Arm("demo-prime", reads_experts=False),
    "DPO": Arm("demo-dpo"),
    "AIRL": Arm("demo-airl"),
    "rePIRL": Arm("demo"),
    "rePIRL, value": Arm("demo", _VALUE),
    "rePIRL, PRM apart": Arm("demo", _APART),
    "rePIRL, value, PRM apart": Arm("demo", merge(_VALUE, _APART)),
    "PRM only": Arm("demo-prm-only", reads_verdicts=False),
    "PRM only, value": Arm("demo-prm-only-value", reads_verdicts=False),
    "rePIRL, uniform weights": Arm("demo", _UNIFORM),
    "rePIRL, uniform weights, 4 policy updates": Arm("demo", merge(_UNIFORM, _updates(4))),
    "rePIRL, 4 policy updates": Arm("demo", _updates(4)),
}

_MAIN = ["SFT", "RLOO", "GRPO", "PRIME", "DPO", "AIRL", "rePIRL", "rePIRL, PRM apart", "PRM only"]
_VALUE_ARMS = ["rePIRL, value", "PRM only, value"]
_SAMPLING = ["rePIRL, uniform weights", "rePIRL, uniform weights, 4 policy updates", "rePIRL, 4 policy updates"]
# Which arms are trained on which task. Those that a task does not change are the same run as on another task. What is
# left out, and the tasks that are trained only when they are named, keep three seeds within an hour on two cores.
ONLY_NAMED = ("last-digit-16", "hard-120", "code")
PLAN: dict[str, list[str]] = {
    "exact": [*_MAIN, *_VALUE_ARMS, *_SAMPLING],
    "last-digit": ["SFT", "RLOO", "PRIME", "DPO", *_MAIN[-3:], "rePIRL, value, PRM apart", "PRM only, value"],
    "lenient": ["SFT", "RLOO", "rePIRL", "rePIRL, PRM apart", "PRM only"],
    "experts-8": ["SFT", "RLOO", "rePIRL"],
    "experts-16": ["SFT", "RLOO", "PRIME", "rePIRL", "rePIRL, PRM apart", "PRM only"],
    "experts-64": ["SFT", "RLOO", "rePIRL"],
    "last-digit-16": ["SFT", "RLOO", "rePIRL", "rePIRL, PRM apart", "PRM only"],
    "hard": ["SFT", "RLOO", "rePIRL", "rePIRL, PRM apart", "PRM only"],
    "hard-120": ["SFT", "RLOO", "rePIRL"],
    "code": ["SFT", "RLOO", "rePIRL", "PRM only"],
}


@dataclass(frozen=True)
class Cell:
    """One training run of the study."""

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task} / {self.arm} / seed {self.seed}"

    def start_folder(self, folder: Path) -> Path:
        """Where the start model and the data are."""
        return folder / "starts" / f"{TASKS[self.task].start}_{self.seed}"

    def values(self, folder: Path) -> dict[str, Any]:
        """The options of the run; folder: of the study."""
        task, arm, start = TASKS[self.task], ARMS[self.arm], self.start_folder(folder)
        values = merge(load_preset(arm.preset.replace("demo", task.presets, 1)), arm.options)
        data: dict[str, Any] = {name: str(start / "data" / f"{name}.jsonl") for name in ("train", "eval")}
        if arm.reads_experts and task.num_experts is not None:
            path = start / "data" / f"experts_{task.num_experts}.jsonl"
            data |= {"solution_column": None, "experts": {"path": str(path)}}
        common: dict[str, Any] = {
            "seed": self.seed,
            "steps": task.turns,
            "num_threads": 1,
            "policy": {"model": str(start / "start")},
            "data": data,
            "eval": {"every": 5},
            "checkpoint": {"every": task.turns, "keep_last": 1},
            "log": {"tensorboard": False},
        }
        if arm.reads_verdicts and task.verifier is not None:
            common["verifier"] = {"kind": "custom", "function": f"repirl.verify.flawed:{task.verifier}"}
            common["eval"] |= {"verifier": {"kind": "math"}}
        return merge(values, common)

    def config(self, folder: Path, output_dir: Path) -> Config:
        return build_config(merge(self.values(folder), {"output_dir": str(output_dir)}))

    def key(self, folder: Path) -> str:
        """Equal for cells that are the same run. Paths do not count, but what is in the start does."""
        options = self.config(folder, Path("cell")).model_dump(mode="json")
        text = json.dumps(options, sort_keys=True).replace(str(self.start_folder(folder)), "START")
        start = dataclasses.asdict(STARTS[TASKS[self.task].start])
        return hashlib.sha256(f"{text}{json.dumps(start)}".encode()).hexdigest()[:16]


def planned(tasks: list[str], arms: list[str], seeds: range) -> list[Cell]:
    """The cells of some tasks and arms, seed by seed, so that a study that ends early has whole seeds."""
    return [Cell(task, arm, seed) for seed in seeds for task in tasks for arm in PLAN[task] if arm in arms]
