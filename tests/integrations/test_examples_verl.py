"""examples/verl_hooks.py inside verl's own functions: the actor's loss, and the loading and call of reward managers."""

import asyncio
import importlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from shared import ROOT

pytest.importorskip("verl", reason="verl is not installed; make test-integrations")

import numpy as np
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.import_utils import import_external_libs
from verl.workers.config import FSDPActorConfig


@pytest.fixture
def hooks(monkeypatch):
    """The module, imported as verl does it."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(FusedLinearForPPO, "forward", FusedLinearForPPO.forward)
    monkeypatch.delitem(sys.modules, "verl_hooks", raising=False)
    import_external_libs("verl_hooks")
    return sys.modules["verl_hooks"]


def test_the_head_is_replaced(hooks):
    assert FusedLinearForPPO.forward is hooks.fused_forward
    hidden, weight, ids = torch.randn(2, 5, 16), torch.randn(40, 16), torch.randint(0, 40, (2, 5))
    logprob, entropy = FusedLinearForPPO()(hidden, weight, ids, temperature=0.7)
    expected = (hidden @ weight.T / 0.7).log_softmax(-1)
    torch.testing.assert_close(logprob, expected.gather(-1, ids[..., None])[..., 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_the_policy_loss_is_verls(hooks, mode):
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=4, clip_ratio_low=0.2, clip_ratio_high=0.3
    )
    generator = torch.Generator().manual_seed(0)
    shape = (6, 9)
    old = -2 + torch.randn(shape, generator=generator)
    current = old + 0.4 * torch.randn(shape, generator=generator)
    # So far from the old one that the second bound of negative advantages matters.
    current[0, 0] = old[0, 0] + 3
    advantage = torch.randn(shape, generator=generator)
    advantage[0, 0] = -1
    mask = torch.arange(9) < torch.tensor([9, 1, 5, 7, 9, 2])[:, None]
    results = []
    for name in ("repirl", "vanilla"):
        logprob = current.clone().requires_grad_()
        loss, metrics = get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=logprob,
            advantages=advantage,
            response_mask=mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(1)),
        )
        loss.backward()
        results.append((loss.detach(), logprob.grad, metrics))
    (loss, gradient, metrics), (expected_loss, expected_gradient, expected_metrics) = results
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().sum() > 0
    assert metrics["actor/ppo_kl"] == pytest.approx(expected_metrics["actor/ppo_kl"], abs=1e-6)
    assert metrics["actor/pg_clipfrac"] > 0


class Service(BaseHTTPRequestHandler):
    """Answers as vLLM's pooling server: the value of a token is its id / 100."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        data = [{"index": i, "data": [[t / 100] for t in ids]} for i, ids in enumerate(body["input"])]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": data}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def test_the_reward_manager_is_loaded_and_called(hooks, url, tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps({"token_ids": [1, 2, 3], "rewards": [0.02, 0.03]}))
    (tmp_path / "score.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return float(solution_str.endswith(ground_truth))\n"
    )
    config = OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {"path": str(tmp_path / "score.py"), "name": "compute_score"},
                "reward_manager": {
                    "source": "importlib",
                    "name": "PRMRewardManager",
                    "module": {"path": str(ROOT / "examples" / "verl_hooks.py"), "name": "custom_reward_manager"},
                },
            },
            "prm": {"url": url, "path": str(tmp_path), "coefficient": 0.5},
        }
    )

    def rollout(response, answer):
        # The prompt 7 8 behind one place of padding, and a response before one.
        tensors = {
            "prompts": torch.tensor([[0, 7, 8]]),
            "responses": torch.tensor([[*response, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, *[1] * len(response), 0]]),
        }
        columns = {"data_source": "mine", "reward_model": {"ground_truth": answer}, "extra_info": {}}
        arrays = {}
        for name, value in columns.items():
            arrays[name] = np.empty(1, dtype=object)
            arrays[name][0] = value
        return DataProto(batch=TensorDict(tensors, batch_size=1), non_tensor_batch=arrays)

    async def score():
        manager = load_reward_manager(config, Tokenizer())
        assert type(manager).__name__ == "PRMRewardManager"
        return [await manager.run_single(rollout([10, 20], answer)) for answer in ("20", "30")]

    right, wrong = asyncio.run(score())
    assert right["reward_score"] == pytest.approx(1 + 0.5 * 0.15)
    assert wrong["reward_score"] == pytest.approx(0.5 * 0.15)
    assert right["reward_extra_info"] == {"acc": 1.0, "prm": pytest.approx(0.15)}


def test_another_model_on_the_server_is_refused(hooks, url, tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps({"token_ids": [1, 2, 3], "rewards": [0.5, 0.03]}))
    service = importlib.import_module("prm_service").PRMService(url)
    with pytest.raises(RuntimeError, match=r"off by 0\.48"):
        service.check(str(tmp_path))
