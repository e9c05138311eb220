"""An export is loaded in one way, keeps what the model said of generation, and says what it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_model, tiny_values
from transformers import AutoTokenizer, GenerationConfig

from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.export import describe_prm, export_checkpoint
from repirl.models import load_model
from repirl.prm import load_prm
from repirl.serving import read_probe
from repirl.sources import check_sources

CPU = torch.device("cpu")
SETTINGS = {"eos_token_id": [0, 2], "temperature": 0.6, "top_p": 0.9}


def run_and_export(folder, *options, reward="value", settings=None, pad=True, **changes):
    base = make_model(folder / "model")
    if settings is not None:
        (base / "generation_config.json").write_text(json.dumps(settings))
    if not pad:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(base)
    values = tiny_values(folder, steps=1, prm={"reward": reward}, eval={"every": 0}, **changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    export = ["export", "--checkpoint", values["output_dir"], "--output", str(folder / "out"), *options]
    assert main(export) == 0
    return values


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    folder = tmp_path_factory.mktemp("value")
    return folder, run_and_export(folder, settings=SETTINGS, pad=False)


@pytest.fixture(scope="module")
def logprob(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logprob")
    return folder, run_and_export(folder, "--dtype", "bfloat16", reward="logprob", adapters={"rank": 2})


def load(path, kind):
    return load_model(str(path), kind=kind, dtype=torch.float32, device=CPU)


def test_an_export_is_not_loaded_as_what_it_is_not(value, logprob):
    folder, values = value
    with pytest.raises(ConfigError, match=r"no language model: its files hold the head 'score"):
        load(folder / "out" / "prm", "causal")
    with pytest.raises(ConfigError, match="no trained PRM of kind 'value'"):
        load(logprob[0] / "out" / "prm", "trained value")

    def check(**changes):
        return check_sources(build_config(values | changes))

    trained, other = folder / "out" / "prm", logprob[0] / "out" / "prm"
    assert check(prm={"model": str(trained), "reward": "value"})
    assert check(prm={"model": str(other), "reward": "logprob"})
    for path, reward, kind in [(trained, "logprob", "value"), (other, "value", "logprob"), (other, "logit", "logprob")]:
        with pytest.raises(ConfigError, match=f"rewards are of kind '{kind}', and prm.reward is '{reward}'"):
            check(prm={"model": str(path), "reward": reward})
    with pytest.raises(ConfigError, match=r"is the PRM of an export .*: the policy is '.*/policy'"):
        check(policy={"model": str(other)})
    # A PRM may start from an exported policy.
    assert check(prm={"model": str(folder / "out" / "policy"), "reward": "value"})


def test_generation_settings_and_a_missing_pad_token_are_kept(value):
    policy = value[0] / "out" / "policy"
    kept = json.loads((policy / "generation_config.json").read_text())
    assert {**kept} == {**SETTINGS, "eos_token_id": [0, 2, 1], "bos_token_id": None, "pad_token_id": None}
    assert GenerationConfig.from_pretrained(policy).temperature == 0.6
    for name in ("policy", "prm"):
        assert AutoTokenizer.from_pretrained(value[0] / "out" / name).pad_token is None


def test_weights_are_exported_in_the_type_asked_for(value, logprob, tmp_path, capsys):
    for (folder, _), dtype, number in [(value, torch.float32, "float32"), (logprob, torch.bfloat16, "bfloat16")]:
        for name in ("policy", "prm"):
            weights = load_file(folder / "out" / name / "model.safetensors")
            assert {w.dtype for w in weights.values()} == {dtype}
            assert json.loads((folder / "out" / name / "config.json").read_text())["dtype"] == number
    # What was rounded is the trained model, no other one.
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", logprob[1]["output_dir"], "--output", str(out)]) == 0
    exact = load_file(out / "policy" / "model.safetensors")
    rounded = load_file(logprob[0] / "out" / "policy" / "model.safetensors")
    assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)
    shutil.rmtree(out)
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", "x", "--output", str(out), "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_each_export_has_a_model_card(value, logprob):
    cards = {
        n: (f / "out" / n.split()[1] / "README.md").read_text()
        for n, f in [
            ("value prm", value[0]),
            ("value policy", value[0]),
            ("logprob prm", logprob[0]),
        ]
    }
    assert "Qwen3ForTokenClassification`: load it with `AutoModelForTokenClassification`" in cards["value prm"]
    assert "Kind `value`. `r_t = w . h_t + b`" in cards["value prm"]
    assert "Qwen3ForCausalLM`: load it with `AutoModelForCausalLM`" in cards["logprob prm"]
    assert "the log-probability of the token" in cards["logprob prm"]
    assert "LoRA adapter of rank 2" in cards["logprob prm"]
    assert "# Policy trained by repirl" in cards["value policy"]
    assert "Started from `" in cards["value policy"]
    assert "load_prm(" not in cards["value policy"]


def test_a_card_says_how_the_model_was_made_and_what_it_is_not(value, logprob):
    folder, values = value
    cards = {name: (folder / "out" / name / "README.md").read_text() for name in ("policy", "prm")}
    for name, card in cards.items():
        assert "library_name: transformers" in card
        assert "objective: repirl`: PRM by inverse reinforcement learning" in card
        assert "the weights after 1 of 1 steps" in card
        assert f"sampled: `{values['data']['train']}`" in card
        assert f"expert solutions: column `solution` of `{values['data']['train']}`" in card
        assert "by the verifier `math`" in card
        assert "| train accuracy |" in card
        assert ("| expert - policy reward |" in card) == (name == "prm")
        assert "(step 1) |" in card
        assert "## Limits" in card
        assert "Exported by repirl " in card
        # A folder of this machine is no model of the hub.
        assert "base_model:" not in card
    assert "pipeline_tag: token-classification" in cards["prm"]
    assert "Rewards are no probabilities" in cards["prm"]
    assert '--pooler-config \'{"task": "token_classify", "use_activation": false}\'' in cards["prm"]
    assert "## On a server" not in (logprob[0] / "out" / "prm" / "README.md").read_text()


def test_a_value_prm_has_the_rewards_that_a_server_has_to_give(value, logprob):
    prm = value[0] / "out" / "prm"
    probe = read_probe(str(prm))
    [rewards] = load_prm(prm, device="cpu").rewards([(probe.token_ids[:1], probe.token_ids[1:])])
    torch.testing.assert_close(torch.tensor(probe.rewards), rewards, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"has no probe.json"):
        read_probe(str(logprob[0] / "out" / "prm"))


def test_models_on_the_hub_name_each_other_as_they_are_called_there(value, tmp_path):
    _, values = value
    config = build_config(values)
    prm = config.prm.model_copy(update={"reward": "implicit", "reference": "policy"})
    config = config.model_copy(update={"prm": prm})
    assert describe_prm(config, policy="me/mine-policy").reference.model == "me/mine-policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repirl.export.describe_prm", lambda _, __, policy: describe_prm(config, policy=policy))
        export_checkpoint(values["output_dir"], tmp_path / "out", hub="me/mine")
    described = json.loads((tmp_path / "out" / "prm" / "config.json").read_text())["repirl"]
    assert described["reference"]["model"] == "me/mine-policy"


def test_an_export_replaces_nothing_that_it_is_made_from(value, tmp_path, capsys):
    """Neither the checkpoint, nor the model that the run started from."""
    folder, values = value
    [checkpoint] = (Path(values["output_dir"]) / "checkpoints").iterdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "policy").symlink_to(folder / "model")
    places = (checkpoint, folder / "model")
    before = {path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}
    export = ["export", "--checkpoint", values["output_dir"], "--output"]
    for output in (tmp_path / "out", checkpoint):
        assert main([*export, str(output)]) == 2
        assert "is an input: choose another folder" in capsys.readouterr().err
    assert main([*export, str(folder / "run.yaml")]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()} == before
