"""Fixed rollouts: what is read of them, what is refused, and the order they come in."""

import json
import math

import pytest

from repirl.config import ConfigError
from repirl.data.errors import DataError
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.data.trajectories import Trajectories, Trajectory, load_trajectories
from repirl.dataconfig import DataConfig


def read(tmp_path, *rows, temperature=None, **columns):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(trajectories={"path": str(path), **columns})
    return load_trajectories(data, build_tokenizer(), temperature=temperature)


def test_text_is_a_finished_response(tmp_path):
    tokenizer = build_tokenizer()
    right, wrong = read(
        tmp_path, {"prompt": "1+1=", "response": "2", "outcome": 1}, {"prompt": "1+1=", "response": "3", "outcome": "0"}
    )
    assert tokenizer.decode(right.prompt_ids) == "1+1="
    assert tokenizer.decode(right.response_ids) == "2<eos>"
    assert (right.outcome, wrong.outcome, right.logprobs) == (1.0, 0.0, None)
    [unknown] = read(tmp_path, {"prompt": "1+1=", "response": "2"}, outcome_column=None)
    assert math.isnan(unknown.outcome)


def test_token_ids_are_taken_as_they_are(tmp_path):
    """A response that was cut off has no end token, and log mu belongs to these very tokens."""
    ids = build_tokenizer()("23").input_ids
    row = {"prompt": "1+1=", "response": "23", "response_ids": ids, "logprobs": [-0.5] * len(ids), "outcome": False}
    [actual] = read(tmp_path, row, logprob_column="logprobs")
    assert actual.response_ids == tuple(ids)
    assert actual.logprobs == (-0.5,) * len(ids)


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({"outcome": None}, {}, r"line 1: 'outcome' is null, expected an outcome: 1 for right, 0 for wrong"),
        ({"outcome": 2}, {}, r"'outcome' is 2"),
        ({"outcome": "yes"}, {}, r"'outcome' is 'yes'"),
        ({"response_ids": [3, 999]}, {}, r"'response_ids' holds 999, expected token ids below \d+"),
        ({"response_ids": []}, {}, r"'response_ids' holds \[\], expected a list of token ids"),
        ({"response_ids": [1, 4]}, {}, r"'response_ids' goes on after the end token '<eos>'"),
        ({"response_ids": [4, 5]}, {}, r"'response_ids' are tokens of .* but 'response' holds '2': the ids are of an"),
        ({"logprobs": [-1.0]}, {"logprob_column": "logprobs"}, r"holds 1 log-prob.* each of the response's 2 tokens"),
        (
            {"logprobs": [-1.0, 0.5]},
            {"logprob_column": "logprobs"},
            r"'logprobs' holds 0.5, expected log-prob.*at most",
        ),
        ({}, {"logprob_column": "mu"}, r"has no column 'mu' \(data.trajectories.logprob_column\)"),
        ({"response": ["2", "3"]}, {}, r"'response' holds 2 responses, expected one"),
        ({"temperature": 0.7}, {}, r"sampled at temperature 0.7, but .* rollout.temperature, 1.0"),
    ],
)
def test_what_is_no_rollout_is_refused_by_row(tmp_path, changes, columns, message):
    row = {"prompt": "1+1=", "response": "2", "outcome": 1} | changes
    with pytest.raises(DataError, match=message):
        read(tmp_path, row, temperature=1.0, **columns)


def test_another_temperature_is_right_where_log_mu_is_given(tmp_path):
    row = {"prompt": "1+1=", "response": "2", "logprobs": [-1, -2], "temperature": 0.7, "outcome": 1}
    assert read(tmp_path, row, temperature=1.0, logprob_column="logprobs")[0].logprobs == (-1.0, -2.0)


def rows_of(counts, logprobs=None):
    """So many rollouts of each prompt, which is its number; responses are numbered, too."""
    return [Trajectory((p,), (i, 1), 1.0, logprobs) for p, count in enumerate(counts) for i in range(count)]


def drawn(trajectories):
    """[(prompt, numbers of its responses)] of a turn."""
    batch = trajectories.next()
    groups = {}
    for start, group in zip(batch.cu_seqlens[:-1].tolist(), batch.group_ids.tolist(), strict=True):
        prompt, number = batch.token_ids[start : start + 2].tolist()
        groups.setdefault(group, (prompt, []))[1].append(number)
    return [*groups.values()]


def test_a_turn_has_whole_prompts_and_passes_take_turns():
    trajectories = Trajectories(rows_of([1, 2, 5]), seed=0, prompts_per_turn=3, samples_per_prompt=2)
    assert (len(trajectories), trajectories.num_prompts) == (8, 3)
    passes = [dict(drawn(trajectories)) for _ in range(3)]
    assert [actual[0] for actual in passes] == [[0]] * 3
    assert [actual[1] for actual in passes] == [[0, 1]] * 3
    # Of a prompt with more of them than a turn takes, each pass gives the next ones.
    assert [actual[2] for actual in passes] == [[0, 1], [2, 3], [4, 0]]


def test_log_mu_of_the_file_becomes_streams():
    trajectories = Trajectories(rows_of([2], (-0.25, -0.5)), seed=0, prompts_per_turn=1, samples_per_prompt=2)
    batch = trajectories.next()
    assert batch.read("old_logprob").tolist() == batch.read("sampler_logprob").tolist() == [-0.25, -0.5] * 2
    assert not Trajectories(rows_of([2]), seed=0, prompts_per_turn=1, samples_per_prompt=2).next().streams


def test_resumption():
    trajectories = Trajectories(rows_of([3, 3, 3, 3]), seed=1, prompts_per_turn=3, samples_per_prompt=2)
    drawn(trajectories)
    state, expected = trajectories.state_dict(), drawn(trajectories)
    other = Trajectories(rows_of([3, 3, 3, 3]), seed=1, prompts_per_turn=3, samples_per_prompt=2)
    other.load_state_dict(state)
    assert drawn(other) == expected
    with pytest.raises(ConfigError, match="without fixed rollouts"):
        other.load_state_dict(None)
