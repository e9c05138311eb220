"""Experts: those of a turn's prompts, of several sources, verified, and at most so many a prompt."""

import functools
import json
import logging

import pytest
import torch
from tiny import tiny_config

from repirl.batch import EXPERT, pack
from repirl.config import ConfigError
from repirl.data.errors import DataError
from repirl.data.experts import Expert, Experts, check_matches, load_experts
from repirl.data.load import source_names
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.dataconfig import DataConfig
from repirl.distributed.world import World
from repirl.loop import train
from repirl.options import VerifierConfig
from repirl.report.log import read_metrics
from repirl.verify.share import judge_all

ROWS = [Expert((2, 3), (4, 1)), Expert((2,), (5, 1)), Expert((2, 3), (6, 7, 1)), Expert((9,), (8, 1))]


def test_matching_gives_all_experts_of_each_prompt_in_its_group():
    asked = []

    def reference(batch):
        asked.append(batch.num_sequences)
        return -batch.response_ids.float()

    experts = Experts(ROWS, seed=0, per_turn=2, reference=reference)
    # Prompt (2, 3) twice in one turn; (2, 4) has no expert.
    rollouts = pack(
        [([2, 3], [9, 1]), ([2, 3], [1]), ([2, 4], [1]), ([2], [2, 3, 1]), ([2, 3], [8, 1])], group_ids=[0, 0, 1, 2, 3]
    )
    before = experts.state_dict()["cursor"]
    batch = experts.matching(rollouts)
    assert batch.group_ids.tolist() == [0, 0, 2, 3, 3]
    assert batch.response_ids.tolist() == [4, 1, 6, 7, 1, 5, 1, 4, 1, 6, 7, 1]
    assert (batch.source == EXPERT).all()
    assert torch.equal(batch.read("prm_ref_logprob"), -batch.response_ids.float())
    # Each expert is asked for once, and the place in the data stays.
    assert asked == [3]
    assert experts.state_dict()["cursor"] == before
    assert experts.matching(rollouts.select([2])) is None


def test_a_run_whose_prompts_have_no_experts_is_refused(caplog):
    with pytest.raises(ConfigError, match="none of the 2 training prompts is the prompt of one of the 4 experts"):
        check_matches(ROWS, [(7,), (3, 2)])
    with caplog.at_level(logging.WARNING):
        check_matches(ROWS, [(2,), (9,)])
        assert not caplog.records
        check_matches(ROWS, [(2,), (7,), (8,)])
    assert "2 of 3 training prompts have no expert" in caplog.text


def files(tmp_path):
    """Two sources for the prompts 1+1= and 1+2=: by a human, right, and by a model, half of them wrong."""
    human = [{"prompt": "1+1=", "solution": ["#### 2", "1+1=2; #### 2"]}, {"prompt": "1+2=", "solution": "#### 3"}]
    model = [
        {"prompt": "1+1=", "solution": ["#### 4", "2; #### 2"], "answer": 2},
        {"prompt": "1+2=", "solution": ["3; #### 3", "#### 5"], "answer": "3"},
    ]
    for name, rows in {"human": human, "model": model}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "human.jsonl"), {"path": str(tmp_path / "model.jsonl"), "answer_column": "answer"}]


def texts(experts):
    tokenizer = build_tokenizer()
    return [(e.source, tokenizer.decode(e.response_ids).removesuffix("<eos>")) for e in experts]


def test_several_sources(tmp_path):
    experts = load_experts(DataConfig(experts=files(tmp_path)), build_tokenizer())
    assert texts(experts) == [
        *[(0, "#### 2"), (0, "1+1=2; #### 2"), (0, "#### 3")],
        *[(1, "#### 4"), (1, "2; #### 2"), (1, "3; #### 3"), (1, "#### 5")],
    ]
    names = source_names(DataConfig(experts=[*files(tmp_path), str(tmp_path / "human.jsonl")]))
    assert names == ["human.jsonl", "model.jsonl", "human.jsonl#2"]


