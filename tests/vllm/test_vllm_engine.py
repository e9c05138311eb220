"""vLLM in this process: it has the policy's log-probabilities, and sampling from other weights is always noticed."""

import importlib.util
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.options import VLLMConfig
from repirl.rollout import vllm_worker
from repirl.rollout.engine import EngineError, Sampling, sequence_seed
from repirl.rollout.vllm import VLLMEngine

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

END = 1
# The longer ones fill more than one block of the KV cache, and two share a block.
PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(n)] for i, n in enumerate((40, 5, 75, 1))]
PROMPTS.append([*PROMPTS[2][:40], 9, 9])
SEEDS = [sequence_seed(3, i) for i in range(len(PROMPTS))]
SAMPLING = Sampling(10, 1.0, (END,))


@pytest.fixture(scope="module", params=["qwen3-tied", "llama-untied", "qwen2-tied"])
def pair(request, tmp_path_factory, make_policy):
    architecture, tied = request.param.split("-")
    policy = make_policy(tmp_path_factory.mktemp("vllm"), tied=tied == "tied", architecture=architecture)
    engine = make_engine(policy)
    with pytest.raises(EngineError, match="update_weights"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.update_weights(policy)
    yield engine, policy
    engine.close()


@pytest.fixture
def sound(pair):
    """The engine with the policy's weights, whatever the test before did."""
    engine, policy = pair
    engine.update_weights(policy)
    return engine, policy


def make_engine(policy, **options):
    options = VLLMConfig(**{"kv_cache_gib": 1 / 64} | options)
    lengths = {"max_model_len": 128, "max_sequences": 16, "block_size": 32}
    return VLLMEngine(policy.model.config, options, dtype=torch.float32, **lengths)


def difference(policy, responses, temperature=1.0):
    """Largest difference between the sampler's log-probabilities and the policy's."""
    batch = pack([(p, r.token_ids) for p, r in zip(PROMPTS, responses, strict=True)])
    sampled = torch.tensor([x for r in responses for x in r.logprobs])
    return float((policy.score(batch, temperature)["logprob"] - sampled).abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_after_an_update_logprobs_are_the_policys(sound, perturb, temperature):
    engine, policy = sound
    sampling = replace(SAMPLING, temperature=temperature)
    before = engine.generate(PROMPTS, SEEDS, sampling)
    assert difference(policy, before, temperature) < 1e-4
    perturb(policy.model, seed=1)
    assert difference(policy, before, temperature) > 1e-2
    engine.update_weights(policy)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, sampling), temperature) < 1e-4


def test_greedy_logprobs_are_untempered(sound):
    engine, policy = sound
    responses = engine.generate(PROMPTS, SEEDS, replace(SAMPLING, temperature=0.0))
    assert difference(policy, responses) < 1e-4
    other = engine.generate(PROMPTS, [s + 1 for s in SEEDS], replace(SAMPLING, temperature=0.0))
    assert [r.token_ids for r in other] == [r.token_ids for r in responses]
    with policy.ordinary_model() as model:
        ids = torch.tensor([PROMPTS[0] + responses[0].token_ids])
        assert model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist() == responses[0].token_ids


