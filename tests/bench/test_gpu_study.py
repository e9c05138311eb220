"""The study on a GPU, without one: data, the start and an arm at a tiny scale, and what a limit or a fault costs."""

import gzip
import json
import sys
import tarfile
import time
from argparse import Namespace

import pytest

from bench import gpu, gpu_study, gpu_study_data, gpu_study_page, gpu_study_steps
from bench.gpu import RESULT, Step
from bench.gpu_study_data import Problem, Sizes, path_of
from bench.study.cells import ARMS, TASKS
from repirl.report.log import read_metrics
from repirl.verify.math import math_reward

SIZES = Sizes(warm=24, train=12, few=4, eval=6)


def word_problems():
    for number in range(100):
        a, b = number % 10, number // 10
        yield Problem(f"Tom has {a} apples and buys {b}.", str(a + b), f"Tom has {a}+{b}={a + b} apples.\n#### {a + b}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    counts = gpu_study_data.write(folder, word_problems(), SIZES, math_reward)
    (folder / "data.json").write_text(json.dumps(counts))
    return folder


def rows(folder, name):
    with gzip.open(path_of(folder, name), "rt") as file:
        return [json.loads(line) for line in file]


def study(data, tmp_path, seconds=60.0, arms=("RLOO",), tasks=("exact",), jobs=1):
    work = tmp_path / "work"
    work.mkdir()
    options = Namespace(
        data=data, out=tmp_path / "out", seconds=seconds, device="cpu", scale="tiny", jobs=jobs, wheels=None
    )
    return gpu_study.Study(options, work, ["run"], arms, tasks)


def written(tmp_path):
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == {"study.json", "study.md", "logs.tar.gz"}
    return json.loads((out / "study.json").read_text()), (out / "study.md").read_text()


# --- the data -------------------------------------------------------------------------------------------------------


def test_the_files_have_distinct_problems_with_right_solutions(data, tmp_path):
    prompts = [row["prompt"] for name in ("warm", "train", "eval") for row in rows(data, name)]
    assert len(prompts) == len(set(prompts)) == 24 + 12 + 6
    assert rows(data, "few") == rows(data, "train")[:4]
    wrong = Problem("How many?", "5", "There are 6.\n#### 6")
    twice = [wrong, *word_problems(), *word_problems()]
    counts = gpu_study_data.write(tmp_path, twice, Sizes(70, 20, 4, 10), math_reward)
    assert (counts["differing"], counts["repeated"]) == (1, 0)
    with pytest.raises(ValueError, match="warm needs 71 problems, and only 70 are left"):
        gpu_study_data.write(tmp_path, twice, Sizes(71, 20, 4, 10), math_reward)


def test_without_reasoning_gym_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert gpu_study.main(["data", "--to", str(tmp_path / "data")]) == 2
    assert "pip install --no-deps --target RG reasoning-gym==0.1.25" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


# --- training -------------------------------------------------------------------------------------------------------


def test_the_first_minute_at_a_tiny_scale(data, tmp_path, monkeypatch):
    """The start and an arm, trained here by the same functions as in processes of their own."""
    trained = study(data, tmp_path)

    def run_here(stage):
        for step in stage:
            words = [str(tmp_path / "result.json") if word == RESULT else word for word in step.arguments[2:]]
            assert gpu_study_steps.main(words) == 0
            result = json.loads((tmp_path / "result.json").read_text())
            trained._finish(step.name, {"status": "ok", "result": result})
        trained.write()

    monkeypatch.setattr(trained, "run", run_here)
    trained.run_all()
    trained.close()
    assert trained.exit_code() == 0
    results, page = written(tmp_path)
    start = results["steps"]["start"]["result"]
    assert (start["turns"], start["solutions"], start["ended_by"]) == (4, 32, "turns")
    assert start["loss"][1] < start["loss"][0]
    assert 0 <= start["accuracy"] <= 1
    run = results["runs"]["RLOO (exact)"]
    assert [turn for turn, _ in run["compared"]["curve"]] == [0, 1, 2]
    assert run["compared"]["tokens"] > run["compared"]["sampled_tokens"] > 0
    assert results["compared_at_turn"] == 2
    assert "| RLOO | " in page
    assert "4 worked solutions" in page
    assert "Not in the tables" not in page
    for accuracy, is_useful in {0.1: False, 0.4: True, 0.7: False, None: False}.items():
        start["accuracy"] = accuracy
        assert ("do not rely" in gpu_study_page.markdown(results, gpu_study.TASKS)) != is_useful
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert {"start.jsonl", "RLOO__exact_.jsonl"} == set(logs.getnames())


@pytest.mark.parametrize(("until", "accuracy", "expected"), [(0.0, None, "time"), (1e12, 0.0, "accuracy")])
def test_a_training_ends_by_its_time_or_its_accuracy(data, tmp_path, until, accuracy, expected):
    scale = gpu_study_steps.Scale(**{**gpu_study_steps.SCALES["tiny"].__dict__, "warm_turns": 100_000})
    tokenizer = gpu_study_steps.train_tokenizer(path_of(data, "warm"), scale.vocabulary)
    text = "Tom has 12 apples.\n#### 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {"1", "2"} <= set(tokenizer.tokenize(text))
    base, run = tmp_path / "base", tmp_path / "run"
    gpu_study_steps.make_model(scale, tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = gpu_study_steps.start_config(data, base, run, scale, "cpu")
    assert gpu_study_steps.train_until(config, until, accuracy) == expected
    turns = read_metrics(run / "metrics.jsonl")[-1]["step"]
    # The last turn is saved, for the export.
    assert (run / "checkpoints" / f"step_{turns}").is_dir()


def test_arms_and_tasks_are_those_of_the_study(data, tmp_path):
    assert set(gpu_study.READ_VERDICTS) == {arm for arm in gpu_study.ARMS if ARMS[arm].reads_verdicts}
    assert len(gpu_study.runs_of(gpu_study.ARMS, list(gpu_study.TASKS))) == 6
    for task in gpu_study.TASKS:
        for arm in gpu_study.ARMS:
            for device in ("cpu", "cuda"):
                scale = gpu_study_steps.SCALES["full"]
                config = gpu_study_steps.arm_config(data, tmp_path, tmp_path, scale, device, arm, task)
                fooled = TASKS[task].verifier is not None and arm in gpu_study.READ_VERDICTS
                assert (config.verifier.kind == "custom") == fooled
                assert (config.eval.verifier or config.verifier).kind == "math"
                assert config.computes_in == {"cpu": "float32", "cuda": "bfloat16"}[device]
                assert arm == "RLOO" or config.data.experts.path == str(path_of(data, "few"))


# --- limits and faults ----------------------------------------------------------------------------------------------

TRAINS = """
import json, os, sys, time
folder, accuracies = sys.argv[1], json.loads(sys.argv[2])
os.makedirs(folder)
with open(folder + "/metrics.jsonl", "w") as file:
    for turn, accuracy in enumerate(accuracies):
        line = {"step": turn, "eval/accuracy": accuracy, "seconds/step": 1.0, "policy/held": int(turn > 0)}
        file.write(json.dumps(line) + "\\n")
    file.write('{"step": 9')
    file.flush()
    time.sleep(float(sys.argv[3]))
sys.exit(int(sys.argv[4]))
"""


def arms_that(made, monkeypatch, seconds=None, **arms):
    """Replace steps by processes that write (accuracies), then sleep so long, and end with an exit code."""

    def arm_step(name, share):
        accuracies, sleep, code = arms[name.split(" ")[0]]
        words = (str(made.folder(name)), json.dumps(accuracies), str(sleep), str(code))
        return Step(name, ("-c", TRAINS, *words), seconds or share)

    monkeypatch.setattr(made, "start_step", lambda: Step("start", ("-c", "pass"), 10))
    monkeypatch.setattr(made, "arm_step", arm_step)


def test_time_that_is_nearly_over_ends_the_run_in_time(data, tmp_path, monkeypatch):
    begin = time.monotonic()
    made = study(data, tmp_path, seconds=7.0, arms=("RLOO", "SFT"))
    # The first arm takes all the time that there is: nothing is left for the second one.
    arms_that(made, monkeypatch, seconds=100.0, RLOO=([0.2, 0.3], 60, 0), SFT=([0.2, 0.4], 60, 0))
    monkeypatch.setattr(gpu, "SHORTEST", 0.5)
    made.run_all()
    made.close()
    assert time.monotonic() - begin < 7 + 2  # killing takes no time, but other work of this machine may
    results, page = written(tmp_path)
    statuses = {name: step["status"] for name, step in results["steps"].items()}
    assert statuses == {"start": "ok", "RLOO (exact)": "out of time", "SFT": "not reached"}
    assert "SFT: not reached: no time was left" in page
    # What the first arm did until then counts.
    assert "| RLOO | 30.0 |" in page
    assert made.exit_code() == 1


def test_a_failed_arm_costs_the_others_nothing(data, tmp_path, monkeypatch):
    made = study(data, tmp_path, arms=("RLOO", "PRM only", "SFT"), tasks=("exact", "last-digit"), jobs=4)
    arms_that(made, monkeypatch, RLOO=([0.2, 0.3, 0.5, 0.6], 0, 0), PRM=([0.2, 0.1], 0, 1), SFT=([0.2, 0.4, 0.3], 0, 0))
    made.run_all()
    made.close()
    results, page = written(tmp_path)
    assert results["compared_at_turn"] == 2
    assert results["runs"]["PRM only"]["compared"] is None
    assert results["runs"]["RLOO (last-digit)"]["compared"]["curve"][-1] == [2, 0.5]
    assert results["runs"]["RLOO (exact)"]["all"]["turns"] == 3
    assert "PRM only: failed after 1 turns" in page
    assert "(irl.gate): RLOO (exact) in 2, RLOO (last-digit) in 2, SFT in 2." in page
    # RLOO has a row on each task, 20 points above SFT, which is one and the same run.
    assert page.count("| RLOO | 50.0 | 50.0 | 20.0 |") == 2
    assert made.exit_code() == 1


def test_without_a_start_no_arm_is_run(data, tmp_path, monkeypatch):
    made = study(data, tmp_path)
    monkeypatch.setattr(made, "start_step", lambda: Step("start", ("-c", "raise SystemExit('no weights')"), 10))
    made.run_all()
    made.close()
    _, page = written(tmp_path)
    assert "start: failed: no weights" in page
    assert "RLOO (exact): skipped: there is no start model" in page


def test_bad_arguments_are_named(data, tmp_path, capsys):
    for words, message in {
        ("--data", str(tmp_path)): "make it with python -m bench.gpu_study data --to FOLDER",
        ("--data", str(data), "--arms", "RLO"): "--arms names 'RLO', expected some of RLOO; rePIRL, PRM apart",
    }.items():
        with pytest.raises(SystemExit):
            gpu_study.main(["run", *words, "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