def test_the_share_of_each_source_is_told():
    rows = [Expert((i,), (4, 1), source=i % 2) for i in range(6)]
    experts = Experts(rows, seed=0, per_turn=3, sources=["human", "model"])
    assert experts.metrics() == {}
    batch = experts.next()
    odd = sum(batch.token_ids[batch.cu_seqlens[:-1]].tolist()[i] % 2 for i in range(3)) / 3
    assert experts.metrics() == pytest.approx({"experts/share/human": 1 - odd, "experts/share/model": odd})
    rollouts = pack([((0,), (5, 1)), ((2,), (5, 1)), ((1,), (5, 1))])
    experts.matching(rollouts)
    assert experts.metrics() == {"experts/share/human": 2 / 3, "experts/share/model": 1 / 3}
    one = Experts(rows, seed=0, per_turn=3, sources=["human"])
    one.next()
    assert one.metrics() == {}


def test_the_verifier_filters_experts_and_says_how_many(tmp_path, caplog):
    _, model = files(tmp_path)
    data = DataConfig(experts=[model], verify_experts=True)
    judge = functools.partial(judge_all, VerifierConfig(), World(torch.device("cpu")))
    with caplog.at_level(logging.WARNING):
        experts = load_experts(data, build_tokenizer(), judge=judge)
    assert texts(experts) == [(0, "2; #### 2"), (0, "3; #### 3")]
    assert "model.jsonl: the verifier calls 2 of 4 solutions wrong; left out" in caplog.text
    with pytest.raises(DataError, match=r"calls all 4 expert solutions wrong"):
        load_experts(data, build_tokenizer(), judge=lambda pairs: [0.0] * len(pairs))
    # The answers of the training file are those of its solutions.
    rows = json.loads((tmp_path / "model.jsonl").read_text().splitlines()[0])
    (tmp_path / "train.jsonl").write_text(json.dumps(rows))
    data = DataConfig(train=str(tmp_path / "train.jsonl"), solution_column="solution", verify_experts=True)
    assert texts(load_experts(data, build_tokenizer(), judge=judge)) == [(0, "2; #### 2")]


def test_at_most_so_many_a_prompt_from_the_sources_in_turn(tmp_path, caplog):
    def kept(count):
        data = DataConfig(experts=files(tmp_path), max_experts_per_prompt=count)
        return texts(load_experts(data, build_tokenizer()))

    assert kept(1) == [(0, "#### 2"), (0, "#### 3")]
    assert "data.max_experts_per_prompt 1: 5 of 7 expert solutions left out" in caplog.text
    assert kept(2) == [(0, "#### 2"), (0, "#### 3"), (1, "#### 4"), (1, "3; #### 3")]
    assert len(kept(4)) == 7


def test_what_cannot_be_verified_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"verify_experts is true, but the experts of '.*human.jsonl' have no answers"
    ):
        tiny_config(tmp_path, data={"experts": files(tmp_path), "verify_experts": True})
    with pytest.raises(ConfigError, match=r"data.experts is an empty list"):
        tiny_config(tmp_path, data={"experts": []})


def test_a_run_draws_from_all_sources(tmp_path):
    """Verified, limited, and their shares in every line of the log."""
    files(tmp_path)
    names = [str(tmp_path / name) for name in ("human.jsonl", "train.jsonl")]
    experts = [{"path": name, "answer_column": "answer"} for name in names]
    human = [json.loads(line) | {"answer": "1"} for line in (tmp_path / "human.jsonl").read_text().splitlines()]
    (tmp_path / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in human))
    config = tiny_config(
        tmp_path,
        objective="sft",
        steps=2,
        data={"experts": experts, "verify_experts": True, "eval": None},
        verifier={"kind": "custom", "function": "judges:even_length"},
        irl={"experts_per_step": 8},
    )
    train(config)
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        shares = [line["experts/share/human.jsonl"], line["experts/share/train.jsonl"]]
        assert sum(shares) == pytest.approx(1.0)
        assert shares[1] > 0
