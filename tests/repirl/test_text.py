"""Prompts inside their templates, and what ends a response."""

import json

import pytest
from tiny import make_model, tiny_config
from tokenizers import processors

from repirl.config import ConfigError, DataConfig
from repirl.data.errors import DataError
from repirl.data.experts import load_experts
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.data.text import encode_prompt, encode_solution, find_end_tokens
from repirl.loop import train
from repirl.rollout.sampler import Sampler

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_tokenizer(template=CHATML):
    """The arithmetic tokenizer with a chat template and its tokens, as a base model of Qwen's has them: the end of turn
    is not the end token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, *tokens):
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


def test_every_end_token_ends_a_response(tmp_path):
    tokenizer, plain = chat_tokenizer(), build_tokenizer()
    turn, end, two = ids_of(tokenizer, "<|im_end|>", "<eos>", "2")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, two]}))
    chat = DataConfig(chat_template=True)
    assert find_end_tokens(chat, tokenizer).ids == (turn, end)
    found = find_end_tokens(chat, tokenizer, str(tmp_path))
    assert (found.ids, found.turn) == ((turn, end, two), turn)
    # Without the template a prompt is no turn of a chat, but its end of turn ends a response as well.
    found = find_end_tokens(DataConfig(), tokenizer, str(tmp_path))
    assert (found.ids, found.turn) == ((end, turn, two), end)
    # One end token, as most have: nothing else.
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    for model in (None, str(tmp_path), str(make_model(tmp_path / "model"))):
        assert find_end_tokens(DataConfig(), plain, model).ids == (end,)
    # A template that cannot be rendered, or ends a turn by text only.
    for template in ("{{ raise_exception('no') }}", "{{ messages[1]['content'] }}!", "{{ 1 }}", "{%"):
        assert find_end_tokens(chat, chat_tokenizer(template)).ids == (end,)


def test_end_tokens_can_be_set(tmp_path):
    tokenizer = chat_tokenizer()
    turn, end = ids_of(tokenizer, "<|im_end|>", "<eos>")
    found = find_end_tokens(DataConfig(chat_template=True, end_tokens=["<eos>", turn, "<eos>"]), tokenizer, "nowhere")
    assert (found.ids, found.turn) == ((end, turn), end)


@pytest.mark.parametrize(
    ("token", "message"),
    [("12", "'12', which is 2 tokens, not one"), ("é", "'é', which is not in the"), (999, "the id 999, but the token")],
)
def test_end_tokens_that_are_none_are_refused(token, message):
    with pytest.raises(ConfigError, match=message):
        find_end_tokens(DataConfig(end_tokens=[token]), build_tokenizer())


@pytest.mark.parametrize("found", ["2", [1, None], 999, -1, True, 1.5])
def test_a_generation_config_with_other_end_tokens_is_refused(tmp_path, found):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(ConfigError, match=r"generation_config.json.*set data.end_tokens"):
        find_end_tokens(DataConfig(), build_tokenizer(), str(tmp_path))


def test_a_damaged_generation_config_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json cannot be read"):
        find_end_tokens(DataConfig(), build_tokenizer(), str(tmp_path))


@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|>\n", "<eos>", "<|im_end|>\n<eos> \n", "<eos><eos>"])
def test_solutions_end_with_one_end_of_turn(ending):
    tokenizer = chat_tokenizer()
    ends = find_end_tokens(DataConfig(chat_template=True), tokenizer)
    assert tokenizer.decode(encode_solution("#### 2" + ending, ends, tokenizer)) == "#### 2<|im_end|>"


@pytest.mark.parametrize(
    ("solution", "message"),
    [("1<|im_end|>2", r"line 1: 'solution' goes on after the end token '<\|im_end\|>'"), ("<eos>", "an empty solution")],
)
def test_solutions_that_no_policy_could_write_are_refused(tmp_path, solution, message):
    path = write(tmp_path / "t.jsonl", {"prompt": "1", "solution": solution})
    data = DataConfig(train=path, solution_column="solution", chat_template=True)
    with pytest.raises(DataError, match=message):
        load_experts(data, chat_tokenizer())


def test_prompts_do_not_end(tmp_path):
    tokenizer = build_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", tokenizer.pad_token_id), ("<eos>", end)]
    )
    assert tokenizer("1+1=").input_ids[-1] == end
    assert tokenizer.decode(encode_prompt("1+1=", DataConfig(), tokenizer)) == "<pad>1+1="
    # What a prompt's own text ends with is its writer's business.
    assert tokenizer.decode(encode_prompt("1<eos>", DataConfig(), tokenizer)) == "<pad>1<eos>"


def test_rollouts_end_at_whatever_ends_them(tmp_path, monkeypatch):
    """A run whose policy may end with several tokens: none of them stands within a response."""
    seen = []
    judge = Sampler._judge
    monkeypatch.setattr(Sampler, "_judge", lambda self, *args: seen.extend(args[2]) or judge(self, *args))
    config = tiny_config(tmp_path, steps=1, data={"end_tokens": ["<eos>", "1", "2"]}, objective="rloo")
    train(config)
    ends = ids_of(build_tokenizer(), "<eos>", "1", "2")
    assert {r.token_ids[-1] for r in seen if r.ended} > {ends[0]}
    assert not any(token in ends for r in seen for token in r.token_ids[:-1])
