"""What two runs share that are the same run: every metric but those of the machine, and every weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shared import MEASURED
from torch import Tensor

from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.configfile import build_config
from repirl.report.history import read_history
from repirl.report.log import read_metrics
from repirl.report.samples import read_samples
from repirl.run import build


def metrics_of(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without those of the machine."""
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def weights_of(values: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the newest checkpoint of the run with these options, by learner and name."""
    run = build(build_config(values))
    run.restore(resolve_checkpoint(values["output_dir"]))
    weights = {f"{n}.{k}": w.clone() for n, x in run.learners.items() for k, w in x.weights()}
    run.close()
    return weights


def assert_equal_runs(values: dict[str, Any], others: dict[str, Any]) -> None:
    """The same metrics, each step once, the same kept responses and history of prompts, and the same weights, to the
    bit; values, others: options of the two runs."""
    for read in (metrics_of, read_samples, read_history):
        assert read(values["output_dir"]) == read(others["output_dir"])
    assert [line["step"] for line in metrics_of(values["output_dir"])] == list(range(1, values["steps"] + 1))
    ours, theirs = weights_of(values), weights_of(others)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((Path(values["output_dir"]) / "checkpoints").glob("*.tmp"))
