"""Every option as text: help, written configurations, presets, the reference page."""

import pytest
from shared import ROOT

from repirl.apps.reference_page import reference_page
from repirl.cli import main
from repirl.config import Config, ConfigError
from repirl.configfile import build_config, list_presets, load_config
from repirl.reference import TITLES, all_options, commented_yaml, help_text, option_groups, preset_summary, write_value
from repirl.strict_yaml import load_yaml


def test_every_option_is_listed_with_type_default_and_description():
    names = {option.name for option in all_options()}

    def walk(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    config = load_config(None, ["--preset", "paper-math-3b"])
    missing = set(walk(config.model_dump(mode="json"))) - names
    assert not missing
    assert {"policy.optimizer.lr", "prm.optimizer.lr", "adapters.rank", "rollout.filter.surplus"} <= names
    for option in all_options():
        assert option.kind
        assert option.kind != "any", option
        assert option.description
        assert option.default != ""
    assert {o.name for o in all_options() if o.default is None} >= {"policy.model", "steps", "output_dir"}


def test_every_section_has_a_title_and_no_title_is_of_another():
    groups = {group.name: group for group in option_groups()}
    assert all(group.title for group in groups.values())
    assert set(TITLES) <= set(groups)
    assert {name for name in Config.model_fields if name in groups} >= {"policy", "adapters", "log"}


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("policy.optimizer.lr", "float > 0", "1e-06"),
        ("irl.temper", "float > 0, <= 1", "1"),
        ("irl.target_ess", "float > 0, <= 1 | null", "null"),
        ("prm.reward", "value | logit | soft_q | logprob | implicit", "value"),
        ("rollout.samples_per_prompt", "int >= 1", "4"),
        ("irl.gate", "float > 0 | auto | null", "auto"),
        ("data.train", "path | section | null", "null"),
        ("data.end_tokens", "list of text | int >= 0 | null", "null"),
        ("policy.optimizer.betas", "[float, float]", "[0.9, 0.999]"),
        ("eval.verifier.kind", None, "math"),
        ("steps", "int >= 1", None),
    ],
)
def test_types_and_defaults_are_in_words(name, kind, default):
    [option] = [option for option in all_options() if option.name == name]
    assert option.default == default
    assert kind is None or option.kind == kind


def test_values_are_written_so_that_they_are_read_as_they_were():
    for value in (1e-6, 0.1, 1 / 3, 1e22, 3, True, None, "a: b", "null", "", "\n", [0.9, 0.999]):
        assert load_yaml(write_value(value)) == value


def test_help_of_a_section_an_option_and_a_word(capsys):
    assert main(["help", "data"]) == 0
    shown = capsys.readouterr().out
    assert "--data.prompt_column  text  (default: prompt)" in shown
    assert "--data.experts.solution_column" in shown
    assert "--policy" not in shown
    assert main(["help", "prm.optimizer", "rollout.temperature"]) == 0
    shown = capsys.readouterr().out
    assert "--prm.optimizer.lr  float > 0  (default: 1e-06)" in shown
    assert "--rollout.temperature" in shown
    assert "--rollout.engine" not in shown
    assert main(["help", "--prm.reward"]) == 0
    assert capsys.readouterr().out.count("--") == 1
    assert {"--policy.optimizer.lr", "--prm.optimizer.head_lr"} <= set(help_text(["lr"]).split())
    assert "Ahmadian" in help_text(["objective"])
    with pytest.raises(ConfigError, match=r"is called 'temprature' \(did you mean 'temperature'\?\)"):
        help_text(["temprature"])


def test_help_of_train_has_all_options_and_takes_a_section(capsys):
    def shown(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments])
        return stop.value.code, capsys.readouterr()

    code, captured = shown("--help")
    assert code == 0
    assert "--resume [DIR]" in captured.out
    for group in option_groups():
        assert all(f"--{option.name}  " in captured.out for option in group.options)
    assert max(map(len, captured.out.splitlines())) <= 110
    code, captured = shown("--help", "log")
    assert code == 0
    assert "--resume" not in captured.out
    assert "--log.peak_tflops" in captured.out
    code, captured = shown("--help", "dta")
    assert (code, captured.out) == (2, "")
    assert "did you mean 'data'?" in captured.err


@pytest.mark.parametrize("name", list_presets())
def test_a_written_configuration_is_the_same_when_it_is_read(name):
    config = load_config(None, ["--preset", name])
    text = commented_yaml(config)
    assert build_config(load_yaml(text)) == config
    assert max(map(len, text.splitlines())) <= 120


def test_config_writes_a_file_that_loads_and_overwrites_none(tmp_path, capsys):
    path = tmp_path / "my.yaml"
    arguments = ["config", "--preset", "demo", "--output", str(path), "--policy.optimizer.lr", "3e-4"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert load_config(path) == load_config(None, ["--preset", "demo", "--policy.optimizer.lr", "3e-4"])
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["config", "--config", str(path), "--steps", "7"]) == 0
    shown = capsys.readouterr().out
    assert build_config(load_yaml(shown)) == load_config(path, ["--steps", "7"])
    # Descriptions stand above, defaults where they were changed.
    assert "    # peak learning rate of AdamW (default: 1e-06)\n    lr: 0.0003\n" in shown
    assert "\ndpo:" not in shown


def test_config_without_anything_is_one_to_fill_in(capsys):
    assert main(["config", "--objective", "dpo", "--data.pairs", "pairs.jsonl", "--data.eval", "null"]) == 0
    config = build_config(load_yaml(capsys.readouterr().out))
    assert config.objective == "dpo"
    assert config.data.train.path == "train.jsonl"
    assert main(["config"]) == 0
    assert build_config(load_yaml(capsys.readouterr().out)).objective == "repirl"


def test_presets_are_listed_with_what_they_are(capsys):
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out.split()
    for name in list_presets():
        assert name in shown
        assert 10 < len(preset_summary(name)) < 250
    assert preset_summary("demo-dr-grpo") == "Dr. GRPO on the demo task."
    assert preset_summary("sft") == (
        "Supervised fine-tuning on the expert trajectories of paper-math-3b (behaviour cloning)."
    )


def test_the_reference_page_is_up_to_date():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference_page(), "write docs/reference.md anew: make reference"
    for command in ("train", "score", "config"):
        assert f"### repirl {command}\n" in page
    assert "`policy.optimizer.lr` (float > 0; default `1e-06`): peak learning rate of AdamW" in page
