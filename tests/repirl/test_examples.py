"""examples/: every script runs, small, as its own text says."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from shared import ROOT
from tiny import make_data, make_model, tiny_values

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and its data: model, train.jsonl, eval.jsonl."""
    folder = tmp_path_factory.mktemp("examples")
    make_data(folder)
    make_model(folder / "model")
    return folder


def run(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_verifier(files, tmp_path):
    shown = run("own_verifier.py", files / "model", files / "train.jsonl", tmp_path / "run", 2)
    assert "turn 2: mean outcome" in shown


def test_own_objective(files, tmp_path):
    shown = run("own_objective.py", files / "model", files / "train.jsonl", tmp_path / "run", 2)
    assert "responses learned" in shown
    # What is written beside it for the command line.
    text = (EXAMPLES / "own_objective.py").read_text()
    assert "repirl plan  --preset demo --objective own_objective:BEST_OF_GROUP" in text
    arguments = ["--preset", "demo", "--objective", "own_objective:BEST_OF_GROUP", "--policy.model", files / "model"]
    # As the command does: Python's own path has no folder of the caller.
    command = "import sys; sys.path.remove(''); from repirl.cli import main; sys.exit(main())"
    assert "peak:" in run("-c", command, "plan", *arguments)


def test_callbacks(files, tmp_path):
    shown = run("callbacks.py", files / "model", files / "train.jsonl", files / "eval.jsonl", tmp_path / "run", 6)
    # A random model answers nothing right: three evaluations after the first one end the run.
    assert "ended after 3 turns; best 0.0% at turn 0" in shown
    assert "turn 1: held-out accuracy" in shown


def test_the_readmes_training_from_python(tmp_path, monkeypatch):
    [block] = re.findall(
        r"```python\n(from repirl import EarlyStopping.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tiny_values(tmp_path, objective="sft", steps=2)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["turns"] == 2
