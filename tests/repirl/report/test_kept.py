"""Which kept responses a page shows, and their steps."""

import json
import math

import pytest
import torch

from repirl.data.split import segment
from repirl.report.kept import kept_samples, spread, step_explanation, steps_of
from repirl.report.runs import RunRecord


def row(step, kind="train", index=0, prompt="1+1=", tokens=("2", "<eos>"), **changes):
    return {
        "step": step,
        "kind": kind,
        "index": index,
        "prompt": prompt,
        "response": "".join(tokens[:-1]),
        "token_texts": list(tokens),
        "token_rewards": [-0.5] * len(tokens),
        "token_logprobs": [-0.1] * len(tokens),
        "outcome": 1.0,
        "length": len(tokens),
        "end_reason": "end",
    } | changes


def run(folder, name, rows, options=()):
    place = folder / name
    place.mkdir()
    (place / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    configuration = {"objective": "repirl", "data.step_separator": "; "} | dict(options)
    return RunRecord(name, place, [{"step": 1}], [], configuration)


def test_responses_to_one_prompt_in_one_turn_stand_beside_each_other(tmp_path):
    first = run(tmp_path, "a", [row(1), row(1), row(2, prompt="3+3=")])
    second = run(tmp_path, "b", [row(1, outcome=0.0), row(2, prompt="4+4=")])
    cards, remarks = kept_samples([first, second], 40)
    assert [[v["name"] for v in card["variants"]] for card in cards] == [["a", "b"], ["a"], ["a"], ["b"]]
    assert [v["correct"] for v in cards[0]["variants"]] == [1.0, 0.0]
    assert cards[0]["tags"]["Verdict"] == ["right", "wrong"]
    assert cards[0]["tags"]["Run"] == ["a", "b"]
    assert remarks == []


def test_a_run_without_responses_is_said(tmp_path):
    cards, remarks = kept_samples([RunRecord("a", tmp_path, [])], 40)
    assert cards == []
    assert remarks == ["a kept no sampled responses (samples.jsonl)."]


def test_many_responses_are_chosen_from_the_whole_run_and_that_is_said(tmp_path):
    rows = [row(step, kind, index) for step in range(1, 501) for kind in ("train", "eval") for index in range(4)]
    cards, remarks = kept_samples([run(tmp_path, "a", rows)], 40)
    steps = [int(card["tags"]["Turn"][0]) for card in cards]
    assert len(cards) == 40
    assert (min(steps), max(steps)) == (1, 500)
    assert {card["tags"]["Sampled in"][0] for card in cards} == {"training", "evaluation"}
    assert remarks == ["a: 40 of 4000 kept responses are on this page."]


def test_rotated_files_are_read(tmp_path):
    record = run(tmp_path, "a", [row(2)])
    (record.folder / "samples.1.jsonl").write_text(json.dumps(row(1)) + "\n")
    assert [card["tags"]["Turn"] for card in kept_samples([record], 40)[0]] == [["1"], ["2"]]


def test_odd_rows_are_tolerated(tmp_path):
    rows = [
        row(1, token_rewards=None, outcome=None),
        row(2, token_rewards=[None, -1.0], outcome=0.25),
        row(3, end_reason="length"),
        {"step": 4, "kind": "train"},
    ]
    cards, _ = kept_samples([run(tmp_path, "a", rows)], 40)
    variants = [card["variants"][0] for card in cards]
    assert variants[0]["rewards"] is None
    assert "no PRM scored it" in variants[0]["note"]
    assert math.isnan(variants[1]["rewards"][0])
    assert [card["tags"]["Verdict"] for card in cards] == [["not verified"], ["in between"], ["right"]]
    assert "cut off at the length limit" in variants[2]["note"]


def test_steps_are_those_that_repirl_score_makes():
    from repirl.data.tasks.arithmetic import build_tokenizer

    tokenizer = build_tokenizer()
    text = "24+2=26; 26-6=20; ; 20+1=21; #### 21"
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    tokens = [tokenizer.decode([i]) for i in ids]
    rewards = torch.linspace(-3, 1, len(ids), dtype=torch.float64)
    for end, texts, values in ((True, tokens, rewards), (False, tokens[:-1], rewards[:-1])):
        expected = segment(ids if end else ids[:-1], "; ", tokenizer, ended=end)
        steps = steps_of(texts, values.tolist(), "; ", False, end)
        assert [step["end"] - 1 for step in steps] == list(expected.ends)
        means = [values[step["start"] : step["end"]].mean().item() for step in steps]
        assert [step["score"] for step in steps] == pytest.approx(means)
        ends = steps_of(texts, values.tolist(), "; ", True, end)
        assert [step["score"] for step in ends] == pytest.approx(values[list(expected.ends)].sigmoid().tolist())


def test_steps_of_short_responses():
    assert steps_of(["<eos>"], [-1.0], "\n", False, True) == [{"start": 0, "end": 1, "score": -1.0}]
    assert [s["end"] for s in steps_of(["a\n", "\n", "b\nc\n", "d"], [0.0] * 4, "\n", False, False)] == [2, 3, 4]


def test_how_steps_are_scored_is_said(tmp_path):
    first = RunRecord("a", tmp_path, [], [], {"objective": "repirl", "data.step_separator": "; "})
    options = {"objective": "rloo-prm", "data.step_separator": "\n", "prm.model": str(tmp_path)}
    second = RunRecord("b", tmp_path, [], [], options)
    assert step_explanation([first]) == 'A step ends with "; " and scores as the mean of its tokens\' rewards.'
    assert step_explanation([second]).startswith('A step ends with "\\n" and scores as the mean')
    (tmp_path / "config.json").write_text(json.dumps({"repirl": {"steps": {"score": "end"}}}))
    assert "as the chance that its last token's reward stands for" in step_explanation([second])
    assert step_explanation([first, second]).startswith("a: a step ends")


def test_spread():
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(list(range(101)), 3) == [0, 50, 100]
    assert spread([4, 9], 1) == [9]
