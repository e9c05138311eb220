"""Prompts, experts and the order they come in."""

import json

import pytest
import torch
from tiny import make_model

from repirl.batch import EXPERT
from repirl.config import ConfigError
from repirl.data.experts import MAX_SAVED_CACHE_BYTES, Expert, Experts, load_experts
from repirl.data.prompts import Cursor, DataError, encode_prompt, load_prompts
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.dataconfig import DataConfig, ExpertFileConfig
from repirl.models import load_tokenizer


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_and_experts_of_one_file(tmp_path):
    tokenizer = build_tokenizer()
    path = write(
        tmp_path / "t.jsonl",
        {"prompt": "1+2=", "answer": 3, "solution": "1+2=3; #### 3"},
        {"prompt": "4-1=", "answer": "3", "solution": ["#### 3", "4-1=3; #### 3"]},
    )
    data = DataConfig(train=path, solution_column="solution")
    prompts = load_prompts(data, tokenizer, "train")
    assert [tokenizer.decode(p.token_ids) for p in prompts.prompts] == ["1+2=", "4-1="]
    assert [p.answer for p in prompts.prompts] == ["3", "3"]
    experts = load_experts(data, tokenizer)
    assert [tokenizer.decode(e.response_ids) for e in experts] == [
        "1+2=3; #### 3<eos>",
        "#### 3<eos>",
        "4-1=3; #### 3<eos>",
    ]
    assert experts[1].prompt_ids == experts[2].prompt_ids == prompts[1].token_ids


def test_experts_of_a_file_of_their_own(tmp_path):
    tokenizer = build_tokenizer()
    path = write(tmp_path / "e.jsonl", {"q": "1+1=", "a": "<<1+1>>#### 2"})
    data = DataConfig(
        experts=ExpertFileConfig(path=path, prompt_column="q", solution_column="a"), solution_remove="<<[^>]*>>"
    )
    [expert] = load_experts(data, tokenizer)
    assert tokenizer.decode(expert.prompt_ids) == "1+1="
    assert tokenizer.decode(expert.response_ids) == "#### 2<eos>"


def test_overlong_rows_are_an_error_or_counted(tmp_path, caplog):
    tokenizer = build_tokenizer()
    rows = [{"prompt": "1" * n, "answer": "1", "solution": "1" * (6 - n)} for n in (1, 5, 3)]
    path = write(tmp_path / "t.jsonl", *rows)
    with pytest.raises(DataError, match=r"line 2: the prompt has 5 tokens, data.max_prompt_tokens is 4"):
        load_prompts(DataConfig(train=path, max_prompt_tokens=4), tokenizer, "train")
    kept = load_prompts(DataConfig(train=path, max_prompt_tokens=4, overlong="drop"), tokenizer, "train")
    assert ([p.index for p in kept.prompts], kept.num_dropped) == ([0, 2], 1)
    assert "dropped 1 overlong rows, kept 2" in caplog.text
    # The end token counts: a solution of 5 characters has 6 tokens.
    data = DataConfig(train=path, solution_column="solution", max_expert_tokens=5)
    with pytest.raises(DataError, match=r"line 1: the solution has 6 tokens"):
        load_experts(data, tokenizer)


def test_chat_template_and_prompt_template(tmp_path):
    tokenizer = load_tokenizer(str(make_model(tmp_path / "m")))
    plain = DataConfig(train="t", prompt_template="1+{prompt}=")
    assert tokenizer.decode(encode_prompt("{2}", plain, tokenizer)).startswith("1+")
    assert tokenizer.decode(encode_prompt("2", plain, tokenizer)) == "1+2="
    chat = DataConfig(train="t", chat_template=True, system="0")
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt("2", chat, tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}+{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    assert tokenizer.decode(encode_prompt("2", chat, tokenizer)) == "0+2+="


def test_solutions_must_be_text(tmp_path):
    path = write(tmp_path / "t.jsonl", {"prompt": "1", "answer": "1", "solution": {"steps": 3}})
    with pytest.raises(DataError, match="expected text"):
        load_experts(DataConfig(train=path, solution_column="solution"), build_tokenizer())


def test_cursor_visits_every_row_once_an_epoch_and_resumes():
    cursor = Cursor(10, seed=3)
    first, second = cursor.next(10), cursor.next(10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    # Another batch size goes through the same order.
    other = Cursor(10, seed=3)
    assert [i for _ in range(5) for i in other.next(4)] == first + second
    state = other.state_dict()
    following = other.next(7)
    again = Cursor(10, seed=3)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.next(7) == following
    assert Cursor(10, seed=4).next(10) != first
    # More than an epoch in one go.
    assert sorted(Cursor(3, seed=0).next(7)[:6]) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ConfigError, match="10 rows with seed 3, now there are 9 rows"):
        Cursor(9, seed=3).load_state_dict(state)


class Asked:
    """A reference that says of a token its number, and counts what it is asked for."""

    def __init__(self):
        self.rows = []

    def __call__(self, batch):
        self.rows += (-1 - batch.group_ids).tolist()
        return -batch.response_ids.float()


ROWS = [Expert((2, 3), tuple(range(4 + i, 8 + 2 * i))) for i in range(5)]


def make_experts(reference=None):
    return Experts(ROWS, seed=1, per_turn=3, reference=reference)


def test_experts_come_with_what_the_reference_says_of_each():
    plain, asked = make_experts(), Asked()
    experts = make_experts(asked)
    assert len(experts) == 5
    for _ in range(5):
        batch, other = experts.next(), plain.next()
        assert torch.equal(batch.token_ids, other.token_ids)
        assert (batch.source == EXPERT).all()
        assert not other.streams
        assert torch.equal(batch.read("prm_ref_logprob"), -batch.response_ids.float())
    # Fifteen were taken, five were asked for.
    assert sorted(asked.rows) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("room", ["all of it", "a byte too little"])
def test_a_cache_over_the_limit_is_left_out_and_computed_anew(monkeypatch, room):
    num_bytes = 4 * sum(len(row.response_ids) for row in ROWS)
    assert num_bytes < MAX_SAVED_CACHE_BYTES
    is_saved = room == "all of it"
    monkeypatch.setattr("repirl.data.experts.MAX_SAVED_CACHE_BYTES", num_bytes - (not is_saved))
    before, after = make_experts(Asked()), make_experts(Asked())
    for _ in range(2):
        before.next()
    state = before.state_dict()
    assert sorted(state["reference"]) == (list(range(5)) if is_saved else [])
    after.load_state_dict(state)
    # Both go on in the same order with the same values.
    for _ in range(4):
        ours, theirs = after.next(), before.next()
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.read("prm_ref_logprob"), theirs.read("prm_ref_logprob"))
    assert len(before.reference.rows) == 5
    assert sorted(after.reference.rows) == ([] if is_saved else list(range(5)))


def test_experts_of_another_run_are_refused():
    with pytest.raises(ConfigError, match="a run without experts"):
        make_experts().load_state_dict(None)
    state = make_experts().state_dict()
    with pytest.raises(ConfigError, match="5 rows with seed 1, now there are 4 rows"):
        Experts(ROWS[:4], seed=1, per_turn=3).load_state_dict(state)
