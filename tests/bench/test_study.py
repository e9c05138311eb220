"""The study: equal runs are one run, what is trained is what a cell says, and what the page says of the results."""

import dataclasses
import json

import pytest

from bench.study import __main__ as study
from bench.study import cells, page, programs, runner
from bench.study.cells import ARMS, PLAN, TASKS, Cell, planned
from bench.study.claims import CLAIMS, verdict
from repirl.apps.start import Start, make_data


def test_every_cell_has_a_valid_configuration(tmp_path):
    for cell in planned(list(PLAN), list(ARMS), range(1)):
        config = cell.config(tmp_path, tmp_path / "run")
        assert config.steps == TASKS[cell.task].turns
        fooled = TASKS[cell.task].verifier is not None and ARMS[cell.arm].reads_verdicts
        assert (config.verifier.kind == "custom") == fooled
        # Whatever the training saw, held-out accuracy is exact.
        assert (config.eval.verifier or config.verifier).kind == ("code" if cell.task == "code" else "math")
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= set(PLAN[claim.task])


def test_cells_that_are_the_same_run_share_a_key(tmp_path):
    def key(*cell):
        return Cell(*cell).key(tmp_path)

    assert key("exact", "SFT", 0) == key("last-digit", "SFT", 0)
    assert key("exact", "RLOO", 0) == key("experts-16", "RLOO", 0)
    others = [
        key("exact", "RLOO", 1),
        key("last-digit", "RLOO", 0),
        key("hard", "RLOO", 0),
        key("hard-120", "RLOO", 0),
        key("exact", "rePIRL", 0),
        key("experts-16", "rePIRL", 0),
    ]
    assert len({key("exact", "RLOO", 0), *others}) == 7
    # Where the study's folder lies does not matter.
    assert key("exact", "RLOO", 0) == Cell("exact", "RLOO", 0).key(tmp_path / "elsewhere")


def test_a_cell_trains_and_its_prm_is_judged(tmp_path, monkeypatch):
    start = Start(40, 40, 40, num_held_out=10, num_planted=12, num_experts=(8,), warm_turns=3, sloppy_turns=2)
    monkeypatch.setitem(cells.STARTS, "plain", start)
    monkeypatch.setitem(
        cells.TASKS, "last-digit-16", cells.Task("few turns", verifier="last_digit", num_experts=8, turns=2)
    )
    few = {"steps": 2, "rollout": {"prompts_per_step": 3}}
    monkeypatch.setitem(cells.ARMS, "rePIRL", cells.Arm("demo", few))
    runner.prepare(tmp_path, "plain", 0)
    cell = Cell("last-digit-16", "rePIRL", 0)
    result = runner.run_cell(tmp_path, cell)
    assert [step for step, _ in result["curve"]] == [0, 2]
    assert result["tokens"] > result["sampled_tokens"] > 0
    assert 0 <= result["planted"]["auroc"] <= 1
    # The start is made once, and the run leaves its metrics alone.
    changed = (tmp_path / "starts" / "plain_0" / "tests.json").stat().st_mtime_ns
    runner.prepare(tmp_path, "plain", 0)
    assert (tmp_path / "starts" / "plain_0" / "tests.json").stat().st_mtime_ns == changed
    tests = runner.load_tests(tmp_path / "starts" / "plain_0" / "tests.json")
    assert sum(test.error_step is not None for test in tests) == 6


def test_a_cell_of_programs_is_trained_and_its_programs_are_judged(tmp_path, monkeypatch):
    start = Start(40, 40, 40, num_held_out=10, num_planted=12, num_experts=(16,), warm_turns=3, sloppy_turns=2)
    monkeypatch.setitem(cells.STARTS, "code", start)
    monkeypatch.setitem(cells.ARMS, "rePIRL", cells.Arm("demo", {"rollout": {"prompts_per_step": 3}}))
    monkeypatch.setitem(cells.TASKS, "code", dataclasses.replace(TASKS["code"], turns=1))
    monkeypatch.setattr(programs, "TIMED", 5)
    runner.prepare(tmp_path, "code", 0)
    tests = runner.load_tests(tmp_path / "starts" / "code_0" / "tests.json", "code")
    assert [test.problem for test in tests] == [
        test.problem for test in make_data(tmp_path / "again", 0, start, "code")
    ]
    cell = Cell("code", "rePIRL", 0)
    result = runner.run_cell(tmp_path, cell)
    assert [step for step, _ in result["curve"]] == [0, 1]
    assert 0 <= result["planted"]["auroc"] <= 1
    judged = result["programs"]
    assert judged["responses"] == 10
    assert sum(judged["wrong"].values()) == round(10 * (1 - result["curve"][-1][1]))
    assert judged["judged_per_second"] > 0
    # They have a table of their own.
    columns, [row] = page.programs({cell: result}, "code")
    assert (columns[0], columns[-1]) == ("arm", "programs judged a second")
    assert len(columns) == len(row) == 2 + len(judged["wrong"])
    assert "six tests each" in page.markdown({cell: result}, [], {}, "command")