def test_a_response_depends_on_its_own_seed_only(sound):
    engine, _ = sound
    together = engine.generate(PROMPTS, SEEDS, SAMPLING)
    assert engine.generate(PROMPTS, SEEDS, SAMPLING) == together
    alone = [engine.generate([p], [s], SAMPLING)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert [r.token_ids for r in alone] == [r.token_ids for r in together]
    backwards = engine.generate(PROMPTS[::-1], SEEDS[::-1], SAMPLING)[::-1]
    assert [r.token_ids for r in backwards] == [r.token_ids for r in together]
    other = engine.generate(PROMPTS, [s + 1 for s in SEEDS], SAMPLING)
    assert [r.token_ids for r in other] != [r.token_ids for r in together]
    assert engine.generate([], [], SAMPLING) == []


def test_responses_end_with_an_end_token_or_at_the_limit(sound):
    engine, _ = sound
    ends = tuple(range(1, 60))
    responses = engine.generate([[3]] * 64, list(range(64)), Sampling(6, 1.0, ends))
    assert any(r.ended for r in responses)
    assert any(not r.ended for r in responses)
    for r in responses:
        assert r.ended == (r.token_ids[-1] in ends)
        assert not set(r.token_ids[:-1]) & set(ends)
        assert r.ended or len(r.token_ids) == 6
        assert len(r.token_ids) == len(r.logprobs)


def test_sampling_is_from_the_whole_distribution(sound, assert_whole_distribution):
    assert_whole_distribution(*sound)


def test_bad_calls_are_named(sound):
    engine, _ = sound
    with pytest.raises(ValueError, match="5 prompts and 1 seeds"):
        engine.generate(PROMPTS, [0], SAMPLING)
    with pytest.raises(ValueError, match="no tokens"):
        engine.generate([[]], [0], SAMPLING)
    with pytest.raises(ConfigError, match=r"a prompt of 120 tokens and a response of up to 10 .* 128"):
        engine.generate([[2] * 120], [0], SAMPLING)


def drop(name):
    """A load_weights that does not get the tensor `name`."""
    load = vllm_worker.load_weights
    return lambda worker, weights: load(worker, (pair for pair in weights if pair[0] != name))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_a_dropped_tensor_is_named(pair, perturb, monkeypatch, name):
    engine, policy = pair
    perturb(policy.model, seed=2)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_worker, "load_weights", drop(name))
        with pytest.raises(EngineError, match="does not hold the weights") as caught:
            engine.update_weights(policy)
    # A tied head computes with a copy of the embeddings.
    assert name in str(caught.value) or (name == "model.embed_tokens.weight" and "lm_head" in str(caught.value))
    with pytest.raises(EngineError, match="no sound weights"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.update_weights(policy)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, SAMPLING)) < 1e-4


def test_a_change_of_one_step_that_is_dropped_is_noticed(pair, monkeypatch):
    """The change is as small as an update at a learning rate of 1e-6: log-probabilities do not show it."""
    engine, policy = pair
    engine.update_weights(policy)
    with torch.no_grad():
        policy.model.model.layers[1].self_attn.v_proj.weight += 1e-6
    with monkeypatch.context() as patch:
        patch.setattr(vllm_worker, "load_weights", lambda worker, weights: [list(weights), held(worker)][1])
        with pytest.raises(EngineError, match=r"1 of \d+ tensors differ, worst model.layers.1.self_attn.v_proj.weight"):
            engine.update_weights(policy)


def held(worker):
    return vllm_worker.held_weights(worker.get_model())


def test_a_stale_tied_head_is_named(pair, perturb, monkeypatch):
    engine, policy = pair
    if not policy.model.config.tie_word_embeddings:
        pytest.skip("an untied head is loaded like any other layer")
    perturb(policy.model, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_worker, "refresh_head", lambda model: None)
        with pytest.raises(EngineError, match=r"worst lm_head.weight"):
            engine.update_weights(policy)


def test_a_prefix_cache_of_former_weights_is_noticed(sound, monkeypatch):
    engine, policy = sound
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: True)
        with pytest.raises(EngineError, match="kept 32 cached tokens"):
            engine.update_weights(policy)
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(EngineError, match="did not drop its prefix cache"):
            engine.update_weights(policy)


def test_other_logprobs_than_the_policys_are_noticed(sound, monkeypatch):
    engine, policy = sound
    score = policy.score
    with monkeypatch.context() as patch:
        patch.setattr(policy, "score", lambda *args: {"logprob": score(*args)["logprob"] + 0.01})
        with pytest.raises(EngineError, match=r"0\.01 off in the mean over 32 tokens"):
            engine.update_weights(policy)


def test_tensors_that_one_side_lacks_are_named(sound, monkeypatch):
    engine, policy = sound
    weights = policy.weights
    with monkeypatch.context() as patch:
        patch.setattr(policy, "weights", lambda: ((n, w) for n, w in weights() if n != "model.norm.weight"))
        with pytest.raises(EngineError, match=r"not given 1 of its tensors, such as model\.norm\.weight"):
            engine.update_weights(policy)
    with monkeypatch.context() as patch:
        patch.setattr(policy, "weights", lambda: (*weights(), ("model.extra.weight", torch.zeros(2, 2))))
        with pytest.raises(EngineError, match=r"taking new weights.*extra"):
            engine.update_weights(policy)


