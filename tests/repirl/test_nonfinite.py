"""NaN and infinity in weights: whose they are is said, nothing is trained on them, and no sound checkpoint is lost."""

import itertools
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import make_model, tiny_values

from repirl import loop
from repirl.checkpoint.manifest import list_checkpoints, resolve_checkpoint
from repirl.cli import main
from repirl.config import RunError
from repirl.configfile import build_config
from repirl.loop import train
from repirl.report.log import read_metrics
from repirl.rollout.engine import Response
from repirl.run import build

SFT = {"objective": "sft", "eval": {"every": 0}, "data": {"eval": None}}


def write(tmp_path, values):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def spoil(model, value, name="model.norm.weight"):
    """Put a value into a tensor of a saved model."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def one_line(capsys):
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("repirl: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("changes", "whose"),
    [
        (SFT, "policy"),
        # Loaded straight into shards.
        (SFT | {"compute_dtype": "bfloat16"}, "policy"),
        ({"prm": {"model": "spoilt"}}, "PRM"),
        ({"prm": {"model": "spoilt", "reward": "logprob"}, "irl": {"use_outcome": False}}, "PRM"),
    ],
)
def test_a_model_whose_weights_are_not_finite_is_refused(tmp_path, capsys, value, changes, whose):
    values = tiny_values(tmp_path, **changes)
    model = make_model(tmp_path / "spoilt")
    file = spoil(model, value)
    values["policy" if whose == "policy" else "prm"]["model"] = str(model)
    assert main(["train", "--config", write(tmp_path, values)]) == 2
    assert one_line(capsys).startswith(
        f"repirl: the {whose} cannot start: model {str(model)!r} holds NaN or infinity in 'model.norm.weight' (in "
        f"{str(file)!r}): nothing can be computed with it"
    )


def test_weights_that_are_finite_and_too_large_are_told(tmp_path, capsys):
    values = tiny_values(tmp_path, **SFT)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["train", "--config", write(tmp_path, values)]) == 2
    assert "not finite from weights that are finite" in one_line(capsys).replace(",", "")


@pytest.mark.parametrize("name", ["lr", "weight_decay", "max_grad_norm", "eps"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_options_are_finite(tmp_path, capsys, name, value):
    file = write(tmp_path, tiny_values(tmp_path, **SFT))
    option = f"policy.optimizer.{name}"
    assert main(["train", "--config", file, f"--{option}", value]) == 2
    assert one_line(capsys) == f"repirl: option {option!r} is {value[1:]}: input should be a finite number"


def update_with(monkeypatch, update, rate):
    """One update of the policy has another learning rate."""
    turn, calls = loop.offline_turn, itertools.count(1)

    def changed(run):
        if next(calls) == update:
            for group in run.learners["policy"].optimizer.param_groups:
                group["lr"] = rate
        return turn(run)

    monkeypatch.setattr(loop, "offline_turn", changed)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_an_update_that_breaks_the_weights_ends_the_run(tmp_path, capsys, monkeypatch, compute_dtype):
    """Beyond what float32 can hold. The turn is neither logged nor saved."""
    values = tiny_values(tmp_path, **SFT, steps=4, compute_dtype=compute_dtype)
    update_with(monkeypatch, 3, 1e39)
    assert main(["train", "--config", write(tmp_path, values)]) == 1
    message = one_line(capsys)
    assert message.startswith("repirl: the weights of the policy are no longer finite after its update 3 (NaN or inf")
    assert "lower its learning rate; of the checkpoints the newest complete one is step_2, go on" in message
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    run = build(build_config(values))
    run.restore(resolve_checkpoint(tmp_path / "run"))
    assert all(weight.isfinite().all() for _, weight in run.learners["policy"].weights())
    run.close()


def test_what_was_saved_before_a_divergence_is_not_pruned(tmp_path, capsys, monkeypatch):
    """An update makes weights that are finite, and gradients that are not; all later ones are skipped."""
    values = tiny_values(tmp_path, **SFT, steps=9, checkpoint={"every": 1, "keep_last": 2})
    update_with(monkeypatch, 4, 1e30)
    assert main(["train", "--config", write(tmp_path, values)]) == 1
    message = one_line(capsys)
    assert "5 updates in a row of the policy had a loss or gradient that is not finite" in message
    assert "newest complete one is step_8" in message
    assert "updates were skipped since step_4: rename the later ones to go on from that one" in message
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step_3", "step_4", "step_7", "step_8"]


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(tmp_path, capsys):
    values = tiny_values(tmp_path, **SFT, steps=1)
    train(build_config(values))
    run = build(build_config(values))
    run.restore(resolve_checkpoint(tmp_path / "run"))
    with torch.no_grad():
        run.learners["policy"].model.model.norm.weight[0] = math.nan
    run.save(2)
    run.close()
    capsys.readouterr()
    folder, file = tmp_path / "run" / "checkpoints" / "step_2", write(tmp_path, values | {"steps": 3})
    output = ["--output", str(tmp_path / "out")]
    for command in (["train", "--config", file, "--resume"], ["export", "--checkpoint", str(folder), *output]):
        assert main(command) == 2
        assert f"checkpoint {str(folder)!r} holds weights of 'policy' that are not finite (NaN or inf" in one_line(
            capsys
        )


def test_tokens_that_were_drawn_from_nan_end_the_run(tmp_path):
    values = tiny_values(tmp_path, objective="rloo", eval={"every": 0})
    with build(build_config(values)) as run:
        sampler = run.sampler
        sampler._check_finite([Response([3, 1], [-1.0, -math.inf], True), Response([], [], False)])
        with pytest.raises(RunError, match=r"1 of 2 responses were sampled from logits that are not finite"):
            sampler._check_finite([Response([3], [-1.0], False), Response([3, 1], [-1.0, math.nan], True)])
