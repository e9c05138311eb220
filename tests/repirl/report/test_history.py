"""The history of prompts: what a row says, and a file that is resumed and read."""

import json

from repirl.report.history import HistoryFile, history_rows, read_history
from repirl.report.samples import Scored
from repirl.rollout.engine import Response

NAN = float("nan")


def scored(outcome, rewards=None, logprobs=(-1.0, -2.0)):
    return Scored(Response([3] * len(logprobs), list(logprobs), True), outcome, rewards)


def test_a_row_has_the_means_of_its_responses():
    [made] = history_rows(
        2, {7: [scored(1.0, [1.0, 2.0]), scored(0.0, [0.0, -1.0]), scored(0.25, [-4.0], logprobs=[-3.0])]}
    )
    assert made == {
        "step": 2,
        "index": 7,
        "samples": 3,
        "correct": 1,
        "outcome_mean": 0.416667,
        "outcome_max": 1.0,
        "reward": round((1.5 - 0.5 - 4) / 3, 6),
        "reward_failed": (-0.5 - 4) / 2,
        "logprob": (-1.5 - 1.5 - 3) / 3,
        "length": 1.66667,
    }


def test_what_is_not_known_is_null():
    rows = history_rows(1, {0: [scored(NAN, [1.0, 1.0])], 1: [scored(1.0, [1.0, 1.0])], 2: [scored(0.0)]})
    unverified, right, unscored = rows
    assert [unverified[n] for n in ("correct", "outcome_mean", "outcome_max", "reward_failed")] == [None] * 4
    assert unverified["reward"] == 1.0
    assert (right["reward"], right["reward_failed"]) == (1.0, None)
    assert (unscored["reward"], unscored["reward_failed"], unscored["correct"]) == (None, None, 0)
    [broken] = history_rows(1, {0: [scored(0.0, [NAN, 1.0], logprobs=[float("-inf"), 0.0])]})
    assert (broken["reward_failed"], broken["logprob"]) == (None, None)


def test_a_resumed_run_has_each_turn_once(tmp_path):
    def write(start, steps):
        file = HistoryFile(tmp_path, start_step=start)
        for step in steps:
            file.append(history_rows(step, {0: [scored(0.0)], 4: [scored(1.0)]}))
        file.close()

    HistoryFile(tmp_path, start_step=0).append([])
    assert not list(tmp_path.iterdir())
    write(0, [1, 2, 3])
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"step": 4')
    write(2, [3, 4])
    assert [(row["step"], row["index"]) for row in read_history(tmp_path)] == [
        (step, index) for step in (1, 2, 3, 4) for index in (0, 4)
    ]
    write(0, [1])
    assert len(read_history(tmp_path)) == 2


def test_lines_that_are_no_rows_are_left_out(tmp_path, caplog):
    [good] = history_rows(1, {0: [scored(0.0)]})
    bad = [good | {"correct": -1}, good | {"reward": "x"}, {"step": 1}]
    bad += [good | {"length": True}, good | {"reward_failed": float("nan")}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [good, *bad]))
    assert read_history(tmp_path) == [good]
    assert "lines 2, 3, 4, 5, 6 cannot be read as outcomes of prompts" in caplog.text
