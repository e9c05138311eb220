"""Preference pairs in TRL's formats, what is refused, and the order they come in."""

import json

import pytest

from repirl.config import ConfigError
from repirl.data.errors import DataError
from repirl.data.pairs import Pair, Pairs, load_pairs
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.dataconfig import DataConfig

TEMPLATE = (
    "{% for m in messages %}{{ '=' if m['role'] == 'user' else '-' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '-' }}{% endif %}"
)
USER, RIGHT, WRONG = ({"role": r, "content": c} for r, c in [("user", "1+1"), ("assistant", "2"), ("assistant", "3")])


def read(tmp_path, rows, *, chat=False, **options):
    path, tokenizer = tmp_path / "pairs.jsonl", build_tokenizer()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if chat:
        tokenizer.chat_template = TEMPLATE
    columns = options.pop("columns", {})
    data = DataConfig(pairs={"path": str(path), **columns}, chat_template=chat, end_tokens=["<eos>"], **options)
    return [tuple(tokenizer.decode(part) for part in vars(pair).values()) for pair in load_pairs(data, tokenizer)]


def test_text(tmp_path):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]
    assert read(tmp_path, rows) == [("1+1=", "2<eos>", "3<eos>")]
    named = [{"q": "1+1=", "a": "2", "b": "3"}]
    columns = {"prompt_column": "q", "chosen_column": "a", "rejected_column": "b"}
    assert read(tmp_path, named, columns=columns) == [("1+1=", "2<eos>", "3<eos>")]


def test_messages_with_and_without_a_prompt_of_their_own(tmp_path):
    explicit = [{"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}]
    implicit = [{"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}]
    expected = [("=1+1-", "2<eos>", "3<eos>")]
    assert read(tmp_path, explicit, chat=True) == expected
    assert read(tmp_path, implicit, chat=True, columns={"prompt_column": None}) == expected


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": "1", "chosen": "2"}, {}, r"line 1 has no column 'rejected' \(data.pairs.rejected_column\)"),
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, {}, "'chosen' and 'rejected' are the same response"),
        ({"prompt": "1", "chosen": "2", "rejected": " "}, {}, "line 1: 'rejected' holds an empty text"),
        ({"prompt": "1", "chosen": "<eos>", "rejected": "2"}, {}, "line 1: 'chosen' holds an empty response"),
        ({"prompt": "1", "chosen": 5, "rejected": "2"}, {}, "'chosen' holds 5, expected text"),
        ({"prompt": "1", "chosen": "2<eos>4", "rejected": "2"}, {}, r"'chosen' goes on after the end token '<eos>'"),
        (
            {"prompt": [USER], "chosen": [USER, RIGHT], "rejected": [WRONG]},
            {},
            r"'chosen' holds 2 messages, expected the assistant's alone: .* data.pairs.prompt_column: null",
        ),
        ({"chosen": "2", "rejected": "3"}, {"prompt_column": None}, "'chosen' holds no list of messages"),
        (
            {"chosen": [USER, RIGHT], "rejected": [USER, USER, WRONG]},
            {"prompt_column": None},
            "are answers to different messages",
        ),
        ({"chosen": [RIGHT], "rejected": [WRONG]}, {"prompt_column": None}, r"messages of \['assistant'\], expected a"),
    ],
)
def test_what_is_no_pair_is_refused_by_row(tmp_path, row, columns, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row], chat="prompt" not in row or row["prompt"] == [USER], columns=columns)


def test_overlong_pairs_are_an_error_or_dropped(tmp_path):
    rows = [{"prompt": "1", "chosen": "2", "rejected": "3" * 9}, {"prompt": "1", "chosen": "2", "rejected": "3"}]
    with pytest.raises(DataError, match=r"line 1: the response has 10 tokens, data.max_expert_tokens is 4"):
        read(tmp_path, rows, max_expert_tokens=4)
    assert len(read(tmp_path, rows, max_expert_tokens=4, overlong="drop")) == 1


def test_order_and_resumption():
    rows = [Pair((i,), (i, 1), (i, 2, 1)) for i in range(5)]
    pairs = Pairs(rows, seed=0, per_turn=2)
    first = pairs.next()
    # The chosen ones, then the rejected ones of the same prompts.
    prompts = first.token_ids[first.cu_seqlens[:-1]].tolist()
    assert prompts[:2] == prompts[2:]
    assert first.lengths.tolist() == [3, 3, 4, 4]
    assert first.group_ids.tolist() == [0, 1, 0, 1]
    assert first.outcome.tolist() == [1, 1, 0, 0]
    state, expected = pairs.state_dict(), pairs.next()
    other = Pairs(rows, seed=0, per_turn=2)
    other.load_state_dict(state)
    assert other.next().token_ids.tolist() == expected.token_ids.tolist()
    with pytest.raises(ConfigError, match="without preference pairs"):
        other.load_state_dict(None)
