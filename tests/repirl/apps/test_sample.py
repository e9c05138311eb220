"""Fixed rollouts made by `repirl sample`, and what systems make of them."""

import json

import pytest
import torch
import yaml
from tiny import tiny_config, tiny_values
from transformers import AutoTokenizer

from repirl.apps.sample import sample
from repirl.cli import main
from repirl.config import ConfigError
from repirl.configfile import build_config, merge
from repirl.rollout.sampler import Sampler
from repirl.run import build


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_sampled_is_read_back_and_is_the_policys(tmp_path, capsys):
    """The log-probabilities that the trainer computes of the file's rollouts are the sampler's."""
    path, config = tmp_path / "out" / "rollouts.jsonl", tmp_path / "run.yaml"
    changes = {"objective": "dqo", "rollout": {"temperature": 0.7}, "data": {"trajectories": str(path)}}
    changes["verifier"] = {"kind": "custom", "function": "judges:even_length"}
    config.write_text(yaml.safe_dump(tiny_values(tmp_path, **changes)))
    assert main(["sample", "--config", str(config), "--output", str(path), "--prompts", "5"]) == 0
    rows = rows_of(path)
    assert len(rows) == 15
    right = sum(row["outcome"] for row in rows) / 15
    assert f"15 responses to 5 prompts, {right:.1%} of them right" in capsys.readouterr().out
    assert all(len(row["response_ids"]) == len(row["logprobs"]) for row in rows)
    problems = {row["prompt"]: row["answer"] for row in rows_of(tmp_path / "train.jsonl")}
    assert all(row["answer"] == str(problems[row["prompt"]]) for row in rows)
    end = AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id
    assert all(row["finished"] == (row["response_ids"][-1] == end) for row in rows)
    assert {row["finished"] for row in rows} == {True, False}
    assert {path.name, f"{path.name}.meta.json"} == {file.name for file in path.parent.iterdir()}

    run = build(build_config(tiny_values(tmp_path, **changes)))
    batch = run.next_trajectories()
    mu = {tuple(row["response_ids"]): row["logprobs"] for row in rows}
    sequences = zip(
        batch.response_ids.split(batch.response_cu_seqlens.diff().tolist()),
        batch.read("old_logprob").split(batch.response_cu_seqlens.diff().tolist()),
        strict=True,
    )
    for ids, logprob in sequences:
        torch.testing.assert_close(logprob, torch.tensor(mu[tuple(ids.tolist())]), atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.read("old_logprob"), batch.read("ref_logprob"))
    assert run.data.trajectories.num_prompts == 5
    # With the column of log-probabilities no frozen policy has to say them.
    given = merge(changes, {"data": {"trajectories": {"path": str(path), "logprob_column": "logprobs"}}})
    given["objective"], given["data"]["eval"] = "prm-offline", None
    run = build(build_config(tiny_values(tmp_path, **given)))
    assert run.reference is None
    assert run.next_trajectories().read("old_logprob").max() <= 0


def test_sampling_repeats_and_does_not_depend_on_the_batch(tmp_path):
    values = [tiny_config(tmp_path, rollout={"prompts_per_step": count, "samples_per_prompt": 2}) for count in (2, 5)]
    for config, name in zip(values, "ab", strict=True):
        counts = sample(config, tmp_path / f"{name}.jsonl", num_prompts=5)
        assert (counts.prompts, counts.responses, counts.judged) == (5, 10, 10)
    first, second = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
    for one, two in zip(first, second, strict=True):
        assert one["response_ids"] == two["response_ids"]
        assert one["logprobs"] == pytest.approx(two["logprobs"], abs=1e-4)


def test_a_killed_call_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, rollout={"prompts_per_step": 2, "samples_per_prompt": 2})
    counts = sample(config, tmp_path / "whole.jsonl", num_prompts=5)
    whole, ask, calls = (tmp_path / "whole.jsonl").read_bytes(), Sampler.ask, []

    def dying(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(self, *arguments)

    monkeypatch.setattr(Sampler, "ask", dying)
    path = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample(config, path, num_prompts=5)
    assert len(rows_of(path)) == 4
    with pytest.raises(ConfigError, match=r"holds 2 of 5 prompts; go on with it by --resume"):
        sample(config, path, num_prompts=5)
    with pytest.raises(ConfigError, match=r"was made with data.train '5 prompts.*now it is '6 prompts"):
        sample(config, path, num_prompts=6, resume=True)
    assert sample(config, path, num_prompts=5, resume=True) == counts
    assert path.read_bytes() == whole
    # Nothing is left to do.
    assert sample(config, path, num_prompts=5, resume=True) == counts
    assert len(calls) == 4


def test_without_answers_there_are_no_outcomes(tmp_path):
    changes = {"loss": {"outcome_coefficient": 0.0}, "irl": {"use_outcome": False}}
    config = tiny_config(tmp_path, data={"answer_column": None, "eval": None}, **changes)
    assert sample(config, tmp_path / "a.jsonl", num_prompts=1).judged == 0
    assert {row["outcome"] for row in rows_of(tmp_path / "a.jsonl")} == {None}


def test_what_cannot_be_sampled_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "a.jsonl").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"a.jsonl' exists, and .* does not say that `repirl sample` made it"):
            sample(config, tmp_path / "a.jsonl", resume=resume)
    assert (tmp_path / "a.jsonl").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"train.jsonl' is an input, which would be lost"):
        sample(config, tmp_path / "train.jsonl")
    no_prompts = tiny_config(tmp_path, objective="dpo", data={"train": None})
    with pytest.raises(ConfigError, match=r"set data\.train"):
        sample(no_prompts, tmp_path / "b.jsonl")
