"""`repirl eval --benchmark processbench|prmbench`: figures by a threshold, splits, classifications, and resumption."""

import json
import re

import pytest
from tiny import make_model, make_step_prm

from repirl.apps import eval_steps
from repirl.apps.benchmarks import prmbench_row, prmbench_scores, processbench_scores
from repirl.apps.eval_steps import StepOptions, eval_prm
from repirl.apps.first_errors import LocalizeOptions, localize
from repirl.apps.trained import Placed
from repirl.cli import main
from repirl.config import ConfigError
from repirl.evals.own import write_prmbench, write_processbench
from repirl.prm import PRMDescription, StepRule


@pytest.fixture(scope="module")
def chances(tmp_path_factory):
    """A PRM whose step scores are chances."""
    return str(make_step_prm(tmp_path_factory.mktemp("chances")))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A PRM whose step scores are mean rewards."""
    path = make_model(tmp_path_factory.mktemp("tokens") / "prm")
    rule = StepRule(rule="separator", separator="; ")
    content = json.loads((path / "config.json").read_text())
    content["repirl"] = PRMDescription(reward="logprob", steps=rule).model_dump(mode="json")
    (path / "config.json").write_text(json.dumps(content))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def splits(folder, *names):
    for seed, name in enumerate(names):
        write_processbench(folder / f"{name}.jsonl", seed, 12)
    return [str(folder / f"{name}.jsonl") for name in names]


def test_processbench_is_judged_as_localize_does(tmp_path, tokens, capsys):
    data, output = splits(tmp_path, "easy", "hard"), tmp_path / "out"
    command = ["eval", "--benchmark", "processbench", "--prm", tokens, "--data", *data, "--calibrate", data[0]]
    assert main([*command, "--output", str(output)]) == 0
    shown, result = capsys.readouterr().out, json.loads((output / "results.json").read_text())
    rows = rows_of(output / "steps.jsonl")
    assert [row["split"] for row in rows] == ["easy"] * 12 + ["hard"] * 12
    other = localize(tokens, data, LocalizeOptions(), calibration=data[0])
    assert (result["threshold"], result["threshold_is"]) == (other.threshold, other.origin)
    for name, source in zip(("easy", "hard"), data, strict=True):
        part = [row for row in rows if row["split"] == name]
        predicted = [next((i for i, s in enumerate(row["step_scores"]) if s < other.threshold), -1) for row in part]
        mine = processbench_scores(predicted, [row["wrong"][0] if row["wrong"] else -1 for row in part])
        assert result["splits"][name]["f1"] == mine.f1 == other.scores[source].f1
        assert (result["splits"][name]["num_errors"], result["splits"][name]["error_acc"]) == (6, mine.error_acc)
    assert result["mean_f1"] == other.mean_f1
    assert (result["calibrated_on"], result["mean_f1_of_others"]) == ("easy", result["splits"]["hard"]["f1"])
    assert re.search(rf"hard +6 +6 +[\d.]+ +[\d.]+ +{result['splits']['hard']['f1']:.1f} ", shown)
    assert re.search(rf"mean +{result['mean_f1']:.1f} ", shown)
    assert re.search(r"without easy +[\d.]+ ", shown)
    assert "calibrated on " in shown
    assert "an input, too: its own figures are optimistic" in shown


def test_a_threshold_from_another_file(tmp_path, tokens):
    data = splits(tmp_path, "easy", "hard")
    apart = eval_prm("processbench", data[1:], tokens, calibration=data[0])
    both = eval_prm("processbench", data, tokens, calibration=data[0])
    assert apart["threshold"] == pytest.approx(both["threshold"], abs=1e-6)
    assert list(apart["splits"]) == ["hard"]
    assert "calibrated_on" not in apart
    given = eval_prm("processbench", data[1:], tokens, options=StepOptions(threshold=-1e9))
    assert given["splits"]["hard"]["error_acc"] == 0.0
    assert given["splits"]["hard"]["correct_acc"] == 100.0
    assert (given["mean_f1"], given["threshold_is"]) == (0.0, "given")


def test_splits_of_one_kind_have_no_f1(tmp_path, chances):
    path = tmp_path / "right.jsonl"
    row = {"id": "a", "problem": "1+2=", "steps": ["1+2=3", "#### 3"], "label": -1}
    path.write_text(json.dumps(row) + "\n")
    result = eval_prm("processbench", [path], chances, options=StepOptions(threshold=-1.0))
    assert result["splits"]["right"] == {
        "error_acc": None,
        "correct_acc": 100.0,
        "f1": None,
        "num_errors": 0,
        "num_correct": 1,
    }
    assert result["mean_f1"] is None
    with pytest.raises(ConfigError, match="a threshold needs solutions with and without an error, there are 0 and 1"):
        eval_prm("processbench", [path], chances, calibration=path)


def test_prmbench_has_classifications(tmp_path, chances, capsys):
    data, output = tmp_path / "own.jsonl", tmp_path / "out"
    write_prmbench(data, 0, 12)
    # A sample without a wrong step, as in multi_solutions.
    row = json.loads(data.read_text().splitlines()[0])
    row |= {"classification": "multi_solutions", "error_steps": [], "idx": "m"}
    data.write_text(data.read_text() + json.dumps(row) + "\n")
    command = ["eval", "--benchmark", "prmbench", "--prm", chances, "--data", str(data)]
    assert main([*command, "--output", str(output)]) == 0
    shown, result = capsys.readouterr().out, json.loads((output / "results.json").read_text())
    rows = rows_of(output / "steps.jsonl")
    judged = {
        row["id"]: prmbench_row([score > 0.5 for score in row["step_scores"]], [i + 1 for i in row["wrong"]])
        for row in rows
    }
    kinds = {row["id"]: row["classification"] for row in rows}
    assert list(result["classifications"]) == ["redundency", "counterfactual", "multi_solutions", "correct"]
    overall = prmbench_scores([judged[name] for name in judged if kinds[name] != "correct"])
    assert result["overall"]["samples"] == 13
    assert result["overall"]["prm_score"] == pytest.approx(100 * overall.prm_score)
    redundant = prmbench_scores([judged[name] for name in judged if kinds[name] == "redundency"])
    part = result["classifications"]["redundency"]
    assert (part["f1"], part["negative_f1"]) == (100 * redundant.f1, 100 * redundant.negative_f1)
    for name in ("multi_solutions", "correct"):
        part = result["classifications"][name]
        assert (part["negative_f1"], part["first_error_acc"]) == (None, None)
        assert part["prm_score"] == part["f1"]
    assert result["categories"]["simplicity"] == result["classifications"]["redundency"]["prm_score"]
    assert re.search(rf"overall +13 +{result['overall']['prm_score']:.1f} ", shown)
    assert re.search(r"correct +6 +[\d.]+ +[\d.]+ +- +- ", shown)
    assert "threshold 0.5 (an even chance, as step scores are probabilities)" in shown


def test_what_was_killed_goes_on_to_the_same_bytes(tmp_path, chances, monkeypatch):
    data, small = splits(tmp_path, "easy", "hard"), StepOptions(placed=Placed(tokens=100))
    eval_prm("processbench", data, chances, tmp_path / "a", small)
    batches = eval_steps._batches

    def killed(*arguments):
        yield next(batches(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_steps, "_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            eval_prm("processbench", data, chances, tmp_path / "b", small)
    assert 0 < len(rows_of(tmp_path / "b" / "steps.jsonl")) < 24
    with pytest.raises(ConfigError, match="go on with it by --resume"):
        eval_prm("processbench", data, chances, tmp_path / "b", small)
    with pytest.raises(ConfigError, match="was made with tokens 100, now it is 16384"):
        eval_prm("processbench", data, chances, tmp_path / "b", resume=True)
    for _ in range(2):
        eval_prm("processbench", data, chances, tmp_path / "b", small, resume=True)
        for name in ("steps.jsonl", "results.json"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_judged_is_refused(tmp_path, tokens, chances, capsys):
    [data] = splits(tmp_path, "easy")

    def refused(*arguments, benchmark="processbench", prm=chances):
        given = [] if prm is None else ["--prm", prm]
        assert main(["eval", "--benchmark", benchmark, "--data", data, *given, *arguments]) == 2
        return capsys.readouterr().err

    assert "judges a PRM: give --prm DIR" in refused(prm=None)
    assert "step scores of this PRM are no probabilities" in refused(prm=tokens)
    assert "give one of them" in refused("--threshold", "0.5", "--calibrate", data)
    assert "--threshold is nan" in refused("--threshold", "nan")
    assert "--samples is for benchmarks of answers, not for processbench" in refused("--samples", "2")
    assert "--seed is not for processbench" in refused("--seed", "2")
    assert "--dtype is 'int8'" in refused("--dtype", "int8")
    assert "--tokens is 0" in refused("--tokens", "0")
    assert "names" in refused("--data", data, data)
    assert "--resume goes on with a folder" in refused("--resume")
    assert "has no column 'classification' (PRMBench)" in refused(benchmark="prmbench")
    assert "--prm is for processbench and prmbench" in refused(benchmark="gsm8k")
