"""YAML: text stays text, numbers are numbers, and nothing is dropped or multiplied."""

import pytest
import yaml

from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config, describe, load_config, parse_overrides
from repirl.strict_yaml import YAMLProblem, dump_yaml, load_yaml

VALUES = {"output_dir": "out", "steps": 1, "policy": {"model": "m"}, "data": {"train": "t", "solution_column": "s"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-0.5", -0.5),
        ("1_000", 1000),
        ("+1", 1),
        ("true", True),
        ("~", None),
        ("", None),
        # What YAML 1.1 makes numbers and truth values of.
        ("1:30", "1:30"),
        ("017", "017"),
        ("0x1f", "0x1f"),
        ("yes", "yes"),
        ("off", "off"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_plain_scalars(text, value):
    got = load_yaml(f"a: {text}")["a"]
    assert got == value
    assert type(got) is type(value)


def test_what_is_dumped_is_read_back():
    texts = [
        "1e-4",
        "yes",
        "017",
        "null",
        "1:30",
        "~",
        "",
        "<<",
        "2026-01-01",
        "=",
        "0x1f",
        "{prompt}\n x",
        "1.5",
        "- a",
    ]
    values = {f"t{i}": text for i, text in enumerate(texts)} | {"n": 1e-6, "b": True, "l": [0.9, 0.999], "none": None}
    assert load_yaml(dump_yaml(values)) == values
    # Others read it alike.
    assert yaml.safe_load(dump_yaml(values)) == values


def bomb():
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "'a' stands there twice, in lines 1 and 3"),
        ("a: {b: 1, b: 2}", "'b' stands there twice"),
        (bomb(), "aliases stand for 490329064 values"),
        ("&a [*a]", "an alias refers to what it is part of"),
        ("a: " + "1" * 5000, "limit"),
        ("[" * 5000, "nested too deep"),
        ("a: [1", "expected ',' or"),
    ],
)
def test_what_is_refused(tmp_path, capsys, text, message):
    with pytest.raises(YAMLProblem, match=message):
        load_yaml(text)
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "is not valid YAML" in error
    assert "Traceback" not in error


def test_aliases_and_merge_keys_work():
    assert load_yaml("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_text_options_take_the_command_lines_text():
    changes = parse_overrides(
        [
            "--data.prompt_template",
            "{prompt}",
            "--policy.model",
            "017",
            "--data.system",
            "yes: no",
            "--data.eval",
            "null",
        ]
    )
    assert changes == {
        "data": {"prompt_template": "{prompt}", "system": "yes: no", "eval": None},
        "policy": {"model": "017"},
    }
    # No null is allowed there: it is a name.
    assert parse_overrides(["--policy.model", "null"]) == {"policy": {"model": "null"}}
    assert parse_overrides(["--adapters.target_modules", "[q_proj]"]) == {"adapters": {"target_modules": ["q_proj"]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--steps", "1:30"], "option 'steps' is '1:30': input should be a valid integer"),
        (["--steps", "017"], "option 'steps' is '017': input should be a valid integer"),
        (["--steps", "true"], "option 'steps' is True: input should be a valid integer"),
        (["--steps", "2.0"], "option 'steps' is 2.0: input should be a valid integer"),
        (["--policy.optimizer.lr", ".inf"], "option 'policy.optimizer.lr' is inf: input should be a finite number"),
        (["--policy.optimizer.lr", ".nan"], "input should be a"),
        (["--irl.truncate", ".inf"], "input should be a finite number"),
        (["--seed", str(2**63)], "input should be less than 4294967296"),
        (["--seed", "-1"], "input should be greater than or equal to 0"),
        (["--offload_idle", "1"], "option 'offload_idle' is 1: input should be a valid boolean"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, override, message):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    with pytest.raises(ConfigError) as caught:
        load_config(file, override)
    assert message in str(caught.value)


def test_a_described_configuration_is_the_same_again():
    config = build_config(VALUES | {"policy": {"model": "1e-4"}, "output_dir": "017"})
    assert build_config(load_yaml(describe(config))) == config


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--resum"], "unknown option --resum (did you mean --resume?)"),
        (["train", "--confg", "a.yaml"], "unknown option --confg (did you mean --config?)"),
        (["train", "--dry_run"], "unknown option --dry_run (did you mean --dry-run?)"),
    ],
)
def test_misspelt_options_of_a_command_are_named(capsys, arguments, hint):
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err
