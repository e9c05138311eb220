"""Presets of systems train, resume and plan with a tiny model in place of theirs, on the tests' data."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import make_step_prm, tiny_values

from repirl.cli import main
from repirl.configfile import build_config, load_preset, merge
from repirl.loop import train
from repirl.report.log import read_metrics
from repirl.systems import LABELS

PRESETS = ("prime", "demo-prime", "airl", "demo-airl", "iq-learn", "demo-iq-learn", "dpo", "online-dpo", "demo-dpo")
PRESETS += ("repirl", "repirl-prm-only", "demo-prm-only")
PRESETS += ("dqo", "demo-dqo", "prm-offline", "demo-prm-offline")
PRESETS += ("math-shepherd", "demo-math-shepherd", "math-shepherd-rl", "demo-math-shepherd-rl")
SPEED = ("seconds/", "tokens_per_second/", "mfu/", "memory/")


def shrunk(folder: Path, preset: str, **changes):
    """The preset's values, but for model, data and sizes."""
    tiny = tiny_values(folder, objective=load_preset(preset)["objective"])
    data = {key: value for key, value in tiny["data"].items() if key != "steps"}
    if load_preset(preset)["data"].get("eval") is None:
        data["eval"] = None
    if "steps" in load_preset(preset)["data"]:
        data |= {"steps": tiny["data"]["steps"], "step_separator": "; "}
        data |= {"eval_steps": tiny["data"]["steps"]} if "eval_steps" in load_preset(preset)["data"] else {}
    data |= {"prompt_column": "prompt", "answer_column": "answer", "chat_template": False}
    data |= {"prompt_template": "{prompt}", "overlong": "error"}
    small = {
        "compute_dtype": None,
        "steps": 3,
        "device": "cpu",
        "policy": {"model": tiny["policy"]["model"], "optimizer": {"warmup_steps": 0, "schedule": "constant"}},
        "data": data,
        "output_dir": str(folder / "run"),
        "verifier": {"kind": "custom", "function": "judges:even_length"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 12},
        "eval": {"every": 3, "num_prompts": 4},
        "checkpoint": {"every": 1, "keep_last": 3},
        "log": {"tensorboard": False},
    }
    if load_preset(preset).get("prm", {}).get("model") is not None:
        small["prm"] = {"model": str(make_step_prm(folder))}
    return merge(merge(load_preset(preset), small), changes)


def metrics_of(folder: Path):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(SPEED)} for line in lines]


@pytest.mark.parametrize("preset", PRESETS)
def test_three_turns_train_every_learner_and_resume_to_the_bit(tmp_path, preset, capsys):
    values = shrunk(tmp_path, preset)
    config = build_config(values)
    train(config)
    whole, parts = tmp_path / "run", tmp_path / "parts"
    lines = metrics_of(whole)
    holds_out = config.data.eval is not None or config.data.eval_steps is not None
    assert [line["step"] for line in lines] == [0, 1, 2, 3][not holds_out :]
    for line in lines[-3:]:
        for name in config.system.trains:
            if line.get(f"{name}/held"):
                continue
            assert line[f"{name}/grad_norm"] > 0, name
            assert line[f"{name}/skipped_updates"] == 0
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["plan", "--config", str(file)]) == 0
    assert ("PRM" in capsys.readouterr().out) == config.system.has_prm
    assert main(["train", "--config", str(file), "--dry-run"]) == 0
    updates = capsys.readouterr().out.splitlines()[-1]
    assert all(f" of the {LABELS.get(name, name)}" in updates for name in config.system.trains)
    # As if the run had ended after two turns.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_3")
    train(build_config(values | {"output_dir": str(parts)}), resume=True)
    assert json.dumps(metrics_of(parts)) == json.dumps(lines)
    files = [file.relative_to(whole) for file in (whole / "checkpoints" / "step_3").rglob("*.distcp")]
    assert len(files) == len(config.system.trains)
    for file in files:
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file
