"""The PRM of a run's checkpoint is that of its export, and of both it can be told whether they are the same."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_values

from repirl.apps.trained import Placed, policy_options, trained_policy, trained_prm
from repirl.cli import main
from repirl.config import ConfigError
from repirl.prm import load_prm

PAIRS = [("8+7-3=", "8+7=15; 15-3=12; #### 12")]


def test_the_prm_of_a_checkpoint_is_that_of_its_export(tmp_path, capsys):
    values = tiny_values(tmp_path, steps=1, prm={"reward": "implicit"}, eval={"every": 0})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert main(["export", "--checkpoint", values["output_dir"], "--output", str(tmp_path / "out")]) == 0
    expected = load_prm(tmp_path / "out" / "prm", device="cpu").rewards(PAIRS)
    prints = []
    for name in (tmp_path / "out" / "prm", values["output_dir"], tmp_path / "run" / "checkpoints" / "step_1"):
        with trained_prm(name, Placed(device="cpu")) as (prm, fingerprints):
            assert torch.equal(prm.rewards(PAIRS)[0], expected[0])
        prints.append(fingerprints)
    assert prints[1] == prints[2] != prints[0]
    assert all({"prm", "reference"} == set(p) for p in prints)
    # So is its policy, which says how its prompts were written.
    expected, prints = load_file(tmp_path / "out" / "policy" / "model.safetensors"), []
    for name in (tmp_path / "out" / "policy", values["output_dir"], tmp_path / "run" / "checkpoints" / "step_1"):
        with trained_policy(name) as (model, fingerprint):
            weights = load_file(Path(model, "model.safetensors"))
            assert all(torch.equal(weights[key], value) for key, value in expected.items())
            assert policy_options(model)["prompt_template"] == "{prompt}"
        prints.append(fingerprint)
    assert prints[1] == prints[2] != prints[0]
    assert policy_options(values["policy"]["model"]) == {}
    with pytest.raises(ConfigError, match="is the PRM of an export"), trained_policy(tmp_path / "out" / "prm"):
        pass
    # And by the command line, twice.
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PAIRS[0][0], "response": PAIRS[0][1]}) + "\n")
    command = ["score", "--prm", values["output_dir"], "--input", str(tmp_path / "in.jsonl"), "--output"]
    assert main([*command, str(tmp_path / "scored.jsonl")]) == 0
    assert main([*command, str(tmp_path / "scored.jsonl"), "--resume"]) == 0

    with (
        pytest.raises(ConfigError, match="is no model; the PRM of this export is"),
        trained_prm(tmp_path / "out", Placed(device="cpu")),
    ):
        pass


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="--tokens is -1"):
        Placed(tokens=-1)
    with pytest.raises(ConfigError, match="--dtype is 'int8'"):
        Placed(dtype="int8")
    with pytest.raises(ConfigError, match="--device is 'gpu'"):
        Placed(device="gpu")
