"""The sampling engine: right log-probs, seeded per sequence, and the distribution that it claims."""

import logging
import warnings

import pytest
import torch
from tiny import make_model
from transformers.cache_utils import DynamicLayer

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.rollout.engine import Sampling, sequence_seed
from repirl.rollout.transformers import CACHE_ROOM, TransformersEngine, _GrowingLayer, _sample, cache_argument

PROMPTS = [[3, 4, 5, 6, 7, 8], [9], [3, 4], [3, 4], [10, 11, 12]]
END = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("engine") / "m")
    return load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))


def engine(model, max_sequences=64):
    policy = Learner(model, OptimizerConfig(), num_updates=1, tokens_per_microbatch=999)
    return TransformersEngine(policy, pad_id=0, max_sequences=max_sequences)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logprobs_are_the_trainers(model, temperature):
    sampling = Sampling(12, temperature, (END,))
    responses = engine(model).generate(PROMPTS, [sequence_seed(0, i) for i in range(5)], sampling)
    batch = pack([(p, r.token_ids) for p, r in zip(PROMPTS, responses, strict=True)])
    learner = Learner(model, OptimizerConfig(), num_updates=1, tokens_per_microbatch=999, temperature=temperature)
    sampled = torch.tensor([x for r in responses for x in r.logprobs])
    torch.testing.assert_close(learner.score(batch)["logprob"], sampled, atol=2e-5, rtol=1e-5)


def test_a_response_depends_on_its_own_seed_only(model):
    sampling = Sampling(12, 1.0, (END,))
    seeds = [sequence_seed(7, i) for i in range(5)]
    together = engine(model).generate(PROMPTS, seeds, sampling)
    alone = [engine(model, 1).generate([p], [s], sampling)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    other = engine(model).generate(PROMPTS, [s + 1 for s in seeds], sampling)
    assert [r.token_ids for r in other] != [r.token_ids for r in together]
    # The global generator is neither read nor moved.
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert engine(model).generate(PROMPTS, seeds, sampling) == together
    assert torch.equal(before, torch.get_rng_state())


def test_responses_end_with_the_end_token_or_at_the_limit(model):
    responses = engine(model).generate([[3]] * 64, list(range(64)), Sampling(10, 1.0, (END,)))
    assert any(r.ended for r in responses)
    for r in responses:
        assert r.ended == (r.token_ids[-1] == END)
        assert END not in r.token_ids[:-1]
        assert r.ended or len(r.token_ids) == 10
        assert len(r.token_ids) == len(r.logprobs)


def test_greedy_takes_the_most_likely_token(model):
    [response] = engine(model).generate([[3, 4]], [0], Sampling(5, 0.0, (END,)))
    ids = [3, 4]
    model.config._attn_implementation = "sdpa"
    for token in response.token_ids:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    model.config._attn_implementation = "repirl_packed"


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]]).expand(20_000, -1)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chosen, logprob = _sample(logits, uniform, 0.5)
    expected = (logits[0] / 0.5).softmax(-1)
    share = torch.bincount(chosen, minlength=5) / 20_000
    torch.testing.assert_close(share, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logprob, expected.log()[chosen])
    # The ends of the unit interval give tokens that have probability.
    ends, _ = _sample(logits[:2], torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64), 1.0)
    assert ends.tolist() == [0, 3]


def test_a_cache_that_grows_in_place_holds_what_a_copied_one_does():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = _GrowingLayer(), DynamicLayer()
    ours.batch_select_indices(torch.tensor([0]))  # nothing is there yet
    for step in range(2 * CACHE_ROOM + 10):
        batch = 5 if step < 9 else 3
        new = [torch.randn(batch, 2, 4 if step == 0 else 1, 8, generator=generator) for _ in range(2)]
        for one, other in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(one, other)
        if step == 8:
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([0, 2, 4]))
        assert ours.get_seq_length() == theirs.get_seq_length() == step + 4
        assert torch.equal(ours.keys, theirs.keys)


def test_seeds_of_neighbouring_keys_differ():
    seeds = {sequence_seed(r, s, p, k) for r in range(3) for s in range(3) for p in range(9) for k in range(9)}
    assert len(seeds) == 3 * 3 * 9 * 9
    assert sequence_seed(0, "eval", 1) == sequence_seed(0, "eval", 1)


def test_bad_calls_are_named(model):
    with pytest.raises(ValueError, match="5 prompts and 1 seeds"):
        engine(model).generate(PROMPTS, [0], Sampling(4, 1.0, (END,)))
    with pytest.raises(ValueError, match="no tokens"):
        engine(model).generate([[]], [0], Sampling(4, 1.0, (END,)))


def test_nothing_that_is_deprecated_is_asked_of_the_model(model, caplog):
    """transformers warns, once a process, of arguments that a release to come will take no more."""
    logging.getLogger("transformers").addHandler(caplog.handler)
    logging.getLogger("transformers").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine(model).generate(PROMPTS, list(range(5)), Sampling(4, 1.0, (END,)))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "deprecated" not in caplog.text


class Newer:
    def forward(self, input_ids, cache=None, **kwargs): ...


class Older:
    def forward(self, input_ids, past_key_values=None, **kwargs): ...


class Neither:
    def forward(self, input_ids, **kwargs): ...


class Mixed(Neither, Older): ...


def test_the_cache_goes_by_the_name_that_the_model_knows(model):
    assert cache_argument(Newer) == "cache"
    assert cache_argument(Older) == cache_argument(Mixed) == "past_key_values"
    assert cache_argument(type(model)) in ("cache", "past_key_values")
    with pytest.raises(ConfigError, match=r"Neither.forward takes no KV cache, neither as `cache` nor"):
        cache_argument(Neither)
