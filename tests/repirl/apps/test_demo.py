"""The demo, end to end with a few steps: every part of it, none of its learning."""

import json
from dataclasses import replace

import pytest

from repirl.apps import demo
from repirl.apps.start import Start, make_data
from repirl.cli import main
from repirl.config import ConfigError
from repirl.report.log import read_metrics
from repirl.verify.code import KINDS


@pytest.fixture
def short(monkeypatch):
    start = Start(40, 40, 40, num_held_out=10, num_planted=12, num_experts=(4,), warm_turns=3, sloppy_turns=2)
    few = {"steps": 2, "checkpoint": {"every": 2}, "rollout": {"prompts_per_step": 3}, "log": {"tensorboard": False}}
    for task, shown in demo.DEMOS.items():
        runs = {name: (preset, demo.merge(changes, few)) for name, (preset, changes) in shown.runs.items()}
        monkeypatch.setitem(demo.DEMOS, task, replace(shown, start=start, runs=runs, num_experts=4))


def test_demo_makes_its_table_and_its_page(tmp_path, short, capsys):
    folder = tmp_path / "demo"
    assert demo.run(str(folder), seed=1) == 0
    printed = capsys.readouterr().out
    assert "stage 1 of 7: make the model and the data" in printed
    assert "stage 3 of 7: RLOO" in printed
    assert "stage 7 of 7: find planted errors by each PRM" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["columns"] == ["", "start", *demo.ARITHMETIC.runs]
    labels = [row[0] for row in results["rows"]]
    for label in ("held-out accuracy", "planted error, AUROC", "planted error, first-error F1", "tokens/s"):
        assert label in labels
        assert label in printed
    for name in ("SFT", "rePIRL", "rePIRL, PRM apart", "rePIRL, PRM only"):
        assert 0.0 <= results["summary"][f"auroc/{name}"] <= 1.0
    page = (folder / "report.html").read_text()
    assert "Held-out accuracy" in page
    assert "PRM only" in page
    # A second demo replaces the first; another folder's files are never touched.
    assert demo.run(str(folder), seed=2) == 0
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no earlier demo"):
        demo.run(str(other))
    assert (other / "thesis.txt").read_text() == "precious"


def test_demo_of_programs_runs_them_on_their_tests(tmp_path, short, capsys):
    folder = tmp_path / "demo"
    assert main(["demo", "--task", "code", "--output-dir", str(folder), "--seed", "1"]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert (results["task"], results["columns"]) == ("code", ["", "start", *demo.CODE.runs])
    lines = read_metrics(demo.run_config(folder, 1, "rePIRL", "code").output_dir + "/metrics.jsonl")
    # What such a new model writes is seldom a program: of 2 x 3 x 4 rollouts and 10 held-out responses.
    wrong = sum(lines[-1].get(f"rollout/verifier_{kind}", 0) for kind in KINDS)
    assert 30 <= wrong <= 34
    assert "takes some operations for others" in (folder / "report.html").read_text()


def test_all_runs_start_from_the_same_weights_and_prompts(tmp_path, short):
    folder = tmp_path / "demo"
    demo.run(str(folder), seed=1)
    firsts = []
    for name in demo.ARITHMETIC.runs:
        config = demo.run_config(folder, 1, name)
        if not config.system.online:
            continue
        lines = read_metrics(f"{config.output_dir}/metrics.jsonl")
        firsts.append((lines[0]["eval/accuracy"], lines[1]["rollout/outcome"], lines[1]["policy/entropy"]))
    assert len(firsts) == len(demo.ARITHMETIC.runs) - 1
    assert len(set(firsts)) == 1


@pytest.mark.parametrize("task", ["arithmetic", "code"])
def test_data_files_share_no_problem(tmp_path, short, task):
    tests = make_data(tmp_path, 0, demo.DEMOS[task].start, task)
    seen = [test.problem.prompt for test in tests]
    for name in ("warm", "sloppy", "train", "eval"):
        seen += [json.loads(line)["prompt"] for line in (tmp_path / "data" / f"{name}.jsonl").open()]
    assert len(seen) == len(set(seen)) == 40 + 40 + 40 + 10 + 12
