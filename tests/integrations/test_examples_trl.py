"""examples/trl_trainer.py: it trains, and takes the same steps as TRL's own trainer."""

import importlib

import pytest
import torch
from shared import ROOT
from tiny import make_model, make_step_prm

pytest.importorskip("trl", reason="trl is not installed; make test-integrations")

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("trl_trainer")


def test_the_script_runs(example, tmp_path, capsys):
    prm = make_step_prm(tmp_path)  # makes model and data as well
    paths = [str(tmp_path / name) for name in ("model", "train.jsonl", "run")]
    example.main(*paths, "3", str(prm))
    # Two updates are made on each batch of completions, and rewards are logged with the first of them.
    shown = capsys.readouterr().out
    assert "step 3: mean reward" in shown
    assert "rewards/prm_reward/mean" in shown
    # The PRM's rewards are never 0, and a random model answers nothing right.
    assert "step 1: mean reward 0.000" not in shown


def options(folder, **changes):
    return GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        num_iterations=2,
        max_completion_length=12,
        temperature=0.9,
        beta=0.05,
        optim="sgd",
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        **changes,
    )


def test_steps_are_those_of_grpo_trainer(example, tmp_path):
    path = make_model(tmp_path / "model")

    def train(trainer_class):
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(path),
            processing_class=AutoTokenizer.from_pretrained(path),
            reward_funcs=lambda completion_ids, **columns: [float(sum(i % 2 for i in ids)) for ids in completion_ids],
            train_dataset=Dataset.from_list([{"prompt": f"{i}+{i + 1}="} for i in range(1, 9)]),
            args=options(tmp_path / "run"),
        )
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line], trainer.model

    expected_log, expected = train(GRPOTrainer)
    log, model = train(example.FusedGRPOTrainer)
    assert len(expected_log) == 4
    for name in ("loss", "grad_norm", "entropy"):
        values = [line[name] for line in expected_log]
        assert any(values), name
        assert [line[name] for line in log] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    start = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        moved = (other - start[name]).abs().max()
        assert moved > 0, name
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-3 * moved.item() + 2e-7)


def test_options_that_it_does_not_compute_are_refused(example, tmp_path):
    path = make_model(tmp_path / "model")
    with pytest.raises(ValueError, match="loss_type is 'grpo'; FusedGRPOTrainer computes 'dapo' only"):
        example.FusedGRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(path),
            processing_class=AutoTokenizer.from_pretrained(path),
            reward_funcs=lambda completions, **columns: [0.0 for _ in completions],
            train_dataset=Dataset.from_list([{"prompt": "1+2="}]),
            args=options(tmp_path / "run", loss_type="grpo"),
        )
