"""A vLLM server in a process of its own: weights pushed into it, and every way in which it can fail in time."""

import contextlib
import http.server
import importlib.util
import os
import signal
import socket
import threading
import time

import pytest
import torch

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.rollout import vllm_server
from repirl.rollout.engine import EngineError, Sampling, sequence_seed
from repirl.rollout.vllm_server import VLLMServerEngine
from repirl.rollout.vllm_worker import is_worker

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(n)] for i, n in enumerate((40, 5, 75, 1))]
SEEDS = [sequence_seed(3, i) for i in range(len(PROMPTS))]
SAMPLING = Sampling(10, 1.0, (1,))


def kill(process, number):
    """Send a signal to all processes of the server."""
    os.killpg(process.pid, number)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory, make_policy, running_server):
    """(engine, policy, process)"""
    parent = tmp_path_factory.mktemp("server")
    policy = make_policy(parent, tied=True)
    [folder] = parent.iterdir()
    with running_server(folder, max_model_len=128) as (process, port):
        engine = VLLMServerEngine(f"http://127.0.0.1:{port}", max_sequences=16, timeout_seconds=120)
        with pytest.raises(EngineError, match="update_weights"):
            engine.generate(PROMPTS, SEEDS, SAMPLING)
        engine.update_weights(policy)
        yield engine, policy, process


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


def test_sampling_is_seeded_and_from_the_whole_distribution(server, assert_whole_distribution):
    engine, policy, _ = server
    responses = engine.generate(PROMPTS, SEEDS, SAMPLING)
    assert engine.generate(PROMPTS, SEEDS, SAMPLING) == responses
    other = engine.generate(PROMPTS, [s + 1 for s in SEEDS], SAMPLING)
    assert [r.token_ids for r in other] != [r.token_ids for r in responses]
    assert_whole_distribution(engine, policy)


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


def test_an_address_of_another_machine_is_named(server, monkeypatch):
    engine, policy, _ = server
    monkeypatch.setattr(engine, "push_host", "192.0.2.1")
    with pytest.raises(ConfigError, match=r"push_host '192\.0\.2\.1' is no address of this machine"):
        engine.update_weights(policy)
    monkeypatch.undo()
    engine.update_weights(policy)


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
    # Requests that were sent while the server hung are finished first.
    for _ in range(20):
        with contextlib.suppress(EngineError):
            engine.update_weights(policy)
            break
        time.sleep(1)
    assert difference(policy, engine.generate(PROMPTS, SEEDS, SAMPLING)) < 1e-4

    # More than the server can finish before it is killed.
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


@pytest.mark.parametrize(
    ("status", "content", "error", "message"),
    [
        # vLLM's answers outside of its development mode, and without the worker extension.
        (404, "", ConfigError, "VLLM_SERVER_DEV_MODE=1 vllm serve"),
        (500, "'CPUWorker' object has no attribute 'repirl_describe'", ConfigError, "--worker-extension-cls repirl"),
        (500, "out of memory", EngineError, "failed with status 500 while telling what it serves: out of memory"),
    ],
)
def test_a_server_that_was_started_otherwise_is_named(status, content, error, message):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, "")

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, content)

        def answer(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        with pytest.raises(error, match=message):
            VLLMServerEngine(f"127.0.0.1:{other.server_port}", max_sequences=1, timeout_seconds=5)
        other.shutdown()
        thread.join()


def test_urls_that_lead_nowhere_are_named():
    with pytest.raises(ConfigError, match="https://x"):
        VLLMServerEngine("https://x", max_sequences=1)
    start = time.monotonic()
    with pytest.raises(EngineError, match="is not there"):
        VLLMServerEngine(f"http://127.0.0.1:{free_port()}", max_sequences=1, timeout_seconds=1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("said", "expected"), [(b"the secret", True), (b"the sorcet", False), (b"", False)])
def test_weights_go_to_who_knows_the_secret(said, expected):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        assert is_worker(ours, b"the secret") is expected
