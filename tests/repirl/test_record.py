"""What a run keeps of its responses, in every kind of turn, and resumed. For several processes: test_shard.py."""

import shutil
from pathlib import Path

import pytest
from tiny import tiny_config

from repirl.cli import main
from repirl.loop import train
from repirl.report.history import read_history
from repirl.report.log import read_metrics
from repirl.report.samples import read_samples

PROMPTS, SAMPLES = 3, 3  # of a turn of `tiny_values`


def run(folder, **changes):
    """Train a tiny run without evaluation; returns its samples and its history."""
    changes = {"eval": {"every": 0}, "checkpoint": {"every": 0}, "steps": 1} | changes
    config = tiny_config(folder, **changes)
    train(config)
    return read_samples(config.output_dir), read_history(config.output_dir)


def means(samples, history):
    """(mean reward of the kept responses, mean of the history's) of a turn of which all responses were kept."""
    rewards = [sum(row["token_rewards"]) / row["length"] for row in samples]
    return sum(rewards) / len(rewards), sum(row["reward"] for row in history) / len(history)


def test_a_run_keeps_some_responses_of_each_turn_and_evaluation_and_figures_of_each_prompt(tmp_path, capsys):
    samples, history = run(tmp_path, steps=2, eval={"every": 2}, log={"samples_per_turn": 4})
    kept = [(row["step"], row["kind"]) for row in samples]
    assert kept == [(0, "eval")] * 4 + [(1, "train")] * 4 + [(2, "train")] * 4 + [(2, "eval")] * 4
    assert [row["index"] for row in samples if row["kind"] == "eval"] == [0, 1, 2, 3] * 2
    for row in samples:
        assert row["length"] == len(row["token_texts"]) == len(row["token_logprobs"]) == len(row["token_rewards"])
        assert (row["end_reason"] == "end") == (row["token_texts"][-1] == "<eos>")
    # A prompt's second response is kept where there are fewer prompts than rows.
    first, *_, fourth = [row for row in samples if row["step"] == 1]
    assert first["index"] == fourth["index"]
    assert len({row["index"] for row in samples if row["step"] == 1}) == PROMPTS
    assert [(row["step"], row["samples"]) for row in history] == [(1, SAMPLES)] * PROMPTS + [(2, SAMPLES)] * PROMPTS
    # The head of a new PRM says 0; after the first update it does not.
    assert all(value == 0 for row in samples if row["step"] == 0 for value in row["token_rewards"])
    assert all(row["reward"] != 0 for row in history)
    # A random model solves nothing later.
    assert main(["signal", "--run", str(tmp_path / "run")]) == 0
    assert "0 are solved later, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        # A closed gate sets the rewards that the policy reads to 0, or holds the policy.
        {"irl": {"gate": 1e9}},
        {"irl": {"gate": 1e9, "use_outcome": False}, "loss": {"outcome_coefficient": 0.0}},
        {"loss": {"process_coefficient": 0.0}},
        {"order": "policy_first", "prm": {"reward": "implicit"}},
    ],
)
def test_rewards_are_those_of_the_prm_whether_the_policy_follows_it_or_not(tmp_path, changes):
    samples, history = run(tmp_path, steps=2, log={"samples_per_turn": PROMPTS * SAMPLES}, **changes)
    turn = [[row for row in rows if row["step"] == 2] for rows in (samples, history)]
    of_samples, of_history = means(*turn)
    assert of_samples == pytest.approx(of_history, rel=1e-4)
    assert of_samples != 0


def test_without_a_prm_there_are_no_rewards_and_offline_there_are_no_rollouts(tmp_path):
    samples, history = run(tmp_path, objective="rloo")
    assert {str(row["token_rewards"]) for row in samples} == {"None"}
    assert {row["reward_failed"] for row in history} == {None}
    samples, history = run(tmp_path, objective="sft", output_dir=str(tmp_path / "sft"), eval={"every": 1})
    assert {row["kind"] for row in samples} == {"eval"}
    assert not (tmp_path / "sft" / "history.jsonl").exists()


def test_what_is_off_costs_no_file_and_no_pass(tmp_path):
    options = {"loss": {"process_coefficient": 0.0}}
    samples, history = run(tmp_path, log={"samples_per_turn": 0, "history": False}, eval={"every": 1}, **options)
    assert samples == history == []
    assert not [path.name for path in (tmp_path / "run").glob("[sh]*.jsonl")]
    samples, history = run(tmp_path, output_dir=str(tmp_path / "some"), log={"history": False}, **options)
    assert history == []
    assert {str(row["token_rewards"]) for row in samples} == {"None"}


def test_prompts_that_a_filter_drops_are_in_the_history(tmp_path):
    """A random model solves nothing."""
    samples, history = run(tmp_path, rollout={"filter": {"max_rounds": 2}})
    assert len(history) == 2 * PROMPTS
    assert {(row["correct"], row["reward"]) for row in history} == {(0, None)}
    assert len(samples) == 4


def test_prompts_that_wait_for_another_turn_are_in_the_history_of_that_one(tmp_path):
    options = {"filter": {"surplus": "keep", "oversample": 3.0}, "temperature": 2.0}
    options |= {"prompts_per_step": 2, "samples_per_prompt": 2}
    judge = {"kind": "custom", "function": "judges:even_length"}
    _, history = run(tmp_path, steps=3, rollout=options, verifier=judge)
    turns = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(turn["filter/surplus"] for turn in turns[:-1]) > 0
    sampled = sum(turn["filter/sampled"] for turn in turns) - turns[-1]["filter/surplus"]
    assert sum(row["samples"] for row in history) == 2 * sampled
    assert sum(row["reward"] is not None for row in history) == sum(turn["filter/kept"] for turn in turns)


def test_a_prompt_that_is_sampled_twice_in_a_turn_has_one_row(tmp_path):
    _, history = run(tmp_path, rollout={"prompts_per_step": 30, "samples_per_prompt": 2, "max_response_tokens": 2})
    assert len(history) == 24
    assert sorted(row["samples"] for row in history) == [2] * 18 + [4] * 6


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("samples.jsonl", "history.jsonl")}


def test_a_resumed_run_has_the_files_of_the_uninterrupted_one(tmp_path):
    options = {"steps": 3, "checkpoint": {"keep_last": 3}, "eval": {"every": 2, "num_prompts": 2}}
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **options))
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for step in (2, 3):
        shutil.rmtree(killed / "checkpoints" / f"step_{step}")
    with open(killed / "history.jsonl", "a") as file:
        file.write('{"step": 4, "index"')
    train(tiny_config(tmp_path, output_dir=str(killed), **options), resume=True)
    assert contents(killed) == contents(tmp_path / "whole")
    # Where rows are no longer kept, those after the checkpoint go nevertheless.
    shutil.rmtree(killed / "checkpoints" / "step_3")
    off = options | {"log": {"samples_per_turn": 0, "history": False}}
    train(tiny_config(tmp_path, output_dir=str(killed), **off), resume=True)
    assert max(row["step"] for row in read_samples(killed)) == 2
    assert max(row["step"] for row in read_history(killed)) == 2
