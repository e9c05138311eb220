"""Run by test_version_ranges.py with other releases of what the extra `train` needs: sample, and train adapters."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

from repirl.cli import main


def run(folder: Path) -> None:
    """A step with adapters and 8-bit moments, its export, and a step of whole models."""
    # In the order of a user's process: repirl comes before the packages that it silences.
    import gguf  # noqa: F401
    import math_verify  # noqa: F401
    import torch
    from tiny import tiny_values
    from transformers import AutoModelForCausalLM

    from repirl.configfile import build_config, describe
    from repirl.report.log import read_metrics

    # Compiling the 8-bit optimiser takes longer than all the rest.
    torch.compile = lambda function, **_: function
    eight_bits = {"optimizer": {"state_bits": 8}}
    with_adapters = {"adapters": {"rank": 4}, "log": {"tensorboard": True}, "policy": eight_bits}
    for name, changes in {"adapters": with_adapters, "whole": {}}.items():
        values = tiny_values(folder, steps=1, output_dir=str(folder / name), **changes)
        path = folder / f"{name}.yaml"
        path.write_text(describe(build_config(values)))
        assert main(["train", "--config", str(path)]) == 0
        lines = read_metrics(folder / name / "metrics.jsonl")
        assert lines[-1]["policy/grad_norm"] > 0
        assert lines[-1]["rollout/sampler_mismatch_max"] < 1e-4
    checkpoint, output = folder / "adapters", folder / "export"
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    model = AutoModelForCausalLM.from_pretrained(output / "policy")
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
    versions = {name: importlib.metadata.version(name) for name in sys.argv[2:]}
    print(json.dumps(versions))
