"""Steps of a response: their texts and their last tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repirl.data.split import char_ends, join_steps, segment, split_steps, token_ends
from repirl.data.tasks.arithmetic import build_tokenizer


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("a\nb\nc", "\n", ["a\n", "b\n", "c"]),
        ("a\nb\n", "\n", ["a\n", "b\n"]),
        ("\n\na\n\n\nb", "\n", ["\n\na\n\n\n", "b"]),
        ("a\nb\n\nc\n\n", "\n\n", ["a\nb\n\n", "c\n\n"]),
        ("Step 1: x ки\nStep 2: y ки", " ки\n", ["Step 1: x ки\n", "Step 2: y ки"]),
        ("no separator", "\n", ["no separator"]),
        (" \n ", "\n", [" \n "]),
        ("", "\n", [""]),
    ],
)
def test_texts_are_split_behind_separators(text, separator, steps):
    assert split_steps(text, separator) == steps
    assert "".join(steps) == text


def test_joining_undoes_splitting():
    text = "a\n\n\nb\nc"
    steps = split_steps(text, "\n")
    bare = [step.removesuffix("\n") for step in steps[:-1]] + steps[-1:]
    assert join_steps(bare, "\n", finished=True) == text
    assert join_steps(["a", "b"], "\n\n", finished=False) == "a\n\nb\n\n"


def test_ends_are_tokens():
    tokenizer = build_tokenizer()
    ids = tokenizer("8+7=15; 15-3=12; #### 12").input_ids
    steps = segment([*ids, tokenizer.eos_token_id], "; ", tokenizer, ended=True)
    assert steps.texts == ("8+7=15; ", "15-3=12; ", "#### 12")
    assert steps.ends == (6, 14, 18)
    assert [tokenizer.decode([ids[end]]) for end in steps.ends[:-1]] == ["; ", "; "]
    # Cut off inside a step: it ends where the response does.
    assert segment(ids[:10], "; ", tokenizer, ended=False).ends == (6, 9)
    assert segment([tokenizer.eos_token_id], "; ", tokenizer, ended=True).ends == (0,)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte, and one for "b\\n" and for "\\nc\\n", which a model need not sample where the text has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "bĊ", "Ċc", "ĊcĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "Ċ"), ("Ċ", "c"), ("Ċc", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_tokens_that_the_tokenizer_would_not_make(byte_tokenizer):
    text = "é\nab\nü"
    own = byte_tokenizer(text).input_ids
    split = [i for part in ("é", "\n", "a", "b", "\n", "ü") for i in byte_tokenizer(part).input_ids]
    assert len(split) == len(own) + 1
    for ids, ends in ((own, (2, 4, 6)), (split, (2, 5, 7))):
        steps = segment(ids, "\n", byte_tokenizer, ended=False)
        assert (steps.texts, steps.ends) == (("é\n", "ab\n", "ü"), ends)
    # The last of a character's bytes is its end.
    assert token_ends(text, [1, 2], own, byte_tokenizer) == token_ends(text, [1, 2], split, byte_tokenizer) == [1, 2]


def test_a_token_over_two_ends_makes_one_step(byte_tokenizer):
    ids = byte_tokenizer("a\nc\nd").input_ids
    assert len(ids) == 3
    steps = segment(ids, "\n", byte_tokenizer, ended=False)
    assert (steps.texts, steps.ends) == (("a\nc\n", "d"), (1, 2))
    assert char_ends(["a\n", "c\n", "d"]) == [2, 4, 5]
