"""Prompts inside their templates, and what ends a response."""

import json

import pytest
import yaml
from tiny import make_model, tiny_config, tiny_values
from tokenizers import processors

from repirl.cli import main
from repirl.config import ConfigError
from repirl.data.errors import DataError
from repirl.data.experts import load_experts
from repirl.data.prompts import load_prompts
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.data.text import encode_prompt, encode_solution, find_end_tokens
from repirl.dataconfig import DataConfig
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
    ends = find_end_tokens(chat, tokenizer, str(tmp_path))
    assert (ends.ids, ends.turn) == ((turn, end, two), turn)
    # Without the template a prompt is no turn of a chat, but its end of turn ends a response as well.
    ends = find_end_tokens(DataConfig(), tokenizer, str(tmp_path))
    assert (ends.ids, ends.turn) == ((end, turn, two), end)
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
    ends = find_end_tokens(DataConfig(chat_template=True, end_tokens=["<eos>", turn, "<eos>"]), tokenizer, "nowhere")
    assert (ends.ids, ends.turn) == ((end, turn), end)


@pytest.mark.parametrize(
    ("token", "message"),
    [("12", "'12', which is 2 tokens, not one"), ("é", "'é', which is not in the"), (999, "the id 999, but the token")],
)
def test_end_tokens_that_are_none_are_refused(token, message):
    with pytest.raises(ConfigError, match=message):
        find_end_tokens(DataConfig(end_tokens=[token]), build_tokenizer())


@pytest.mark.parametrize("eos_token_id", ["2", [1, None], 999, -1, True, 1.5])
def test_a_generation_config_with_other_end_tokens_is_refused(tmp_path, eos_token_id):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
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
    [
        ("1<|im_end|>2", r"line 1: 'solution' goes on after the end token '<\|im_end\|>'"),
        ("<eos>", "an empty response"),
    ],
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


def test_chat_templates_take_variables():
    thinking = "{% if enable_thinking is defined and enable_thinking is false %}0{% endif %}="
    tokenizer = chat_tokenizer(CHATML.replace("assistant\n", "assistant\n" + thinking))
    plain, off = (
        DataConfig(chat_template=True, chat_template_kwargs=kwargs) for kwargs in ({}, {"enable_thinking": False})
    )
    assert tokenizer.decode(encode_prompt("1", plain, tokenizer)).endswith("=")
    assert tokenizer.decode(encode_prompt("1", off, tokenizer)).endswith("0=")


SEVERAL = {"a": CHATML, "b": CHATML}
BODY = "{{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{%", {}, r"not valid Jinja: .*\(line 1\)"),
        ("{{ 1 | nothing }}", {}, "not valid Jinja: No filter named 'nothing'"),
        (BODY + "{{ raise_exception('only saints may ask') }}", {}, r"fails \(only saints may ask\)$"),
        (BODY + "{{ raise_exception('no system') }}", {"system": "2"}, r"fails \(no system\); leave out data.system"),
        (BODY, {"system": "2"}, "leaves out data.system: it does not support the role 'system'"),
        ("{{ messages[0]['role'] }}", {}, "leaves out the prompt"),
        (BODY + "{{ messages[0].text.more }}", {}, "fails .*has no attribute 'text'"),
        (BODY + "{{ 1 / 0 }}", {}, r"fails \(division by zero\)"),
        (BODY + "{{ date_string + '.' }}", {}, "prints 'date_string', which nothing sets: set data.chat_template_kw"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}, "more than 0.2 seconds"),
        (SEVERAL, {}, r"the chat templates \['a', 'b'\] and none of them is 'default'"),
        (None, {}, "has no chat template; use data.prompt_template"),
        (CHATML, {"chat_template_kwargs": {"enable_thinkin": 0}}, "'enable_thinkin', which .* reads no variables"),
        (BODY + "{% if x %}{{ x }}{% endif %}", {"chat_template_kwargs": {"y": 0}}, r"reads \['x'\]"),
        (CHATML, {"chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which the chat template does not read"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_by_row(tmp_path, monkeypatch, template, options, message):
    monkeypatch.setattr("repirl.data.template._SECONDS", 0.2)
    path = write(tmp_path / "t.jsonl", {"prompt": "1+1", "answer": "2"})
    with pytest.raises(DataError, match=message) as error:
        load_prompts(DataConfig(train=path, chat_template=True, **options), chat_tokenizer(template), "train")
    assert "t.jsonl, line 1: " in str(error.value)
    assert "\n" not in str(error.value)


def test_templates_with_unset_variables_that_do_no_harm():
    template = "{{ bos_token }}{{ x | default('1') }}{% if y %}{{ y }}{% endif %}{% if tools %}2{% endif %}" + BODY
    tokenizer = chat_tokenizer(template + "{% generation %}={% endgeneration %}")
    assert tokenizer.decode(encode_prompt("3", DataConfig(chat_template=True), tokenizer)) == "13="
    # A template under the name that is taken unless another is asked for.
    tokenizer.chat_template = {"default": BODY, "tool_use": "{{ no_such_thing }}"}
    assert tokenizer.decode(encode_prompt("3", DataConfig(chat_template=True), tokenizer)) == "3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "be good"}, "data.system is 'be good', but data.chat_template is false"),
        ({"chat_template_kwargs": {"a": 1}}, "data.chat_template_kwargs is {'a': 1}, but data.chat_template is false"),
        ({"prompt_template": "Question: {question}"}, "which has no {prompt}"),
        ({"end_tokens": []}, "'data.end_tokens'"),
        ({"end_tokens": [True]}, "'data.end_tokens"),
        ({"solution_remove": "("}, "data.solution_remove '\\(' is no regular expression"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, data=options)


def test_a_dry_run_shows_what_the_models_will_see(tmp_path, capsys):
    values = tiny_values(tmp_path, data={"prompt_template": "1+{prompt}"})
    row = {"prompt": "2=", "answer": "see the figure", "solution": "3<eos>"}
    with open(values["data"]["eval"], "a") as file:
        file.write(json.dumps(row | {"answer": r"\frac{1}{2}"}) + "\n" + json.dumps(row | {"answer": "$"}) + "\n")
    write(tmp_path / "train.jsonl", row | {"answer": 3})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "first prompt: '1+2='",
        "first solution: '3<eos>'",
        "a response ends with '<eos>'",
        "first answer: '3'",
        "answers: the verifier can read 26 of 27; the first that it cannot is '$' (row 25, from 0)",
    ):
        assert line in lines
    assert main(["train", "--config", str(path), "--dry-run", "--verifier.kind=custom", "--verifier.function=a:b"]) == 0
    assert "answers: 27, for a:b to judge" in capsys.readouterr().out
