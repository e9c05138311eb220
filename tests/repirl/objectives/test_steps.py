"""The PRM on labelled steps: its loss, a whole run with resume and export, and what the figures mean."""

import json
from types import SimpleNamespace

import pytest
import torch
from shared import CPU, MEASURED
from tiny import gradients, make_model, tiny_config, tiny_values

from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.data.steps import LabelledResponse, pack_steps
from repirl.evaluate import auroc, evaluate_steps
from repirl.export import export_checkpoint
from repirl.learner import Learner
from repirl.loop import train
from repirl.models import load_model
from repirl.objectives.steps import StepLabels
from repirl.options import OptimizerConfig
from repirl.prm import load_prm
from repirl.report.log import read_metrics

# The project's fixture math_shepherd.json: three steps of one response.
LOGITS, HARD, SOFT = [1.0, -0.5, 0.3], (1.0, 1.0, 0.0), (0.75, 0.25, 0.0)
BCE_HARD, BCE_SOFT = 0.713898, 0.672231


def small(tmp_path, **changes):
    """No held-out prompts: there is no policy."""
    changes["data"] = {"eval": None, **changes.get("data", {})}
    return tiny_values(tmp_path, objective="math-shepherd", **changes)


@pytest.mark.parametrize(("labels", "expected"), [(HARD, BCE_HARD), (SOFT, BCE_SOFT)])
def test_the_loss_is_the_published_one(tmp_path, labels, expected):
    step_prm = StepLabels(build_config(small(tmp_path)))
    # Other tokens, whose outputs must not matter, lie between the steps' ends.
    batch = pack_steps([LabelledResponse((3,), (4, 5, 6, 7, 8, 1), (0, 3, 5), labels)])
    value = torch.tensor([LOGITS[0], 7.0, -9.0, LOGITS[1], 3.0, LOGITS[2]], requires_grad=True)
    assert step_prm.prepare(batch) == {"steps": 3, "right": pytest.approx(sum(labels) / 3)}
    loss, figures = step_prm.loss({"value": value}, batch)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert value.grad[[1, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    gradient = (torch.tensor(LOGITS).sigmoid() - torch.tensor(labels)) / 3
    torch.testing.assert_close(value.grad[[0, 3, 5]], gradient)
    # The logits say right, wrong, right.
    rights = sum((logit > 0) == (label >= 0.5) for logit, label in zip(LOGITS, labels, strict=True))
    assert tuple(map(int, figures["accuracy"])) == (rights, 3)


def rows(count):
    numbers = torch.Generator().manual_seed(0)
    made = []
    for length in range(2, 2 + count):
        ids = torch.randint(3, 15, (length + 2,), generator=numbers).tolist()
        ends = tuple(range(1, length, 2))
        made.append(LabelledResponse(tuple(ids[:2]), tuple(ids[2:]), ends, tuple(torch.rand(len(ends)).tolist())))
    return made


def test_micro_batches_change_no_gradient(tmp_path):
    """The number of labelled steps differs between micro-batches; the mean is over those of the whole batch."""
    path, batch = str(make_model(tmp_path / "model")), pack_steps(rows(6))
    step_prm = StepLabels(build_config(small(tmp_path)))
    step_prm.prepare(batch)
    results = []
    for budget in (1000, 12):
        model = load_model(path, kind="value", dtype=torch.float32, device=CPU)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight)
        learner = Learner(model, OptimizerConfig(), tokens_per_microbatch=budget)
        assert len(batch.microbatches(budget)[0]) == {1000: 1, 12: 4}[budget]
        results.append(gradients(learner, batch, lambda outputs, micro: step_prm.loss(outputs, micro)[0]))
    one, many = results
    assert max(float(g.abs().max()) for g in one.values()) > 1e-3
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=1e-6, rtol=1e-4)


