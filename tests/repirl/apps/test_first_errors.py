"""`repirl localize`: predictions by a threshold, ProcessBench's figures, and thresholds of another file."""

import json
import re

import pytest
from tiny import make_model, make_step_prm

from repirl.apps.benchmarks import processbench_scores
from repirl.apps.first_errors import Localized, described
from repirl.cli import main
from repirl.prm import PRMDescription, StepRule, load_prm

STEPS = [["8+7=15", "15-3=12", "#### 12"], ["8+7=14", "#### 14"], ["15-3=12"], ["1+2=3", "3+3=5", "#### 5"]]
LABELS = [-1, 0, -1, 1]


def write(path, labels=LABELS, **changes):
    rows = [
        {"id": f"t-{i}", "problem": "8+7-3=", "steps": s, "label": label, "final_answer_correct": label == -1} | changes
        for i, (s, label) in enumerate(zip(STEPS, labels, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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


def expected(path, threshold):
    prm = load_prm(path, device="cpu")
    scores = [s.tolist() for s in prm.step_scores([("8+7-3=", "; ".join(steps)) for steps in STEPS])]
    return scores, [next((i for i, x in enumerate(s) if x < threshold), -1) for s in scores]


def test_predictions_are_the_first_steps_below_the_threshold(tmp_path, chances, tokens, capsys):
    data = write(tmp_path / "a.jsonl")
    for path, threshold in ((chances, None), (tokens, -3.0)):
        output = tmp_path / f"out{threshold}.jsonl"
        given = [] if threshold is None else ["--threshold", str(threshold)]
        assert main(["localize", "--prm", path, "--input", data, "--output", str(output), *given]) == 0
        scores, predictions = expected(path, 0.5 if threshold is None else threshold)
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["prediction"] for row in rows] == predictions
        assert [row["id"] for row in rows] == ["t-0", "t-1", "t-2", "t-3"]
        for row, steps in zip(rows, scores, strict=True):
            assert row["step_scores"] == pytest.approx(steps, abs=1e-5)
        figures, shown = processbench_scores(predictions, LABELS), capsys.readouterr().out
        assert (
            f"acc on erroneous {figures.error_acc:.1f} (2 solutions), acc on correct {figures.correct_acc:.1f} (2), "
            f"F1 {figures.f1:.1f}"
        ) in shown
        origin = "given" if threshold else "an even chance, as step scores are probabilities"
        assert f"threshold {threshold or 0.5:g} ({origin})" in shown


def test_a_threshold_is_calibrated_on_one_file_and_used_on_others(tmp_path, tokens, capsys):
    scores, _ = expected(tokens, 0.0)
    # The lowest step of every second solution is labelled wrong: there is a threshold, and it comes from this file.
    order = sorted(range(4), key=lambda i: min(scores[i]))
    labels = [-1] * 4
    for i in order[:2]:
        threshold = (min(scores[order[1]]) + min(scores[order[2]])) / 2
        labels[i] = next(j for j, x in enumerate(scores[i]) if x < threshold)
    tuned = write(tmp_path / "tuned.jsonl", labels)
    inputs = [tuned, write(tmp_path / "b.jsonl")]
    assert main(["localize", "--prm", tokens, "--calibrate", tuned, "--input", *inputs]) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"threshold -[\d.]+ \(calibrated on .*tuned.jsonl, 4 solutions; that is an input, too: its ", shown
    )
    assert f"{tuned}: acc on erroneous 100.0 (2 solutions), acc on correct 100.0 (2), F1 100.0" in shown
    assert re.search(r"b.jsonl: acc on erroneous [\d.]+ \(2 solutions\)", shown)
    assert re.search(r"mean F1 of 2 inputs [\d.]+", shown)


def test_figures_that_there_are_not_are_dashes():
    only = Localized(0.5, "given", {"a": processbench_scores([0], [0]), "b": processbench_scores([0], [0])})
    assert only.mean_f1 is None
    assert "a: acc on erroneous 100.0 (1 solutions), acc on correct - (0), F1 -" in described(only)


def test_what_cannot_be_judged_is_refused(tmp_path, tokens, chances, capsys):
    data = write(tmp_path / "a.jsonl")

    def refused(*arguments, prm=chances):
        assert main(["localize", "--prm", prm, "--input", data, *arguments]) == 2
        return capsys.readouterr().err

    assert "step scores of this PRM are no probabilities" in refused(prm=tokens)
    assert "give one of them" in refused("--threshold", "0.5", "--calibrate", data)
    assert "--threshold is nan" in refused("--threshold", "nan")
    assert "is an input, which would be lost" in refused("--output", data)
    assert "is an input, which would be lost" in refused("--calibrate", "b.jsonl", "--output", data)
    for other in (data, f"{tmp_path}/../{tmp_path.name}/a.jsonl"):
        assert f"--input names {other!r} twice" in refused("--input", data, other)
    assert "has no column 'question' (--prompt-column)" in refused("--prompt-column", "question")
    one_kind = write(tmp_path / "b.jsonl", [-1] * 4)
    assert "b.jsonl: a threshold needs solutions with and without an error, there are 0 and 4" in refused(
        "--calibrate", one_kind
    )
    for label in (3, -2, True, "1", None):
        write(tmp_path / "a.jsonl", [label, 0, -1, 1])
        assert "line 1: 'label' is " in refused()
    write(tmp_path / "a.jsonl", prediction=3)
    assert "line 1: there is a column 'prediction' already" in refused("--output", str(tmp_path / "new.jsonl"))
    assert not (tmp_path / "new.jsonl").exists()
