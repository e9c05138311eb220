"""examples/: every script runs, small, as its own text says; so does what README does from Python."""

import importlib
import re

import pytest
import yaml
from shared import ROOT
from tiny import make_data, make_model, tiny_values

from repirl.cli import main

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and its data: model, train.jsonl, eval.jsonl."""
    folder = tmp_path_factory.mktemp("examples")
    make_data(folder)
    make_model(folder / "model")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as in its folder; returns what it prints."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(name, *arguments):
        importlib.import_module(name).main(*map(str, arguments))
        return capsys.readouterr().out

    return call


def test_own_verifier(run, files, tmp_path):
    assert "turn 1: mean outcome" in run("own_verifier", files / "model", files / "train.jsonl", tmp_path / "run", 1)


def test_own_objective(run, files, tmp_path, capsys):
    shown = run("own_objective", files / "model", files / "train.jsonl", tmp_path / "run", 1)
    assert "responses learned" in shown
    # What is written beside it for the command line.
    text = (EXAMPLES / "own_objective.py").read_text()
    assert "repirl plan  --preset demo --objective own_objective:BEST_OF_GROUP" in text
    model = ["--policy.model", str(files / "model")]
    assert (
        main(["plan", "--preset", "demo", "--objective", "own_objective:BEST_OF_GROUP", "--memory", "24", *model]) == 0
    )
    assert "planned for a CPU, as device 'cpu' says" in capsys.readouterr().out


def test_callbacks(run, files, tmp_path):
    shown = run("callbacks", files / "model", files / "train.jsonl", files / "eval.jsonl", tmp_path / "run", 6)
    # A random model answers nothing right: the three evaluations after that of the start end the run.
    assert "ended after 3 turns; best 0.0% at turn 0" in shown
    assert "turn 1: held-out accuracy" in shown


def test_the_readmes_training_from_python(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    [block] = re.findall(r"```python\n(from repirl import EarlyStopping.*?)```", readme, re.DOTALL)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tiny_values(tmp_path, objective="sft", steps=2)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["turns"] == 2
