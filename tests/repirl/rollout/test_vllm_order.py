"""In which order vLLM in the process gives up its memory and takes it back on a GPU. The vLLM here keeps a list."""

from types import SimpleNamespace

import pytest
import torch

from repirl.rollout.engine import EngineError, Sampling
from repirl.rollout.sampler import Sampler
from repirl.rollout.vllm import VLLMEngine


class RecordingLLM:
    """Notes the calls that change where vLLM's memory is."""

    def __init__(self, calls):
        self.calls = calls

    def sleep(self, level):
        self.calls.append(f"sleep at level {level}")

    def wake_up(self, tags=None):
        self.calls.append(f"wake {tags}")

    def collective_rpc(self, function, args=()):
        self.calls.append("load weights")
        for _ in args[0]:
            pass
        return [{}]

    def reset_prefix_cache(self):
        self.calls.append("reset prefix cache")
        return True


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty cache"))
    monkeypatch.setattr("repirl.rollout.vllm.require_held", lambda *arguments: calls.append("check weights"))
    monkeypatch.setattr("repirl.rollout.vllm.require_parity", lambda *arguments: calls.append("check outputs"))
    return calls


@pytest.fixture
def engine(calls, monkeypatch):
    """An engine as it is on a GPU after its first weights came."""
    engine = object.__new__(VLLMEngine)
    engine.llm = RecordingLLM(calls)
    engine.dtype, engine.block_size, engine.max_model_len, engine.tensor_parallel = torch.float32, 16, 64, 1
    engine._on_cpu, engine._emptied, engine._environment = False, [], {}
    engine._asleep, engine._cache_asleep, engine.has_weights = False, False, True
    monkeypatch.setattr(engine, "_generate", lambda *arguments, **options: calls.append("sample probe") or [])
    return engine


def policy():
    world = SimpleNamespace(gather=lambda items: items or [("", 0)], size=1, is_main=True)
    return SimpleNamespace(
        weights=lambda: iter(()), world=world, model=SimpleNamespace(config=SimpleNamespace(vocab_size=32))
    )


def test_the_cache_comes_back_after_the_weights(engine, calls):
    engine.sleep()
    engine.sleep()
    assert not engine.has_weights
    engine.wake()
    engine.wake()
    engine.update_weights(policy())
    assert calls == [
        "sleep at level 2",
        "empty cache",
        "wake ['weights']",
        "load weights",
        "empty cache",
        "wake ['kv_cache']",
        "reset prefix cache",
        "check weights",
        "sample probe",
        "check outputs",
    ]
    assert engine.has_weights


def test_without_sleep_the_cache_stays(engine, calls):
    engine.update_weights(policy())
    assert not any("wake" in call or "empty" in call for call in calls)


def test_a_woken_engine_samples_only_with_new_weights(engine):
    engine.sleep()
    engine.wake()
    with pytest.raises(EngineError, match="no sound weights"):
        engine.generate([[1]], [0], Sampling(temperature=1.0, max_response_tokens=4, end_ids=(0,)))


def test_weights_that_were_given_up_are_sent_again_although_they_did_not_change():
    pushed = []
    engine = SimpleNamespace(wake=lambda: None, has_weights=True, update_weights=pushed.append)
    sampler = object.__new__(Sampler)
    sampler.engine, sampler.policy, sampler._pushed = engine, SimpleNamespace(version=3), 3
    sampler._ready_engine()
    assert pushed == []
    engine.has_weights = False
    sampler._ready_engine()
    assert pushed == [sampler.policy]
