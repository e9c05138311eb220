"""What the user can get wrong costs one clear message, no traceback, and exit code 2."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from shared import ROOT
from tiny import tiny_values

from repirl.cli import NEEDED, main

BLOCK = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from repirl.cli import main
sys.exit(main(["--help"]))
"""


@pytest.fixture
def file(tmp_path):
    """Write the tiny configuration, changed; returns its path."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_values(tmp_path, **changes)))
        return str(path)

    return write


def fails(capsys, *arguments):
    """Run the command line, expect exit code 2 and one line on stderr; returns that line."""
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def append_row(tmp_path, row):
    with open(tmp_path / "train.jsonl", "a") as lines:
        lines.write(row if isinstance(row, str) else json.dumps(row) + "\n")


def test_dry_run_prints_configuration_and_arithmetic(file, capsys):
    assert main(["train", "--config", file(), "--dry-run", "--rollout.prompts_per_step", "5"]) == 0
    out = capsys.readouterr().out
    resolved, arithmetic = out.split("\n\n", 1)
    assert yaml.safe_load(resolved)["rollout"]["prompts_per_step"] == 5
    assert yaml.safe_load(resolved)["loss"]["process_coefficient"] == 0.05
    assert "5 prompts x 3 samples = 15 responses" in arithmetic
    assert "prompts: 24 loaded, 0 dropped" in arithmetic
    assert "4 of the policy, 4 of the PRM" in arithmetic


def test_train_resume_eval_export_round_trip(file, tmp_path, capsys):
    path = file(steps=2)
    assert main(["train", "--config", path]) == 0
    capsys.readouterr()
    assert "already holds a run" in fails(capsys, "train", "--config", path)
    assert main(["train", "--config", path, "--resume", "--steps=3"]) == 0
    table = capsys.readouterr().out
    assert "repirl, 3 steps" in table
    assert all(label in table for label in ("held-out accuracy", "PRM loss", "highest"))
    run = str(tmp_path / "run")
    assert main(["eval", "--config", path, "--checkpoint", run]) == 0
    accuracy = capsys.readouterr().out
    assert "on 4 held-out prompts" in accuracy
    # The run's own configuration.
    assert main(["eval", "--checkpoint", run]) == 0
    assert capsys.readouterr().out == accuracy
    assert main(["export", "--checkpoint", run, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "policy" / "model.safetensors").exists()
    assert (tmp_path / "out" / "prm" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rollout.prompt_per_step", "3"], ["rollout.prompt_per_step", "did you mean 'rollout.prompts_per_step'"]),
        (["--polcy.model", "x"], ["polcy", "did you mean 'policy'"]),
        (["--steps", "many"], ["'steps'", "'many'", "integer"]),
        (["--steps", "0"], ["'steps'", "0", "greater than or equal to 1"]),
        (["--prm.reward", "vlaue"], ["'prm.reward'", "'vlaue'", "'soft_q'"]),
        (["--rollout.samples_per_prompt", "1"], ["samples_per_prompt is 1", "2 or more"]),
        (["--data.answer_column", "null"], ["data.answer_column is null", "irl.use_outcome: false"]),
        (["--data.solution_column", "null"], ["data.solution_column", "data.experts"]),
        (["--data.train", "nowhere.jsonl"], ["'nowhere.jsonl' does not exist"]),
        (["--data.prompt_column", "question"], ["no column 'question'", "data.prompt_column", "'prompt'"]),
        (["--data.solution_column", "proof"], ["no column 'proof'", "data.solution_column"]),
        (["--data.max_prompt_tokens", "3"], ["line 1", "max_prompt_tokens is 3", "data.overlong: drop"]),
        (["--data.max_prompt_tokens", "1", "--data.overlong", "drop"], ["no row is left", "24 were over"]),
        (["--policy.model", "nowhere"], ["cannot load the model 'nowhere'"]),
        (["--device", "cuda"], ["PyTorch sees no GPU"]),
        (["--preset", "demmo"], ["no preset 'demmo'", "did you mean 'demo'"]),
        (["--steps"], ["--steps has no value"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--dtype", "bfloat16", "--policy.optimizer.lr", "1e-6"], ["bfloat16", "round away", "float32"]),
        (["--loss.outcome_coefficient", "0", "--loss.process_coefficient", "0"], ["both 0", "no reward"]),
        (["--loss.clip_low", "1.5"], ["'loss.clip_low'", "1.5", "less than or equal to 1"]),
        (["--data.solution_remove", "(("], ["is no regular expression"]),
        (["--policy", "foo", "--policy.model", "bar"], ["--policy.model", "'foo'"]),
        (["--preset", "5"], ["no preset 5"]),
        (["--irl.temper", "0.5", "--irl.target_ess", "0.5"], ["irl.temper or irl.target_ess"]),
    ],
)
def test_each_mistake_has_its_message(file, capsys, monkeypatch, arguments, parts):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = fails(capsys, "train", "--config", file(), *arguments)
    for part in parts:
        assert part in error


def test_mistakes_in_files_have_their_messages(file, tmp_path, capsys):
    path = file()
    append_row(tmp_path, '{"prompt": "1+1=", "ans\n')
    assert "line 25 is not valid JSON" in fails(capsys, "train", "--config", path)
    path = file()
    append_row(tmp_path, "[1, 2]\n")
    assert "line 25 is a list, expected a JSON object" in fails(capsys, "train", "--config", path)
    path = file()
    append_row(tmp_path, {"prompt": "1+1=", "answer": "2"})
    assert "line 25 has no column 'solution'" in fails(capsys, "train", "--config", path)
    path = file()
    (tmp_path / "train.jsonl").write_text("\n")
    assert "is empty" in fails(capsys, "train", "--config", path)
    Path(path).write_text("steps: [1\n")
    assert "not valid YAML" in fails(capsys, "train", "--config", path)
    Path(path).write_text("just text")
    assert "must hold options by name" in fails(capsys, "train", "--config", path)
    assert "does not exist" in fails(capsys, "train", "--config", str(tmp_path / "none.yaml"))
    assert "give --config FILE" in fails(capsys, "train")
    for row, message in [
        ({"prompt": "1+1=", "answer": None, "solution": "2"}, "'answer' is null"),
        ({"prompt": "1+1=", "answer": "2", "solution": []}, "is an empty list"),
        ({"prompt": "1+1=", "answer": "2", "solution": " "}, "'solution' holds an empty text"),
    ]:
        path = file()
        append_row(tmp_path, row)
        assert message in fails(capsys, "train", "--config", path)
    (tmp_path / "taken").write_text("a file")
    path = file()
    assert "cannot be made" in fails(capsys, "train", "--config", path, "--output_dir", str(tmp_path / "taken" / "run"))


def test_other_commands_report_mistakes_too(file, tmp_path, capsys):
    assert "no checkpoint at" in fails(
        capsys, "export", "--checkpoint", str(tmp_path / "x"), "--output", str(tmp_path / "y")
    )
    assert "no checkpoint at" in fails(capsys, "eval", "--config", file(), "--checkpoint", str(tmp_path / "x"))
    assert "data.eval is not set" in fails(capsys, "eval", "--config", file(), "--data.eval", "null")
    assert "unknown option --sed (did you mean --seed?)" in fails(capsys, "demo", "--sed", "1")
    assert "--threads is 0" in fails(capsys, "demo", "--threads", "0")


def test_resuming_with_other_models_is_refused(file, capsys):
    path = file(steps=1)
    assert main(["train", "--config", path]) == 0
    capsys.readouterr()
    arguments = ["train", "--config", path, "--resume", "--steps=2", "--prm.reward=logprob"]
    assert "--resume --changed prm.reward\n" in fails(capsys, *arguments)
    assert main([*arguments, "--changed", "prm.reward"]) == 2
    assert "does not fit the configured models" in capsys.readouterr().err


def test_a_dry_run_refuses_a_file_as_folder(file, tmp_path, capsys):
    for place, said in (
        ("train.jsonl", "is a file, expected a folder"),
        ("train.jsonl/run", "is a file, not a folder"),
    ):
        error = fails(capsys, "train", "--config", file(), "--dry-run", "--output_dir", str(tmp_path / place))
        assert f"output_dir {str(tmp_path / place)!r} " in error
        assert said in error


def test_plan_needs_nothing_but_the_models_configuration(file, tmp_path, capsys):
    path = file()
    for name in ("train.jsonl", "eval.jsonl", "model/model.safetensors", "model/tokenizer.json"):
        (tmp_path / name).unlink()
    assert main(["plan", "--config", path, "--memory", "0.25,24", "--ranks", "2"]) == 0
    out = capsys.readouterr().out
    assert "policy" in out
    assert "planned for a CPU, as device 'cpu' says" in out
    assert "0.25 GiB" in out
    assert "does not fit" in out
    assert "24 GiB" in out
    assert "fits, " in out
    for memory in ("much", "nan", "24,-1", "0", "inf", ""):
        assert f"--memory is {memory!r}" in fails(capsys, "plan", "--config", path, f"--memory={memory}")
    assert "--ranks is 0, expected at least 1" in fails(capsys, "plan", "--config", path, "--ranks", "0")
    assert "cannot load" in fails(capsys, "plan", "--config", path, "--policy.model", str(tmp_path / "nowhere"))


def test_eval_needs_no_training_data(file, tmp_path, capsys):
    experts = {"path": str(tmp_path / "train.jsonl")}
    path = file(objective="sft", data={"train": None, "experts": experts})
    assert main(["eval", "--config", path]) == 0
    assert "on 4 held-out prompts" in capsys.readouterr().out


def test_a_real_process_shows_no_traceback(file):
    path = file()
    result = subprocess.run(
        [sys.executable, "-m", "repirl.cli", "train", "--config", path, "--rollout.sampels", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("repirl: unknown option 'rollout.sampels'")
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("train", "demo", "eval", "export"))
    assert main([]) == 2


def run_python(*arguments, path=ROOT):
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.parametrize("name", NEEDED.split())
def test_a_package_of_the_extra_that_is_missing_is_named(name):
    result = run_python("-c", BLOCK, name)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"repirl: not installed: {name}; ")
    assert "pip install 'repirl[train]'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_without_any_package_there_is_one_line():
    # -S: no installed packages at all.
    result = run_python("-S", "-m", "repirl.cli", "--help")
    assert result.returncode == 2
    assert result.stderr.startswith("repirl: not installed: accelerate, datasets, gguf, ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", ["import no_such_module_inside", "raise ImportError('it is broken')"])
def test_a_broken_package_shows_its_own_error(tmp_path, error):
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml" / "__init__.py").write_text(error)
    result = run_python("-m", "repirl.cli", "--help", path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert result.returncode == 1
    assert "not installed" not in result.stderr
    assert "Traceback" in result.stderr
    assert "no_such_module_inside" in result.stderr or "it is broken" in result.stderr


def test_all_packages_of_the_extra_are_looked_for():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in extra}
    owners = packages_distributions()
    actual = {owner.lower().replace("_", "-") for name in NEEDED.split() for owner in owners[name]}
    assert names <= actual
    assert len(NEEDED.split()) == len(names)