def results_of(accuracies):
    return {
        Cell("exact", arm, seed): {
            "curve": [[0, 0.5], [5, max(end, 0.6)], [10, end]],
            "tokens": 1000,
            "sampled_tokens": 400,
            "seconds": 10.0,
            "revision": "abc",
        }
        for arm, ends in accuracies.items()
        for seed, end in enumerate(ends)
    }


def test_the_page_pairs_by_seed_and_judges_claims():
    results = results_of({"SFT": [0.8, 0.9], "RLOO": [0.7, 0.6], "rePIRL": [0.9, 0.8]})
    columns, rows = page.table(results, "exact")
    row = dict(zip(columns, next(row for row in rows if row[0] == "rePIRL"), strict=True))
    assert row["end, %"] == "85.0 ± 5.0"
    assert row["minus RLOO"] == "20.0 ± 0.0"
    assert row["minus SFT"] == "0.0 ± 10.0"
    by_claim = {text: says for text, _, _, says in page.claims(results)}
    assert by_claim["rePIRL is better than RLOO (exact)"] == "agrees"
    assert by_claim["rePIRL is better than SFT on its experts (exact)"] == "not told apart"
    assert "rePIRL is better than PRIME (exact)" not in by_claim
    text = page.markdown(results, ["exact / PRIME / seed 0: no result"], {"cpu": "x"}, "command")
    assert "| rePIRL | 85.0 ± 5.0 |" in text
    assert "no result" in text
    assert page.curves(results)[0]["series"][0]["x"] == [0, 5, 10]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1], "not told from one seed"),
        ([0.1, 0.12, 0.11], "agrees"),
        ([-0.1, -0.12], "disagrees"),
        ([0.1, -0.1], "not told apart"),
    ],
)
def test_verdicts(values, expected):
    assert verdict(values) == expected


def test_a_study_without_results_has_no_page(tmp_path, capsys):
    assert study.main(["--page", "--folder", str(tmp_path), "--output", str(tmp_path / "page.md")]) == 1
    assert "there is no page" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(["--only", "exct"])
    assert "--only names 'exct'" in capsys.readouterr().err


def test_programs_are_trained_only_when_they_are_named(tmp_path, capsys):
    cell = Cell("code", "RLOO", 0)
    path = runner.result_path(tmp_path, cell)
    path.parent.mkdir()
    result = next(iter(results_of({"RLOO": [0.7]}).values()))
    path.write_text(json.dumps(result))
    options = ["--page", "--folder", str(tmp_path), "--seeds", "1", "--output", str(tmp_path / "page.md")]
    assert study.main(options) == 1
    assert "there is no page" in capsys.readouterr().err
    assert study.main([*options, "--only", "code"]) == 0
    assert "| RLOO | 70.0 |" in (tmp_path / "page.md").read_text()


def test_a_failed_run_is_told_and_the_page_is_made_of_the_others(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    (folder / "starts" / "plain_0").mkdir(parents=True)
    monkeypatch.setattr(runner, "_train", lambda folder, cell, revision: f"no {cell.arm} today")
    done = Cell("exact", "RLOO", 0)
    (folder / "cells").mkdir()
    runner.result_path(folder, done).write_text(json.dumps(results_of({"RLOO": [0.7]})[done]))
    options = ["--only", "exact", "--arms", "SFT;RLOO", "--seeds", "1", "--folder", str(folder)]
    assert study.main([*options, "--output", str(tmp_path / "page.md")]) == 1
    printed = capsys.readouterr()
    assert "exact / SFT / seed 0: FAILED" in printed.out
    assert "no SFT today" in printed.err
    text = (tmp_path / "page.md").read_text()
    assert "exact / SFT / seed 0: no SFT today" in text
    assert "| RLOO | 70.0 |" in text
    assert (tmp_path / "page.html").is_file()
