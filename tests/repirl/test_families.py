"""Families of models: docs/models.md says what the trainer makes of each. All of them: tests/support/families.py."""

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_model, table_row
from shared import CPU
from tiny import tiny_config
from transformers import AutoModelForCausalLM, Gemma3Config, OPTConfig

from repirl.config import ConfigError
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.models import load_model
from repirl.prm import load_prm

ROWS = re.findall(r"^\| `.*\|$", (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8"), re.M)


def test_the_table_in_the_docs_has_all_families():
    assert [re.search("`(.*?)`", row)[1] for row in ROWS] == list(FAMILIES)


@pytest.mark.parametrize(
    "family",
    [
        "bloom",  # ALiBi, and a head of another name
        "cohere",  # scaled logits
        "falcon",  # attention that cannot be replaced
        "gemma2",  # capped scores and logits, a window
        "gemma3_text",  # no token classifier, a window
        "jamba",  # recurrent layers
        "nemotron",  # arguments do not reach its attention
        "olmoe",  # no token classifier, experts
        "opt",  # learned positions, dropout that is a number
    ],
)
def test_a_family_is_as_the_docs_say(tmp_path, family):
    assert table_row(family, tmp_path) in ROWS


def test_a_prm_whose_heads_have_other_names_trains_as_an_adapter_and_is_exported(tmp_path):
    """GPT-NeoX: `embed_out` in its files, `classifier` in its token classifier."""
    model = save_model("gpt_neox", tmp_path / "model")
    adapters = {"rank": 2, "target_modules": ["query_key_value"]}
    rollout = {"max_response_tokens": 4, "prompts_per_step": 2, "samples_per_prompt": 2}
    options = {"adapters": adapters, "steps": 1, "rollout": rollout, "eval": {"every": 0}, "prm": {"reward": "value"}}
    options["data"] = {"max_prompt_tokens": 30, "max_expert_tokens": 30}
    train(tiny_config(tmp_path, policy={"model": str(model)}, **options))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    prm = load_prm(tmp_path / "out" / "prm", device="cpu")
    assert prm.rewards([([3, 4], [5, 6, 1])])[0].any()


def test_a_model_that_also_reads_images_is_refused(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shape | {"vocab_size": 18, "num_key_value_heads": 2, "head_dim": 16}
    config = Gemma3Config(text_config=text, vision_config=shape | {"image_size": 28, "patch_size": 14})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is more than a language model .*save its language model alone"):
        load_model(str(tmp_path / "model"), kind="causal", dtype=torch.float32, device=CPU)


def test_hidden_states_of_another_size_than_a_value_head_takes_are_refused(tmp_path):
    shape = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(**shape, vocab_size=18, word_embed_proj_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert load_model(str(tmp_path / "model"), kind="causal", dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match=r"have 16 numbers and a value head takes 32 .*prm.reward: logit"):
        load_model(str(tmp_path / "model"), kind="value", dtype=torch.float32, device=CPU)
