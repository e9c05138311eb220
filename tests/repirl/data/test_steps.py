"""Labelled steps: the three formats, what is refused, and how labels become a stream."""

import json
import math

import pytest

from repirl.configfile import build_config
from repirl.data.errors import DataError
from repirl.data.steps import LabelledSteps, load_steps
from repirl.data.tasks.arithmetic import build_tokenizer

TOKENIZER = build_tokenizer()
END = TOKENIZER.eos_token_id
ROW = {"prompt": "8+7-3=", "completions": ["8+7=15", "15-3=11", "#### 11"], "labels": [True, False, False]}
SHEPHERD = {
    "input": "8+7-3= Step 1: 8+7=15 ки\nStep 2: 15-3=11 ки\nStep 3: #### 11 ки",
    "label": "8+7-3= Step 1: 8+7=15 +\nStep 2: 15-3=11 -\nStep 3: #### 11 -",
    "task": "GSM8K",
}


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": False}


def prm800k(steps, finish_reason="solution"):
    return {
        "labeler": "a",
        "question": {"problem": "8+7-3=", "ground_truth_answer": "12"},
        "label": {"steps": steps, "total_time": 1, "finish_reason": finish_reason},
    }


def step(*completions, chosen=None, human=None):
    return {"completions": list(completions), "human_completion": human, "chosen_completion": chosen}


def load(tmp_path, *rows, split="train", data=None, **options):
    file = tmp_path / "steps.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"steps": {"path": str(file), **options}, "step_separator": "; ", **(data or {})}
    section["eval_steps"] = section["steps"]
    values = {"objective": "math-shepherd", "output_dir": "out", "steps": 1, "policy": {"model": "m"}, "data": section}
    return load_steps(build_config(values).data, TOKENIZER, split)


def texts(row):
    """The steps of a row, as its ends cut its tokens."""
    starts = [0, *(end + 1 for end in row.ends)]
    return [TOKENIZER.decode(row.response_ids[a : b + 1]) for a, b in zip(starts, row.ends, strict=False)]


def test_trl_rows(tmp_path):
    soft = {**ROW, "soft_labels": [0.75, 0.25, 0]}
    for split in ("train", "eval"):
        [row] = load(tmp_path, soft, split=split)
        assert texts(row) == ["8+7=15; ", "15-3=11; ", "#### 11<eos>"]
        assert row.labels == (1.0, 0.0, 0.0)
        assert TOKENIZER.decode(row.prompt_ids) == "8+7-3="
    assert load(tmp_path, soft, labels_column="soft_labels")[0].labels == (0.75, 0.25, 0.0)
    # A solution that is not over ends with the separator, as the other steps do.
    [row] = load(tmp_path, ROW, finished=False)
    assert texts(row)[-1] == "#### 11; "
    assert load(tmp_path, {**ROW, "finished": False}) == [row]
    # A step without a label has no end among the labelled.
    [row] = load(tmp_path, {**ROW, "labels": [None, False, None]})
    assert texts(row) == ["8+7=15; 15-3=11; "]
    assert row.labels == (0.0,)


def test_math_shepherds_rows(tmp_path):
    [row] = load(tmp_path, SHEPHERD)
    assert TOKENIZER.decode(row.prompt_ids) == "8+7-3="
    assert row.labels == (1.0, 0.0, 0.0)
    assert TOKENIZER.decode(row.response_ids).endswith("#### 11<eos>")
    assert [TOKENIZER.decode([row.response_ids[end]]) for end in row.ends] == ["; ", "; ", "<eos>"]
    # Another tag.
    other = {key: value.replace("ки", "<t>") for key, value in SHEPHERD.items()}
    assert load(tmp_path, other, tag="<t>") == [row]


def test_prm800ks_rows(tmp_path):
    right, wrong = completion("8+7=15", 1), completion("8+7=14", -1)
    steps = [
        step(wrong, right, chosen=1),
        step(completion("15-3=12", 0), chosen=0),
        step(human={"text": "#### 12", "rating": None}),
    ]
    [row] = load(tmp_path, prm800k(steps))
    assert texts(row) == ["8+7=15; ", "15-3=12; ", "#### 12<eos>"]
    assert row.labels == (1.0, 1.0, 1.0)
    # Where none was chosen, each alternative ends a response; the steps before are labelled once.
    ways = step(completion("15-3=11", -1), completion("15-3=10", -1), completion("15-3=12", None))
    rows = load(tmp_path, prm800k([steps[0], ways], "found_error"))
    assert [(texts(row), row.labels) for row in rows] == [
        (["8+7=15; ", "15-3=11; "], (1.0, 0.0)),
        (["8+7=15; 15-3=10; "], (0.0,)),
    ]


