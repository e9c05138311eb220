"""The benchmark command, its refusal of wrong results, and its page."""

import json
import os

import pytest
import torch

from bench import report, run
from bench.cases import PROFILES, Case, make_inputs
from bench.contenders import CONTENDERS, Contender, Values
from bench.measure import extra_bytes_of, spread, times_of
from repirl.cli import main as repirl

OURS = CONTENDERS[0]
EAGER = next(contender for contender in CONTENDERS if contender.name == "eager")
CASE = Case("tiny", 32, "fp32", "policy+entropy")


def _measure(*contenders: Contender, case: Case = CASE) -> dict[str, dict]:
    measured = run.measure_case(case, list(contenders), "cpu", seconds=0.01)
    json.dumps(measured)
    return {row["contender"]: row for row in measured["rows"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the JSON of the whole command over all contenders on small shapes."""
    folder = tmp_path_factory.mktemp("results")
    options = ["--profile", "test", "--task", "sft", "policy+entropy", "logits", "--dtype", "fp32"]
    options += ["--seconds", "0.01", "--threads", "1", "--json", str(folder / "here" / "ops.json")]
    assert repirl(["bench", *options]) == 0
    return folder


@pytest.mark.timeout(600)
def test_the_command_measures_every_contender_or_says_why_not(results):
    result = json.loads((results / "here" / "ops.json").read_text())
    assert {"date", "revision", "cpu", "cores", "threads", "memory_gib", "versions", "command"} <= result.keys()
    assert result["versions"]["torch"] == torch.__version__
    assert "--threads 1" in result["command"]
    assert [measured["case"]["task"] for measured in result["cases"]] == ["sft", "policy+entropy", "logits"]
    seen = set()
    for measured in result["cases"]:
        assert measured["yardstick"]["median"] > 0
        for row in measured["rows"]:
            seen.add(row["contender"])
            if "reason" in row:
                assert row["reason"]
                assert not row["ours"] or row["reason"] == "no entropy with a gradient"
                assert row["contender"] not in ("eager", "eager from logits")
                continue
            assert 0 < row["low"] <= row["median"] <= row["high"]
            assert row["products"] == pytest.approx(row["median"] / measured["yardstick"]["median"])
            assert row["extra_bytes"] >= 0
            assert set(row["errors"]) == {"dhidden"} | ({"dweight"} if measured["case"]["task"] != "logits" else set())
            assert all(0 < error < 1e-4 for error in row["errors"].values())
    assert seen == {contender.name for contender in CONTENDERS}


def test_the_page_is_made_from_the_results_alone(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    made = []
    (results / "here" / "trainers.md").write_text("# Beside a peer\n\n| phase |\n")
    (results / "untitled.md").write_text("| phase |\n")
    for _ in range(2):
        assert report.main(["--results", str(results), "--page", str(page)]) == 0
        made.append((page.read_text(), (results / "here" / "ops.svg").read_bytes()))
    assert made[0] == made[1]
    text = made[0][0]
    there = os.path.relpath(results, tmp_path)
    assert f"* [Beside a peer]({there}/here/trainers.md)\n* [untitled]({there}/untitled.md)\n" in text
    for measured in json.loads((results / "here" / "ops.json").read_text())["cases"]:
        assert f"### {measured['name']}\n" in text
        for row in measured["rows"]:
            assert row["contender"] in text
            assert row.get("reason", "") in text
    assert report.main(["--results", str(tmp_path / "none"), "--page", str(page)]) == 2
    assert "none has no */ops*.json" in capsys.readouterr().err


def _half_entropy(inputs) -> Values:
    values = EAGER.values(inputs)
    return values._replace(entropy=0.5 * values.entropy)


def _detached_entropy(inputs) -> Values:
    values = EAGER.values(inputs)
    return values._replace(entropy=values.entropy.detach())


@pytest.mark.parametrize("task", ["score", "policy+entropy"])
def test_wrong_results_are_not_timed(task):
    wrong = Contender("wrong", (), values=lambda inputs: Values(*(2 * v for v in EAGER.values(inputs))))
    half = Contender("half", (), values=_half_entropy)
    rows = _measure(OURS, wrong, half, case=CASE._replace(task=task))
    assert "median" in rows[OURS.name]
    for name in ("wrong", "half"):
        assert "not the same result" in rows[name]["reason"]
        assert "median" not in rows[name]
        assert "extra_bytes" not in rows[name]


def test_a_missing_gradient_is_not_a_result():
    no_dweight = Contender(
        "no dweight", (), values=lambda inputs: EAGER.values(inputs._replace(weight=inputs.weight.data))
    )
    assert "gives no dweight" in _measure(no_dweight)["no dweight"]["reason"]
    detached = Contender("detached", (), values=_detached_entropy)
    for dtype in ("fp32", "bf16"):
        assert "not the same result" in _measure(detached, case=CASE._replace(dtype=dtype))["detached"]["reason"]


def test_why_a_contender_cannot_run_is_told():
    def fails(inputs):
        raise NotImplementedError("only for even numbers\nof rows")

    def absent(inputs):
        import a_peer_that_nobody_has  # noqa: F401

    rows = _measure(
        Contender("fails", (), values=fails),
        Contender("absent", (), values=absent),
        Contender("mean", (), mean_loss=fails),
    )
    assert rows["fails"]["reason"] == "NotImplementedError: only for even numbers"
    assert rows["absent"]["reason"] == "not installed: No module named 'a_peer_that_nobody_has'"
    assert rows["mean"]["reason"] == "has a mean loss only"


def test_one_that_fails_at_full_size_is_told_and_the_others_are_timed():
    def fails(inputs):
        raise MemoryError("too large")

    times, reasons = times_of([OURS, Contender("large", (), values=fails)], CASE, "cpu", 0.01)
    assert reasons == {"large": "MemoryError: too large"}
    assert set(times) == {"", OURS.name}
    assert len(times[OURS.name]) >= 3


def test_memory_is_the_transient_peak_beyond_gradients():
    def wasteful(inputs):
        torch.ones(16 << 20)  # 64 MiB, freed at once
        return EAGER.values(inputs)

    case = Case("tiny", 32, "fp32", "policy+entropy")
    extra = extra_bytes_of(Contender("wasteful", (), values=wasteful), case, "cpu")
    assert 60 << 20 < extra < 80 << 20


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "rounds": 5}


def test_inputs_are_those_of_the_case():
    inputs = make_inputs(CASE._replace(masked=0.75, frozen=True, dtype="bf16"), "cpu")
    assert inputs.hidden.shape == (32, 64)
    assert inputs.hidden.dtype == torch.bfloat16
    assert inputs.counts.sum() == 8
    (leaf,) = inputs.leaves()
    assert leaf is inputs.hidden
    again = make_inputs(CASE._replace(masked=0.75, frozen=True, dtype="bf16"), "cpu")
    assert torch.equal(inputs.hidden, again.hidden)
    assert torch.equal(inputs.targets, again.targets)


def test_filters(capsys):
    with pytest.raises(SystemExit):
        run.main(["--shape", "GPT-5"])
    assert "invalid choice: 'GPT-5'" in capsys.readouterr().err
    assert run.main(["--profile", "test", "--rows", "7"]) == 2
    assert "nothing is left to measure" in capsys.readouterr().err


def test_profiles_cover_shapes_masks_and_a_frozen_head():
    gpu = PROFILES["gpu"]
    assert {case.shape for case in gpu} >= {"SmolLM2-135M", "Qwen2.5-3B", "Qwen3-4B", "Llama-3-8B", "4096x131072"}
    assert {case.masked for case in gpu} == {0.0, 0.6, 0.9} == {case.masked for case in PROFILES["cpu"]}
    for profile in ("cpu", "gpu"):
        assert any(case.frozen for case in PROFILES[profile])
        assert {case.dtype for case in PROFILES[profile]} == {"bf16", "fp32"}


def test_without_a_checkout_the_command_says_where_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("repirl.cli.__file__", str(tmp_path / "repirl" / "cli.py"))
    assert repirl(["bench"]) == 2
    assert f"{tmp_path} has no bench/run.py" in capsys.readouterr().err
