"""What the columns of a row may hold."""

import json

import pytest

from repirl.data.errors import DataError
from repirl.data.experts import load_experts
from repirl.data.prompts import load_prompts
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.dataconfig import DataConfig

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | length }}+{{ m['content'] }}-{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def load(tmp_path, row, solutions=False, **options):
    """The row read as the second of a file: its prompt and answer, or its solutions, as text."""
    good = {"prompt": "1", "answer": "1", "solution": "1"}
    for option in ("prompt_column", "answer_column", "solution_column"):
        column = good
        *parents, last = options.get(option, option.removesuffix("_column")).split(".")
        for parent in parents:
            column = column.setdefault(parent, {})
        column.setdefault(last, "1")
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({"prompt": "1", "answer": "1", **row}) + "\n")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = DataConfig(train=str(path), **{"solution_column": "solution", **options})
    if solutions:
        return [tokenizer.decode(e.response_ids).removesuffix("<eos>") for e in load_experts(data, tokenizer)[1:]]
    prompt = load_prompts(data, tokenizer, "train")[1]
    return tokenizer.decode(prompt.token_ids), prompt.answer


USER = {"role": "user", "content": "2+2"}
SYSTEM = {"role": "system", "content": "3"}


def test_messages_go_through_the_chat_template(tmp_path):
    chat = {"chat_template": True}
    assert load(tmp_path, {"prompt": [SYSTEM, USER]}, **chat)[0] == "6+3-4+2+2-="
    assert load(tmp_path, {"prompt": [USER]}, system="0", **chat)[0] == "6+0-4+2+2-="
    # A table's rows have a column for every key.
    assert load(tmp_path, {"prompt": [{**USER, "tool_calls": None}]}, **chat)[0] == "4+2+2-="


def test_what_verl_and_trl_write_is_read_by_dotted_columns(tmp_path):
    row = {"prompt": [USER], "reward_model": {"style": "rule", "ground_truth": "4"}}
    options = {"chat_template": True, "answer_column": "reward_model.ground_truth"}
    assert load(tmp_path, row, **options) == ("4+2+2-=", "4")
    # A column of that very name comes first.
    assert load(tmp_path, {**row, "reward_model.ground_truth": 5}, **options)[1] == "5"
    row = {"prompt": [USER], "completion": [{"role": "assistant", "content": "4"}]}
    options = {"chat_template": True, "solution_column": "completion"}
    assert load(tmp_path, row, solutions=True, **options) == ["4"]
    assert load(tmp_path, {**row, "completion": [row["completion"]] * 2}, solutions=True, **options) == ["4", "4"]
    row = {"messages": [USER, {"role": "assistant", "content": "5"}]}
    options = {"prompt_column": "messages.0.content", "solution_column": "messages.1.content"}
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row))
    [expert] = load_experts(DataConfig(train=str(path), **options), build_tokenizer())
    assert [build_tokenizer().decode(ids) for ids in (expert.prompt_ids, expert.response_ids)] == ["2+2", "5<eos>"]


@pytest.mark.parametrize(
    ("answer", "text"), [(3, "3"), (-0.5, "-0.5"), (72.0, "72.0"), (1e-7, "0.0000001"), ("7 apples", "7 apples")]
)
def test_answers_are_text_or_numbers(tmp_path, answer, text):
    assert load(tmp_path, {"answer": answer})[1] == text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "'answer' is null, expected an answer"),
        (True, "'answer' is True, expected an answer"),
        (float("nan"), "'answer' is nan, expected an answer: text or a finite number"),
        (float("inf"), "'answer' is inf"),
        ("", "'answer' holds an empty text"),
        (" \n", "'answer' holds an empty text"),
        (["4"], "'answer' is ['4'], expected"),
        ({"style": "rule", "ground_truth": "4"}, "name one of its parts: answer.ground_truth, answer.style"),
        ("\ud800", "'answer' holds half a character"),
    ],
)
def test_other_answers_are_refused_by_row(tmp_path, answer, message):
    with pytest.raises(DataError) as error:
        load(tmp_path, {"answer": answer})
    assert "t.jsonl, line 3: 'answer' " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "'prompt' holds null, expected text or a list of messages"),
        (5, "'prompt' holds 5, expected"),
        (10**4000, "'prompt' holds a very long number, expected"),
        (False, "'prompt' holds False, expected"),
        ({"text": "1"}, "name one of its parts: prompt.text"),
        ("", "'prompt' holds an empty text"),
        ("1\udfff", "'prompt' holds half a character ('\\udfff' at 1)"),
        ([], "'prompt' holds an empty list"),
        (["1"], "'prompt.0' holds '1', expected a message with role and content"),
        ([{"role": "user"}], "'prompt.0' is a message with ['role'], expected role and content"),
        ([{**USER, "name": "1"}], "'prompt.0' is a message with ['content', 'name', 'role']"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "'prompt.0.content' holds [{'type': 'text'}], expected text",
        ),
        ([{"role": 1, "content": "1"}], "'prompt.0.role' holds 1, expected text"),
        ([USER, {"role": "assistant", "content": "4"}], "end with the assistant's"),
        ([SYSTEM, USER], "leave out data.system"),
    ],
)
def test_other_prompts_are_refused_by_row(tmp_path, prompt, message):
    with pytest.raises(DataError) as error:
        load(tmp_path, {"prompt": prompt}, chat_template=True, system="0")
    assert "t.jsonl, line 3: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_messages_need_a_chat_template(tmp_path):
    with pytest.raises(DataError, match=r"line 3: messages need the chat template .*set data.chat_template: true"):
        load(tmp_path, {"prompt": [USER]})
    with pytest.raises(DataError, match=r"line 3: data.prompt_template is for prompts that are text"):
        load(tmp_path, {"prompt": [USER]}, chat_template=True, prompt_template="1{prompt}")


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        (None, "'solution' holds null, expected text"),
        (4, "'solution' holds 4, expected text"),
        ({"steps": "3"}, "expected text; name one of its parts: solution.steps"),
        ([], "'solution' is an empty list"),
        (["1", ""], "'solution.1' holds an empty text"),
        (["1", None], "'solution.1' holds null"),
        ([USER], "'solution' holds messages of ['user'], expected one, the assistant's"),
        ("\ud800", "'solution' holds half a character"),
    ],
)
def test_other_solutions_are_refused_by_row(tmp_path, solution, message):
    with pytest.raises(DataError) as error:
        load(tmp_path, {"solution": solution}, solutions=True)
    assert "t.jsonl, line 3: " in str(error.value)
    assert message in str(error.value)


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with pytest.raises(DataError) as error:
        load(tmp_path, {"reward_model": {"truth": "4"}}, answer_column="reward_model.ground_truth")
    assert "line 3 has no column 'reward_model.ground_truth' (data.answer_column); it has [" in str(error.value)
    assert "'reward_model.truth'" in str(error.value)