def test_a_run_learns_resumes_and_exports(tmp_path, capsys):
    """Trained through the command line: plan, dry run, evaluation, resume to the bit, export, and scores of it."""
    held_out = {"data": {"eval_steps": str(tmp_path / "steps.jsonl")}, "eval": {"num_prompts": 48}}
    values = small(tmp_path, steps=6, step_prm={"responses_per_step": 16}, prm={"optimizer": {"lr": 1e-2}}, **held_out)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    assert main(["plan", "--config", str(file)]) == 0
    assert "PRM weights" in capsys.readouterr().out
    assert main(["train", "--config", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("steps of 48 responses", "held out: ", "label 1: '", "run: 6 steps of 16 responses = 2.00 epochs"):
        assert part in printed
    assert "optimiser updates: 6 of the PRM" in printed
    assert main(["train", "--config", str(file)]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # With a new head every chance is one half.
    assert lines[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert lines[-1]["eval/loss"] < 0.68
    assert {"prm/loss", "prm/accuracy", "prm/right", "prm/steps", "tokens"} <= set(lines[1])
    assert not [key for line in lines for key in line if key.startswith(("policy/", "rollout/"))]
    capsys.readouterr()
    assert main(["eval", "--config", str(file), "--checkpoint", str(tmp_path / "run")]) == 0
    assert f"accuracy {lines[-1]['eval/accuracy']:.4f}, loss {lines[-1]['eval/loss']:.4f}" in capsys.readouterr().out

    # Four turns, and two more, are six to the bit.
    again = values | {"output_dir": str(tmp_path / "again")}
    train(build_config(again | {"steps": 4}))
    train(build_config(again), resume=True)
    for one, two in zip(lines, read_metrics(tmp_path / "again" / "metrics.jsonl"), strict=True):
        computed = {key: value for key, value in one.items() if not key.startswith(MEASURED)}
        # The first part of the run evaluated at its own end, too.
        assert computed == {key: value for key, value in two.items() if key in computed}

    assert [path.name for path in export_checkpoint(tmp_path / "run", tmp_path / "out")] == ["prm"]
    prm = load_prm(tmp_path / "out" / "prm", device="cpu")
    rule = prm.description.steps
    assert (rule.separator, rule.score, rule.aggregate) == ("; ", "end", "min")
    pair = ("8+7-3=", "8+7=15; 15-3=12; #### 12")
    [scores], [reward] = prm.step_scores([pair]), prm.rewards([pair])
    torch.testing.assert_close(scores, reward[[6, 14, 18]].sigmoid())
    assert prm.response_scores([pair]) == [float(scores.min())]
    assert len(prm.step_scores([pair], finished=False)[0]) == 3
    assert "trained on the last token of each step" in (tmp_path / "out" / "prm" / "README.md").read_text()


def test_what_does_not_fit_is_refused(tmp_path):
    for changes, message in [
        ({"data": {"steps": None}}, r"'math-shepherd' learns from steps: set data.steps"),
        ({"prm": {"reward": "logprob"}}, "prm.reward is 'logprob'"),
        ({"data": {"eval": "e.jsonl"}}, "has no policy to evaluate"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_config(small(tmp_path, **changes))
    with pytest.raises(ConfigError, match="'rloo' learns no labels of steps"):
        tiny_config(tmp_path, objective="rloo", data={"eval_steps": "e.jsonl"})
    with pytest.raises(ConfigError, match="options of 'step_prm' are set"):
        tiny_config(tmp_path, objective="rloo", step_prm={"responses_per_step": 3})


def test_auroc_counts_pairs():
    right, wrong = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.5, 0.1])
    # 0.9 above both, 0.5 above one and equal to the other, 0.2 above one.
    assert auroc(right, wrong) == pytest.approx((2 + 1.5 + 1) / 6)


def test_held_out_figures_are_those_of_the_labels(tmp_path):
    config = build_config(small(tmp_path, eval={"num_prompts": 2}))
    chosen = [
        LabelledResponse((3,), (4, 5, 1), (0, 2), (1.0, 0.0)),
        LabelledResponse((3,), (4, 1), (1,), (1.0,)),
        LabelledResponse((3,), (4, 1), (1,), (0.0,)),
    ]
    prm = SimpleNamespace(score=lambda batch: {"value": torch.tensor([2.0, 50.0, -1.0, 9.0, -3.0])})
    figures = evaluate_steps(prm, chosen, config)
    assert figures["eval/accuracy"] == pytest.approx(2 / 3)
    assert figures["eval/auroc"] == 0.5
    losses = torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64).sigmoid().log().neg().mean()
    assert figures["eval/loss"] == pytest.approx(float(losses))
    # Where no step is wrong, nothing is compared.
    assert "eval/auroc" not in evaluate_steps(
        SimpleNamespace(score=lambda batch: {"value": torch.zeros(2)}), chosen[1:2], config
    )
