"""Early signal: figures of a history that was made up, so that they are known."""

import json

import pytest

from repirl.apps.signal import signal
from repirl.cli import main
from repirl.config import ConfigError


def row(step, index, correct=0, reward=0.0, logprob=-1.0, length=10.0, samples=4):
    return {
        "step": step,
        "index": index,
        "samples": samples,
        "correct": correct,
        "outcome_mean": None if correct is None else correct / samples,
        "outcome_max": None if correct is None else float(correct > 0),
        "reward": reward,
        "reward_failed": reward,
        "logprob": logprob,
        "length": length,
    }


def run_of(folder, rows):
    (folder / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def both_turns(index, solved, **first):
    return [row(1, index, **first), row(2, index, correct=int(solved), reward=first["reward"])]


def test_a_reward_that_knows_is_told_from_baselines_that_do_not(tmp_path):
    rows = []
    for index in range(24):
        solved = index % 2 == 0
        # Log-probabilities say nothing; longer responses are those that are solved later.
        rows += both_turns(index, solved, reward=float(solved), logprob=-1.0 - (index // 2), length=10.0 + 5 * solved)
    # These are not what is asked about: solved at once, and never sampled again.
    rows += [row(1, 100, correct=1), row(2, 100), row(1, 101, reward=9.0)]
    output = tmp_path / "signal.json"
    result = signal(run_of(tmp_path, rows), output, turns=[1])
    assert json.loads(output.read_text()) == result
    [line] = result["results"]
    assert (line["unsolved"], line["not_sampled_again"], line["solved_later"], line["never_solved"]) == (25, 1, 12, 12)
    auroc = line["auroc"]
    assert [auroc[name]["value"] for name in ("reward_failed", "logprob", "length")] == [1.0, 0.5, 0.0]
    assert auroc["reward_failed"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert 0.2 < auroc["logprob"]["low"] < 0.45
    assert 0.55 < auroc["logprob"]["high"] < 0.8
    above = line["above_baseline"]
    assert above["logprob"]["value"] == 0.5
    assert above["logprob"]["low"] == pytest.approx(1 - auroc["logprob"]["high"])
    assert above["length"]["value"] == 1.0


def test_scores_are_of_the_last_turn_before_and_centred_where_rewards_drift(tmp_path):
    rows = []
    for index in range(40):
        turn, solved = 1 + index // 10, index % 2 == 0
        # An earlier turn said the opposite. Each group of prompts is sampled in another turn, with other rewards.
        rows += [row(0, index, reward=-float(solved)), row(turn, index, reward=10.0 * turn + solved)]
        rows.append(row(8, index, correct=int(solved)))
    [line] = signal(run_of(tmp_path, sorted(rows, key=lambda one: one["step"])), turns=[4], resamples=50)["results"]
    assert line["solved_later"] == line["never_solved"] == 20
    # Of 4 x 4 pairs of turns, the prompts of equal turns are ordered rightly, the others as their turns are.
    assert line["auroc"]["reward_failed"]["value"] == pytest.approx((4 + 6) / 16)
    assert line["auroc_centred"]["reward_failed"] == 1.0


def test_by_default_three_turns_of_the_run_and_always_the_same_intervals(tmp_path):
    rows = [row(step, i, correct=int(step > i), reward=float(-i)) for step in range(1, 41) for i in range(0, 60, 2)]
    first, second = (signal(run_of(tmp_path, rows), resamples=50) for _ in range(2))
    assert first == second
    assert [line["turn"] for line in first["results"]] == [10, 20, 30]
    # Up to turn 10, prompts 0, 2, ..., 8 are solved, those from 40 on never.
    assert [(line["solved_later"], line["never_solved"]) for line in first["results"]] == [(15, 10), (10, 10), (5, 10)]
    assert signal(tmp_path, seed=1, resamples=50)["results"][0]["auroc"]["reward_failed"]["value"] == 1.0


def test_the_command_says_where_there_are_too_few(tmp_path, capsys):
    rows = [one for index in range(12) for one in both_turns(index, index < 4, reward=float(index))]
    rows += [row(1, 50), row(1, 51, reward=None) | {"reward_failed": None}, row(2, 51)]
    output = tmp_path / "out.json"
    assert main(["signal", "--run", str(run_of(tmp_path, rows)), "--output", str(output), "--turns", "1"]) == 0
    shown = capsys.readouterr().out
    assert (
        "turn 1: 14 prompts without a correct response, 1 of them were not sampled again, 1 have no rewards, 4 are "
        "solved later, 8 are not. Too few for an AUROC, which needs 5 of each" in shown
    )
    assert "AUROC over" not in shown
    assert json.loads(output.read_text())["results"][0]["auroc"] == {}


def test_the_command_prints_a_table_and_does_without_a_prm(tmp_path, capsys):
    rows = [one for i in range(20) for one in both_turns(i, i < 10, reward=None, logprob=float(-i), length=10.0)]
    assert main(["signal", "--run", str(run_of(tmp_path, rows))]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.split("\n") if line.strip().startswith("log-probability"))
    assert line.split() == ["log-probability", "1", "10", "10", "1.000", "1.000", "to", "1.000", "1.000"]
    assert "shortness" in shown
    assert "PRM's mean reward" not in shown
    assert "no PRM scored failures in this run: only the baselines are there" in shown


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, {}, "is not a folder; expected the output_dir of a run"),
        ([], {}, "has no rows: runs that sample keep it, unless log.history is false"),
        ([row(1, 0, reward=True), row(2, 0, length="x")], {}, "has no row that can be read"),
        ([row(1, 0, correct=None), row(2, 0, correct=None)], {}, "no response of the run .* was verified"),
        ([row(1, 0)], {}, "has one turn so far: nothing is solved later"),
        ([row(1, 0), row(3, 0)], {"turns": [3]}, "--turns has 3, expected 1 to 2: the run in .* has 3 turns"),
        ([row(1, 0), row(3, 0)], {"resamples": 0}, "--resamples is 0, expected at least 1"),
    ],
)
def test_what_it_cannot_be_asked_of(tmp_path, rows, options, message):
    folder = tmp_path / "run"
    if rows is not None:
        folder.mkdir()
        run_of(folder, rows)
    with pytest.raises(ConfigError, match=message):
        signal(folder, **options)


def test_a_turn_that_is_named_twice_is_shown_once(tmp_path):
    rows = [row(1, 0), row(2, 0), row(3, 0)]
    result = signal(run_of(tmp_path, rows), turns=[2, 1, 2])
    assert [line["turn"] for line in result["results"]] == [2, 1]


def test_an_output_that_exists_stays(tmp_path):
    (tmp_path / "signal.json").write_text("mine")
    with pytest.raises(ConfigError, match="exists already: choose another file"):
        signal(run_of(tmp_path, [row(1, 0), row(2, 0)]), tmp_path / "signal.json")
    assert (tmp_path / "signal.json").read_text() == "mine"
