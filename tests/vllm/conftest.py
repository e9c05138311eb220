"""Tiny models of shapes that vLLM accepts, their learners, and engines on them."""

import os
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

from repirl.config import OptimizerConfig
from repirl.learner import Learner
from repirl.models import load_model

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
    return folder


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture(scope="session", name="make_policy")
def make_policy_fixture():
    """make_policy(folder, *, tied, ...): a learner with such a model, on the CPU in float32."""

    def make_policy(folder: Path, *, tied: bool, architecture: str = "qwen3", num_key_value_heads: int = 2) -> Learner:
        options = {"architecture": architecture, "num_key_value_heads": num_key_value_heads}
        path = save_model(folder / f"{architecture}_{tied}", tied=tied, **options)
        model = load_model(str(path), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
        return Learner(model, OptimizerConfig(), num_updates=1, tokens_per_microbatch=4096)

    return make_policy


@pytest.fixture(scope="session", name="perturb")
def perturb_fixture():
    """perturb(model, seed): noise on every parameter, as an update would make."""
    return perturb
