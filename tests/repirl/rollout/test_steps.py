"""Sampling to the end of a step: where it stops, with separators inside tokens and across them."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from repirl.rollout.engine import Response, Sampling
from repirl.rollout.steps import PIECE, Begun, Continued, StepSampler, stop_tokens

VOCAB = ["a", "b", ";", " ", "; ", " b", ".\n", "\n", "\n\n", "<end>", "c; b", "ж"]


@pytest.fixture(scope="module")
def tokenizer():
    content = Tokenizer(models.WordLevel({text: i for i, text in enumerate(VOCAB)}, unk_token="a"))
    content.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=content, eos_token="<end>", unk_token="a")


def ids(*texts):
    return [VOCAB.index(text) for text in texts]


class Script:
    """An engine that follows one text, whatever it is asked, from wherever the prefix is. Keeps what it was asked."""

    def __init__(self, *texts, prompt=1):
        self.tokens, self.prompt, self.calls = ids(*texts), prompt, []

    def generate(self, prompts, seeds, sampling):
        self.calls.append((len(prompts), sampling.max_response_tokens, tuple(seeds)))
        responses = []
        for prompt in prompts:
            rest = self.tokens[len(prompt) - self.prompt :][: sampling.max_response_tokens]
            stop = next((n for n, token in enumerate(rest, 1) if token in sampling.end_ids), len(rest))
            responses.append(Response(rest[:stop], [0.0] * stop, rest[stop - 1] in sampling.end_ids))
        return responses


def continued(tokenizer, engine, separator, *begun, limit=50):
    return StepSampler(engine, tokenizer, separator, Sampling(limit, 1.0, tuple(ids("<end>"))), 0).continued(begun)


def test_stop_tokens_hold_the_separator_or_begin_it(tokenizer):
    def texts(separator):
        return [VOCAB[i] for i in stop_tokens(tokenizer, separator, ids("<end>"))]

    assert texts("\n") == [".\n", "\n", "\n\n"]
    assert texts("; ") == [";", "; ", "c; b"]
    assert texts("\n\n") == [".\n", "\n", "\n\n"]
    assert texts(" b") == [" ", "; ", " b", "c; b"]


@pytest.mark.parametrize(
    ("separator", "texts", "steps"),
    [
        ("\n", ["a", ".\n", "b", "\n", "a", "<end>"], [2, 2, 2]),
        # A step is not blank: what is blank belongs to the step that follows it here.
        ("\n", ["\n", "\n\n", "a", "\n", "<end>"], [4, 1]),
        # The separator across two tokens, and one that only begins.
        ("; ", ["a", ";", "b", ";", " b", "a", "; ", "a", "<end>"], [5, 2, 2]),
        ("\n\n", ["a", "\n", "b", "\n", "\n", "a", "\n\n", "\n", "a", "<end>"], [5, 2, 3]),
        # In the middle of a token.
        ("; ", ["a", "c; b", "a", "<end>"], [2, 2]),
    ],
)
def test_a_response_is_sampled_step_by_step(tokenizer, separator, texts, steps):
    engine, prefix, lengths = Script(*texts), (), []
    while True:
        [one] = continued(tokenizer, engine, separator, Begun((0,), prefix, ("k", len(lengths))))
        prefix += one.token_ids
        lengths.append(len(one.token_ids))
        assert not one.cut
        if one.ended:
            break
    assert (lengths, list(prefix)) == (steps, ids(*texts))
    # In one go.
    [whole] = continued(tokenizer, engine, separator, Begun((0,), (), ("k",), whole=True))
    assert whole == Continued(tuple(ids(*texts)), ended=True, cut=False)


def test_the_length_limit_cuts_and_long_steps_come_in_pieces(tokenizer):
    engine = Script(*["a"] * (PIECE + 20))
    begun = [Begun((0,), (), ("x",)), Begun((0,), (0,) * 12, ("y",)), Begun((0,), (), ("z",), whole=True)]
    results = continued(tokenizer, engine, "\n", *begun, limit=PIECE + 10)
    assert [len(one.token_ids) for one in results] == [PIECE + 10, PIECE - 2, PIECE + 10]
    assert all(one.cut and not one.ended for one in results)
    # Side by side where limit and end tokens agree, each piece with seeds of its own.
    assert [(count, limit) for count, limit, _ in engine.calls] == [
        (1, PIECE - 2),
        (1, PIECE),
        (1, PIECE),
        (1, 10),
        (1, 10),
    ]
    assert len({seed for _, _, seeds in engine.calls for seed in seeds}) == 5
    with pytest.raises(ValueError, match="138 tokens already"):
        continued(tokenizer, engine, "\n", Begun((0,), (0,) * (PIECE + 10), ()), limit=PIECE + 10)
