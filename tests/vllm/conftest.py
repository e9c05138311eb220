"""Tiny models of shapes that vLLM accepts, their learners, and engines on them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from repirl.learner import Learner
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.rollout.engine import Engine, Sampling
from repirl.rollout.vllm_server import SERVER_ENVIRONMENT, serve_command

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

VOCABULARY, END = 257, 1
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    # Biases in the attention.
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    # Norms of queries and keys.
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def save_model(folder: Path, *, tied: bool, architecture: str, num_key_value_heads: int) -> Path:
    """Save a random two-layer model with four query heads of 32 channels."""
    config_class, model_class = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=32,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    # By default vLLM applies these options, and would not sample from the policy's distribution.
    generation_config = {"top_k": 1, "temperature": 0.1, "eos_token_id": [END, 2]}
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture(scope="session", name="make_policy")
def make_policy_fixture():
    """make_policy(folder, *, tied, ...): a learner with a model of `save_model`, on the CPU in float32."""

    def make_policy(folder: Path, *, tied: bool, architecture: str = "qwen3", num_key_value_heads: int = 2) -> Learner:
        options = {"architecture": architecture, "num_key_value_heads": num_key_value_heads}
        path = save_model(folder / f"{architecture}_{tied}", tied=tied, **options)
        model = load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
        return Learner(model, OptimizerConfig(), num_updates=1, tokens_per_microbatch=4096)

    return make_policy


@pytest.fixture(scope="session")
def assert_whole_distribution():
    """assert_whole_distribution(engine, policy): whatever the model's generation_config.json says, first tokens come
    from the policy's own distribution, and none of that file's end tokens ends a response."""

    def check(engine: Engine, policy: Learner) -> None:
        responses = engine.generate([[3, 4]] * 300, list(range(300)), Sampling(1, 1.0, ()))
        first = torch.tensor([r.token_ids[0] for r in responses])
        with policy.ordinary_model() as model:
            table = model(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
        top = table.topk(3).indices
        shares = torch.bincount(first, minlength=len(table)) / 300
        assert len(first.unique()) > 20
        torch.testing.assert_close(shares[top], table[top], atol=0.1, rtol=0)
        responses = engine.generate([[3]] * 200, list(range(200)), Sampling(12, 1.0, ()))
        assert all(len(r.token_ids) == 12 and not r.ended for r in responses)
        assert any({END, 2} & set(r.token_ids[:-1]) for r in responses)

    return check


def _signal(process: subprocess.Popen, number: int) -> bool:
    """Signal all processes of a server; return whether there were any."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="session")
def running_server():
    """with running_server(folder, max_model_len=128) as (process, port): what `serve_command` starts, in a process
    group of its own."""

    @contextlib.contextmanager
    def run(folder: Path, *, max_model_len: int) -> Iterator[tuple[subprocess.Popen, int]]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        options = ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(16 << 20)]
        command = serve_command(str(folder), dtype="float32", max_model_len=max_model_len, port=port, options=options)
        assert command[:3] == ["vllm", "serve", str(folder)]
        # The vllm script itself refuses to start for a CPU build, whose package has another name.
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", *command[2:]]
        environment = os.environ | SERVER_ENVIRONMENT
        with open(folder / "server.log", "w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process, port
        finally:
            _signal(process, signal.SIGCONT)
            # If the server was killed, its engine and workers still run: SIGTERM lets them free their shared memory.
            _signal(process, signal.SIGTERM)
            process.wait(60)
            deadline = time.monotonic() + 20
            while _signal(process, 0) and time.monotonic() < deadline:
                time.sleep(0.1)
            _signal(process, signal.SIGKILL)

    return run


@pytest.fixture(scope="session", name="perturb")
def perturb_fixture():
    """perturb(model, seed): noise on every parameter, as an update would make."""
    return perturb
