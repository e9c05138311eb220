"""Adapters alone: peft loads them on the base, to the logits and rewards of the merged export."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model, tiny_config, tiny_values
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from repirl.adapter_export import target_modules
from repirl.cli import main
from repirl.config import ConfigError
from repirl.export import describe_prm, export_checkpoint
from repirl.modelcard import Model, model_card
from repirl.prm import PRMDescription, load_prm


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with adapters whose PRM has a value head, its merged export, and its adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    values = tiny_values(folder, steps=2, adapters={"rank": 2, "alpha": 3}, eval={"every": 0})
    values["prm"] |= {"reward": "value"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    export = ["export", "--checkpoint", values["output_dir"], "--output"]
    assert main([*export, str(folder / "merged")]) == 0
    assert main([*export, str(folder / "alone"), "--adapter-only"]) == 0
    return folder


IDS = torch.tensor([[11, 13, 10, 14, 6, 15, 11, 13, 10, 15, 4, 8, 16, 4, 8]])


@torch.no_grad()
def test_the_policy_is_that_of_the_merged_export(run):
    base = AutoModelForCausalLM.from_pretrained(run / "model")
    plain = base(IDS).logits
    adapted = PeftModel.from_pretrained(base, run / "alone" / "policy")(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "merged" / "policy")(IDS).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert (adapted - plain).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(run / "alone" / "policy").eos_token_id == 1


@torch.no_grad()
def test_the_prm_has_its_head(run):
    base = AutoModelForTokenClassification.from_pretrained(run / "model", num_labels=1)
    adapted = PeftModel.from_pretrained(base, run / "alone" / "prm")
    values = adapted(IDS).logits[0, :, 0]
    [rewards] = load_prm(run / "merged" / "prm", device="cpu").rewards([(IDS[0, :1].tolist(), IDS[0, 1:].tolist())])
    torch.testing.assert_close(values[1:], rewards, atol=1e-5, rtol=1e-4)
    assert rewards.abs().max() > 1e-4
    described = PRMDescription.model_validate_json((run / "alone" / "prm" / "repirl.json").read_text())
    # What was merged by hand is read by the same description.
    adapted.merge_and_unload().save_pretrained(run / "by_hand")
    AutoTokenizer.from_pretrained(run / "alone" / "prm").save_pretrained(run / "by_hand")
    [again] = load_prm(run / "by_hand", device="cpu", description=described).rewards(
        [(IDS[0, :1].tolist(), IDS[0, 1:].tolist())]
    )
    torch.testing.assert_close(again, rewards, atol=1e-5, rtol=1e-4)


def test_files_hold_the_adapter_alone(run):
    for name in ("policy", "prm"):
        config = json.loads((run / "alone" / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 3, str(run / "model"))
        weights = load_file(run / "alone" / name / "adapter_model.safetensors")
        heads = {key for key in weights if "lora_" not in key}
        head = "base_model.model.score"
        assert heads == (set() if name == "policy" else {f"{head}.weight", f"{head}.bias"})
        size = (run / "alone" / name / "adapter_model.safetensors").stat().st_size
        assert size < (run / "merged" / name / "model.safetensors").stat().st_size
        card = (run / "alone" / name / "README.md").read_text()
        assert "library_name: peft" in card
        assert 'PeftModel.from_pretrained(base, "path/to/this/folder")' in card
        assert ("num_labels=1" in card) == (name == "prm")
    assert json.loads((run / "alone" / "policy" / "repirl.json").read_text())["role"] == "policy"
    rounded = run / "rounded"
    export_checkpoint(run / "run", rounded, adapter_only=True, dtype=torch.bfloat16)
    weights = load_file(rounded / "prm" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_adapters_and_whole_models_do_not_share_a_folder(run, capsys):
    export = ["export", "--checkpoint", str(run / "run"), "--output"]
    for place, options, what in (("alone", [], "adapters alone"), ("merged", ["--adapter-only"], "a whole model")):
        assert main([*export, str(run / place), *options]) == 2
        assert f"holds {what} of another export: choose another --output" in capsys.readouterr().err
    # Of one kind the newer one replaces the older.
    assert main([*export, str(run / "alone"), "--adapter-only"]) == 0


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    values = tiny_values(tmp_path, steps=1, eval={"every": 0}, objective="sft")
    del values["prm"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    with pytest.raises(ConfigError, match="holds whole models, no adapters: export it without --adapter-only"):
        export_checkpoint(values["output_dir"], tmp_path / "out", adapter_only=True)
    assert not (tmp_path / "out").exists()


def test_names_are_as_short_as_they_can_be(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model"))
    every = [name for name, _ in model.named_modules() if name.endswith((".q_proj", ".v_proj"))]
    assert target_modules(model, every) == ["q_proj", "v_proj"]
    assert target_modules(model, every[:1]) == every[:1]


def test_a_card_registers_a_class_that_transformers_does_not_have(tmp_path):
    config = tiny_config(tmp_path, adapters={"rank": 2})
    for name, is_missing in [("OlmoForTokenClassification", True), ("Qwen3ForTokenClassification", False)]:
        card = model_card(Model("prm", config, name, describe_prm(config), 1, (), True))
        code = card.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")
        assert ("register_classifier(AutoConfig.from_pretrained(" in code) == is_missing
        assert "num_labels=1" in code
