"""Solutions as text, as lists of steps and with tags are the same tokens and steps; what is no solution is refused."""

import json

import pytest
from tiny import make_model
from transformers import AutoTokenizer

from repirl.apps.solutions import Columns, as_source, check_split, chunks, encode, read_solutions, score_encoded
from repirl.config import ConfigError
from repirl.data.errors import DataError
from repirl.dataconfig import SourceConfig
from repirl.prm import PRMDescription, PromptFormat, StepRule, load_prm

STEPS = ["8+7=15", "15-3=12", "#### 12"]
TEXT = "; ".join(STEPS)


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("prm") / "prm")
    described = PRMDescription(reward="logprob", steps=StepRule(rule="separator", separator="; "))
    return load_prm(folder, device="cpu", description=described)


def read(folder, *rows, columns=None, finished=True):
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_solutions(SourceConfig(path=str(folder / "in.jsonl")), columns or Columns(), finished=finished)


def test_text_steps_and_tags_come_to_the_same(tmp_path, prm):
    tagged = " # ".join(STEPS)
    solutions = read(
        tmp_path,
        {"prompt": "8+7-3=", "response": TEXT},
        {"prompt": "8+7-3=", "steps": STEPS},
        {"prompt": "8+7-3=", "response": [{"role": "assistant", "content": TEXT}]},
        {"prompt": "8+7-3=", "response": tagged},
        {"prompt": "8+7-3=", "response": tagged + " # "},
    )
    splits = [None, None, None, "tag: # ", "tag: # "]
    encoded = [encode(one, prm, split) for one, split in zip(solutions, splits, strict=True)]
    [expected] = prm.encode([("8+7-3=", TEXT)])
    for one in encoded:
        assert (list(one.prompt), list(one.response)) == expected
        assert one.ends == (6, 14, 18)
        assert len(one) == sum(map(len, expected))
    # Longest first, in batches of at most 60 tokens.
    [steps] = prm.step_scores([("8+7-3=", TEXT)])
    for _, scored in score_encoded(prm, encoded, 60):
        assert scored.steps.tolist() == pytest.approx(steps.tolist(), abs=1e-5)


def test_columns_have_names_and_parts(tmp_path):
    row = {"q": {"text": "1+1="}, "made": {"steps": ["#### 2"], "all": "#### 2"}, "response": "x"}
    [solution] = read(tmp_path, row, columns=Columns("q.text", None, "made.steps"))
    assert (solution.prompt, solution.response, solution.row) == ("1+1=", ("#### 2",), row)
    [solution] = read(tmp_path, row, columns=Columns("q.text", "made.all"))
    assert solution.response == "#### 2"
    with pytest.raises(ConfigError, match="--response-column a and --steps-column b both name what is scored"):
        Columns("q", "a", "b")


def test_beginnings_of_responses_get_no_end_token(tmp_path, prm):
    rows = [{"prompt": "8+7-3=", "response": TEXT[:15]}, {"prompt": "8+7-3=", "steps": STEPS[:2]}]
    rows = [*rows, rows[1] | {"finished": True}]
    first, second, third = (encode(one, prm, None) for one in read(tmp_path, *rows, finished=False))
    assert list(first.response) == list(second.response[:-1]) == list(third.response[:-1])
    assert (first.ends, second.ends, third.ends) == ((6, 13), (6, 14), (6, 14))
    # Steps that go on have their separator, the last one of a whole response has an end token.
    assert prm.tokenizer.decode(second.response[-1:]) == "; "
    assert third.response[-1] in prm.ends.ids


def test_messages_go_through_the_chat_template(tmp_path):
    folder = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(folder)
    form = PromptFormat(chat_template=True, prompt_template="{prompt}", system=None)
    prm = load_prm(folder, device="cpu", description=PRMDescription(reward="logprob", prompt=form))
    rows = [
        {"prompt": [{"role": "user", "content": "4+5"}], "response": "9"},
        {"prompt": "4+5", "response": "9"},
    ]
    first, second = (encode(one, prm, None) for one in read(tmp_path, *rows))
    assert list(first.prompt) == list(second.prompt) == prm.encode([("4+5", "9")])[0][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1="}, r"line 2: there is neither 'response' nor 'steps', but \['prompt'\]"),
        ({"response": "2"}, r"line 2 has no column 'prompt' \(--prompt-column\)"),
        ({"prompt": "1+1=", "response": "2", "steps": ["2"]}, "line 2: both 'response' and 'steps' are there"),
        (
            {"prompt": "1+1=", "response": ["2", "3"]},
            "line 2: 'response' holds a list of texts: if these are the steps",
        ),
        ({"prompt": "1+1=", "response": 3}, "line 2: 'response' holds 3, expected text"),
        ({"prompt": "1+1=", "response": None}, "line 2: 'response' holds null, expected text"),
        ({"prompt": "1+1=", "steps": "2"}, "line 2: 'steps' holds '2', expected a list of steps"),
        ({"prompt": "1+1=", "steps": []}, r"line 2: 'steps' holds \[\], expected a list of steps"),
        ({"prompt": "1+1=", "steps": ["1", " "]}, "line 2: 'steps.1' holds an empty text"),
        ({"prompt": "", "response": "2"}, "line 2: 'prompt' holds an empty text"),
        ({"prompt": "1+1=", "response": "2", "finished": "no"}, "line 2: 'finished' is 'no', expected true or false"),
    ],
)
def test_rows_that_are_no_solutions_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"prompt": "1+1=", "response": "2"}, row)


def test_what_cannot_be_encoded_is_refused_by_row(tmp_path, prm, monkeypatch):
    def refused(row, split=None, finished=True):
        [solution] = read(tmp_path, row, finished=finished)
        with pytest.raises(DataError, match=r"in.jsonl, line 1: ") as error:
            encode(solution, prm, split)
        return str(error.value)

    message = {"role": "user", "content": "1+1="}
    assert "trained on prompts without a chat template" in refused({"prompt": [message], "response": "2"})
    assert "a step before a tag ' # ' is empty" in refused({"prompt": "1+1=", "response": "2 #  # 3"}, "tag: # ")
    assert "the response has no tokens" in refused({"prompt": "1+1=", "response": ""}, finished=False)
    assert "a step has the end token '<eos>'" in refused({"prompt": "1+1=", "steps": ["1<eos>", "2"]})
    monkeypatch.setattr(prm.learner.model.config, "max_position_embeddings", 20)
    assert "25 tokens (6 of the prompt, 19 of the response), but the PRM's window has 20" in refused(
        {"prompt": "8+7-3=", "response": TEXT}
    )


def test_splits_of_folders_and_of_the_hub(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n')
    [solution] = read_solutions(as_source(f"{tmp_path}:test"), Columns())
    assert solution.response == "2"
    assert as_source("owner/name:gsm8k") == SourceConfig(path="owner/name", split="gsm8k")
    assert as_source("owner/name") == SourceConfig(path="owner/name")
    (tmp_path / "a:b").write_text("")
    assert as_source(f"{tmp_path}/a:b") == SourceConfig(path=f"{tmp_path}/a:b")


def test_ways_to_split():
    for way in (None, "newline", "blank-line", "tag:ки"):
        check_split(way)
    for way in ("", "tag:", "; "):
        with pytest.raises(ConfigError, match="expected newline, blank-line or tag:TEXT"):
            check_split(way)


def test_chunks_hold_what_fits_or_one_row():
    assert chunks([3, 3, 3, 9, 1], 6) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert chunks([], 6) == []
