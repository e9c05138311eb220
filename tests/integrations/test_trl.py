"""kernels/README.md, "TRL": real trainers on CPU take the same steps with their own head and with ours."""

import pytest
import torch
from readme_sections import run_section

pytest.importorskip("trl", reason="trl is not installed; make test-integrations")

import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

WORDS = ["<pad>", "<eos>", *(f"w{index}" for index in range(95))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(trainer_class, config_class, folder, **options):
    """Three optimiser steps from the same seed; returns the logged metrics and the parameters."""
    config = config_class(
        output_dir=str(folder),
        use_cpu=True,
        seed=0,
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        temperature=0.9,
        num_iterations=2,  # two steps on each batch: in the second, the probability ratios are not 1
        epsilon=9.0,  # and hardly any is clipped, which would leave no gradient
        beta=0.05,  # the reference model is scored too
        optim="sgd",  # an update proportional to the gradient: Adam would hide its size
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    make_model().save_pretrained(folder / "model")  # the reference model is loaded from there
    trainer = trainer_class(
        model=LlamaForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=lambda completion_ids, **columns: [float(sum(i % 2 for i in ids)) for ids in completion_ids],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": f"w{index} w{index + 7} w3"} for index in range(16)]),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return trainer.state.log_history, dict(trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "options"),
    [
        (RLOOTrainer, RLOOConfig, {}),
        (GRPOTrainer, GRPOConfig, {"top_entropy_quantile": 0.7}),
    ],
    ids=["rloo", "grpo"],
)
def test_trainer_takes_the_same_steps(trainer_class, config_class, options, tmp_path, monkeypatch):
    expected_log, expected = train(trainer_class, config_class, tmp_path / "own", **options)

    # Set by hand first, so that monkeypatch puts TRL's own head back after the block has replaced it.
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)
    head = run_section("TRL").TokenStatsHead
    assert trl.trainer.utils._ChunkedLogProbFunction is head
    log, parameters = train(trainer_class, config_class, tmp_path / "ours", **options)

    steps, expected_steps = [
        [{name: value for name, value in step.items() if name != "step_time"} for step in history if "loss" in step]
        for history in (log, expected_log)
    ]
    assert len(expected_steps) == 3
    assert all(step["grad_norm"] > 0.01 and step["entropy"] > 0.1 for step in expected_steps), expected_steps
    assert steps == [pytest.approx(step, rel=1e-4, abs=1e-6) for step in expected_steps]
    start = dict(make_model().named_parameters())
    for name, parameter in parameters.items():
        moved = (expected[name] - start[name]).abs().max().item()
        assert moved > 2e-5, name
        assert (parameter - expected[name]).abs().max() <= 1e-3 * moved + 2e-7, name


def test_statistics_that_are_not_computed_are_refused(monkeypatch):
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", None)
    run_section("TRL")
    model = make_model()
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="is_top1"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)
