"""The table of systems: every row is whole, and a new one is a row and a file."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import tiny_values

from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.objectives import Objective, load_objectives
from repirl.report.log import read_metrics
from repirl.systems import SYSTEMS, find_system

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_are_whole(tmp_path, name):
    system = SYSTEMS[name]
    actual = load_objectives(system.objectives)
    assert tuple(actual) == system.trains
    assert all(issubclass(kind, Objective) for kind in actual.values())
    assert set(system.data) <= {"prompts", "answers", "experts", "pairs", "trajectories", "outcomes", "steps"}
    assert system.online == ("prompts" in system.data)
    changes = {} if "policy" in (*system.trains, *system.reads) else {"data": {"eval": None}}
    prm = {"reward": system.prm_rewards[0]} if system.prm_rewards else {}
    changes["prm"] = prm | ({"model": str(tmp_path / "model")} if "prm" in system.reads else {})
    config = build_config(tiny_values(tmp_path, objective=name, **changes))
    assert config.system is system
    assert set(config.trained_sections) == set(system.trains)
    assert [kind(config).config is config for kind in actual.values()] == [True] * len(actual)


def test_an_unknown_system_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"objective.*'repirll'.*'repirl'.*did you mean 'repirl'"):
        build_config(tiny_values(tmp_path, objective="repirll"))


def test_a_new_system_is_a_row_and_a_file(tmp_path, capsys):
    """Trained through the command line, with checkpoints, evaluation, plan, export and two processes."""
    assert len((SUPPORT / "toy_system.py").read_text().splitlines()) < 40
    importlib.import_module("toy_system")
    values = tiny_values(tmp_path, objective="right_ones", steps=3)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    try:
        assert main(["train", "--config", str(file)]) == 0
        for command in (["plan", "--config", str(file)], ["train", "--config", str(file), "--dry-run"]):
            capsys.readouterr()
            assert main(command) == 0
            assert "PRM" not in capsys.readouterr().out
        assert main(["train", "--config", str(file), "--resume", "--steps", "4"]) == 0
        assert main(["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    finally:
        del SYSTEMS["right_ones"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["policy"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all({"policy/share", "rollout/outcome", "eval/accuracy"} <= set(line) for line in lines[2::2])
    for line in lines[1:]:
        # The loss is the mean of what is reported as the surprise.
        assert line["policy/loss"] == pytest.approx(line["policy/surprise"], rel=1e-6)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "toy_system.py"]
    command += ["train", "--config", str(file), "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=SUPPORT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    both = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for one, two in zip(lines[1:4], both[1:], strict=True):
        assert two["policy/loss"] == pytest.approx(one["policy/loss"], rel=1e-4)
        assert two["policy/surprise"] == pytest.approx(two["policy/loss"], rel=1e-6)


OWN = """
from repirl.systems import System
MINE = System("mine", objectives={"policy": "repirl.objectives.rloo:RLOO"}, data=("prompts", "answers"), online=True)
OTHER = 3
"""


def test_a_system_of_ones_own_is_looked_for_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_systems_here.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    # As the command `repirl` starts.
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", ".")])
    config = build_config(tiny_values(tmp_path, objective="own_systems_here:MINE"))
    assert config.system == find_system("own_systems_here:MINE")
    assert config.system.summary == "mine"
    for name, message in {
        "own_systems_here:OTHER": "objective 'own_systems_here:OTHER' is of type int, expected a repirl.System",
        "own_systems_here:NONE": "objective 'own_systems_here:NONE' cannot be imported",
        "no_such_module:X": "ModuleNotFoundError: No module named 'no_such_module'",
        "rlo": "did you mean 'rloo'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build_config(tiny_values(tmp_path, objective=name))