def test_sleep_gives_memory_back_and_wake_undoes_it(sound, perturb):
    engine, policy = sound
    expected = engine.generate(PROMPTS, SEEDS, SAMPLING)
    [caches] = engine.llm.collective_rpc(lambda worker: worker.model_runner.kv_caches)
    size = sum(cache.untyped_storage().nbytes() for cache in caches)
    assert size > 1 << 20
    for _ in range(2):
        engine.sleep()
        engine.sleep()
        assert sum(cache.untyped_storage().nbytes() for cache in caches) == 0
        with pytest.raises(EngineError, match="asleep and cannot sample"):
            engine.generate(PROMPTS, SEEDS, SAMPLING)
        with pytest.raises(EngineError, match="asleep and cannot take new weights"):
            engine.update_weights(policy)
        engine.wake()
        engine.wake()
        assert sum(cache.untyped_storage().nbytes() for cache in caches) == size
        assert engine.generate(PROMPTS, SEEDS, SAMPLING) == expected
    perturb(policy.model, seed=4)
    engine.update_weights(policy)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, SAMPLING)) < 1e-4


def test_the_rest_of_the_process_is_left_alone(sound):
    engine, policy = sound
    work = replace(policy.work)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    environment = dict(os.environ)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    engine.update_weights(policy)
    engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.sleep()
    engine.wake()
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert os.environ == environment
    assert not {"LOCAL_WORLD_SIZE", "LD_PRELOAD", "VLLM_DIST_IDENT"} & set(os.environ)
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == num_threads
    assert policy.work == work


def test_bfloat16_weights_are_held_exactly(tmp_path, make_policy, perturb):
    """With a policy in float32 and an engine in bfloat16, weights are rounded once, when they are pushed."""
    policy = make_policy(tmp_path, tied=True)
    options = VLLMConfig(kv_cache_gib=1 / 128)
    engine = VLLMEngine(policy.model.config, options, dtype=torch.bfloat16, max_model_len=64, max_sequences=4)
    for seed in range(2):
        perturb(policy.model, seed)
        engine.update_weights(policy)
    responses = engine.generate(PROMPTS[:2], SEEDS[:2], SAMPLING)
    assert all(len(r.token_ids) == 10 for r in responses)
    engine.close()


def test_what_vllm_cannot_run_is_named(tmp_path, make_policy):
    policy = make_policy(tmp_path, tied=True)
    with pytest.raises(ConfigError, match="tensor_parallel is 2, but there are 1 processes"):
        make_engine(policy, tensor_parallel=2)
    with pytest.raises(ConfigError, match="vLLM cannot run this model"):
        make_engine(policy, kv_cache_gib=1e-9)


def test_fingerprints_of_parts_add_up():
    matrix = torch.randn(37, 23)
    whole = vllm_worker.fingerprint(matrix)
    parts = [
        vllm_worker.fingerprint(matrix[r : r + 10, c : c + 7], r, c) for r in range(0, 37, 10) for c in range(0, 23, 7)
    ]
    assert vllm_worker.add(parts)[0] == whole[0]
    assert vllm_worker.add(parts)[1] == pytest.approx(whole[1])
    # A permutation, a lost part and a change of one bit each give another fingerprint.
    assert vllm_worker.fingerprint(matrix.flip(0))[0] != whole[0]
    assert vllm_worker.fingerprint(matrix.flip(1))[0] != whole[0]
    assert vllm_worker.add(parts[1:])[0] != whole[0]
    other = matrix.clone()
    other[3, 4] = torch.nextafter(other[3, 4], torch.tensor(9.0))
    assert vllm_worker.fingerprint(other)[0] != whole[0]
    # -0.0 and subnormal numbers count as 0.0, and the memory layout does not matter.
    assert vllm_worker.fingerprint(torch.tensor([-0.0, 1e-40])) == (
        vllm_worker.fingerprint(torch.zeros(2))[0],
        pytest.approx(0),
    )
    assert vllm_worker.fingerprint(matrix.T.contiguous().T) == whole