def refusals():
    yield {"prompt": "1="}, {}, r"line 1 has no column 'completions' \(data.steps.steps_column\)"
    yield {**ROW, "labels": [True]}, {}, "'completions' has 3 steps, but 'labels' has 1 labels"
    yield {**ROW, "completions": "8+7"}, {}, r"'completions' holds '8\+7', expected a list"
    yield {**ROW, "labels": []}, {}, r"'labels' holds \[\], expected a list"
    yield {**ROW, "completions": ["8+7=15", " ", "1"]}, {}, r"'completions.1' holds an empty text"
    yield {**ROW, "labels": [True, 1.5, False]}, {}, r"'labels.1' is 1.5, expected true, false, a number from 0 to 1"
    yield {**ROW, "labels": [True, math.nan, False]}, {}, r"'labels.1' is nan, expected true"
    yield {**ROW, "labels": [True, "no", False]}, {}, r"'labels.1' is 'no', expected true"
    yield {**ROW, "finished": 1}, {}, r"'finished' is 1, expected true or false"
    yield {**ROW, "labels": [None] * 3}, {}, "no step of any response has a label"
    yield {**ROW, "completions": ["8", "7<eos>1", "1"]}, {}, "a step has the end token '<eos>'"
    yield {**ROW, "prompt": 3}, {}, "'prompt' holds 3, expected text"
    yield SHEPHERD, {"tag": "<t>"}, "'input' has no tag '<t>' behind its steps"
    yield {**SHEPHERD, "input": SHEPHERD["input"] + " more"}, {}, "'input' goes on after the last tag 'ки': 'more'"
    yield {**SHEPHERD, "label": SHEPHERD["label"][:-1]}, {}, r"differ at step 2 \(from 0\)"
    yield {**SHEPHERD, "label": SHEPHERD["label"] + "."}, {}, "'label' goes on after the last sign: '.'"
    yield {**SHEPHERD, "label": SHEPHERD["label"].replace("15-3", "15-4")}, {}, r"differ at step 1 \(from 0\)"
    yield {"input": "1= ки", "label": "1= +"}, {}, "no question with 'Step 1:' behind it"
    yield {"input": "1= Step 1: 1 ки ки", "label": "1= Step 1: 1 + +"}, {}, r"step 1 \(from 0\) of 'input' is empty"
    yield ROW, {"format": "math_shepherd"}, "has no column 'input'"
    yield prm800k([3]), {}, "'label.steps.0' is 3, expected an object with completions"
    yield prm800k([step(completion("1", 2), chosen=0)]), {}, "'label.steps.0.completions.0.rating' is 2, expected"
    yield prm800k([step(completion("1", 1), chosen=4)]), {}, "chosen_completion' is 4, expected one of 1 places"
    yield prm800k([step(completion("", 1), chosen=0)]), {}, "'label.steps.0.completions.0.text' holds an empty text"


@pytest.mark.parametrize(("row", "options", "message"), [*refusals()])
def test_what_cannot_be_used_is_refused_by_row(tmp_path, row, options, message):
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, row, **options)
    assert "steps.jsonl" in str(error.value)


def test_overlong_responses(tmp_path):
    with pytest.raises(DataError, match=r"line 1: the response has 19 tokens, data.max_expert_tokens is 9"):
        load(tmp_path, ROW, data={"max_expert_tokens": 9})
    with pytest.raises(DataError, match="no row is left, 1 were over"):
        load(tmp_path, ROW, data={"max_expert_tokens": 9, "overlong": "drop"})


def test_responses_without_labels_are_counted(tmp_path, caplog):
    assert len(load(tmp_path, {**ROW, "labels": [None] * 3}, ROW)) == 1
    assert "left out 1 responses without a single label" in caplog.text


def test_labels_stand_on_the_last_tokens(tmp_path):
    rows = load(tmp_path, ROW, {**ROW, "labels": [None, 0.5, 1]})
    steps = LabelledSteps(rows, seed=0, per_turn=2)
    batch = steps.next()
    labels = batch.read("step_label")
    assert batch.response_ids[~labels.isnan()].tolist().count(END) == 2
    assert sorted(labels[~labels.isnan()].tolist()) == [0.0, 0.0, 0.5, 1.0, 1.0]
    # As the place in the data is saved, another run goes on with the same rows.
    other = LabelledSteps(rows * 3, seed=0, per_turn=2)
    state = other.state_dict()
    first = other.next().token_ids
    other.next()
    other.load_state_dict(state)
    assert other.next().token_ids.equal(first)
    with pytest.raises(ValueError, match="without labelled steps"):
        other.load_state_dict(None)
