"""Families of decoder models of transformers, a tiny random model of each, and what the trainer makes of it.

python tests/support/families.py --all prints the table of docs/models.md; names of families instead, their rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from shared import CPU
from tiny import objective
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel
from transformers.utils import logging

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.learner import Learner
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.packing import fit_window
from repirl.rollout.engine import Sampling
from repirl.rollout.transformers import TransformersEngine
from repirl.value_head import head_name

PAIRS = [([3, 4], [5, 6, 7, 1]), ([8], [9, 1]), ([3] * 5, [4, 7] * 4), ([4, 4], [5]), ([7] * 3, [8] * 2)]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 4, 9]]

# Sizes by the names that most families have; a family's own names, and what makes it itself, stand beside it.
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# A window that is shorter than the longest of PAIRS, in every other layer.
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {"num_key_value_heads": ...},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": GPT | {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOW,
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": LATENT | EXPERTS | {"n_routed_experts": 4, "head_dim": 8},
    "deepseek_v3": LATENT | EXPERTS | {"n_routed_experts": 4, "head_dim": 8},
    "ernie4_5": {},
    "exaone4": WINDOW,
    "falcon": {"multi_query": True, "head_dim": ...},
    "gemma": {},
    "gemma2": WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 8},
    "glm": {},
    "glm4": {},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "gpt_neox": {"num_key_value_heads": ...},
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": GPT | {"rotary_dim": 4},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mamba": {"state_size": 4},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS | {"num_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "qwen3_next": EXPERTS
    | {"num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}


def save_model(family: str, folder: Path) -> Path:
    """Save a random model of two layers, and the arithmetic tokenizer, whose vocabulary it has."""
    tokenizer = build_tokenizer()
    own = FAMILIES[family]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    options = {key: value for key, value in (SHAPE | own).items() if value is not ...}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that every part of the model shows in its outputs.
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fused(path: Path, kind: str, longest: int) -> PreTrainedModel:
    model = load_model(str(path), kind=kind, dtype=torch.float32, device=CPU)
    fit_window(model, str(path), longest)
    return model


def check_policy(path: Path) -> tuple[PreTrainedModel, bool]:
    """Assert that packed scores are those of the plain model, sequence by sequence, that an update raises what it
    should, and that the sampler's log-probabilities are the trainer's.

    Returns:
        The trained model, and whether it can be sampled from in this process.
    """
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    learner = Learner(fused(path, "causal", 13), OptimizerConfig(lr=1e-2), tokens_per_microbatch=14, temperature=0.7)
    batch = pack(PAIRS)
    with torch.no_grad():
        tables = [(plain(torch.tensor([p + r])).logits[0, len(p) - 1 : -1] / 0.7).log_softmax(-1) for p, r in PAIRS]
    expected = torch.cat([t.gather(1, torch.tensor(r)[:, None])[:, 0] for t, (_, r) in zip(tables, PAIRS, strict=True)])
    actual = learner.score(batch)["logprob"]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    learner.update(batch, objective(lambda outputs, micro: -outputs["logprob"].sum()))
    assert float(learner.score(batch)["logprob"].sum()) > float(actual.sum())
    try:
        engine = TransformersEngine(learner, pad_id=0, max_sequences=8)
    except ConfigError as error:
        if "recurrent layers" not in str(error):
            raise
        return learner.model, False
    prompts = [p for p in PROMPTS for _ in range(2)]
    responses = engine.generate(prompts, list(range(6)), Sampling(max_response_tokens=5, temperature=0.7, end_ids=(1,)))
    rollouts = pack([(p, r.token_ids) for p, r in zip(prompts, responses, strict=True)])
    sampled = torch.tensor([x for r in responses for x in r.logprobs])
    torch.testing.assert_close(learner.score(rollouts)["logprob"], sampled, atol=1e-4, rtol=0)
    return learner.model, True


def check_value(path: Path, out: Path) -> PreTrainedModel:
    """Assert that values are 0 at first, can be trained, and are those of the saved model, sequence by sequence.

    Returns the trained model; ConfigError where the family is refused.
    """
    model = fused(path, "value", 13)
    learner = Learner(model, OptimizerConfig(lr=1e-2), tokens_per_microbatch=14)
    batch = pack(PAIRS)
    assert not learner.score(batch)["value"].any()
    learner.update(batch, objective(lambda outputs, micro: -outputs["value"].sum()))
    assert float(learner.score(batch)["value"].sum()) > 0
    torch.nn.init.normal_(getattr(model, head_name(model) or "").weight)
    model.save_pretrained(out)
    plain = AutoModelForTokenClassification.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.cat([plain(torch.tensor([p + r])).logits[0, len(p) :, 0] for p, r in PAIRS])
    torch.testing.assert_close(learner.score(batch)["value"], expected, atol=1e-4, rtol=1e-4)
    return model


def table_row(family: str, folder: Path) -> str:
    """The family's row of the table in docs/models.md, after all its checks."""
    path = save_model(family, folder / "model")
    policy, sampled = check_policy(path)
    try:
        value = type(check_value(path, folder / "out")).__name__
        read_by = "`AutoModelForTokenClassification`" if hasattr(transformers, value) else "`load_prm`"
    except ConfigError as error:
        if "does not run as transformers has it" not in str(error):
            raise
        read_by = "refused"
    sampler = "yes" if sampled else "refused"
    within = load_model(str(path), kind="causal", dtype=torch.float32, device=CPU).packs
    how = "packed" if policy.packs else "packed within its window" if within else "padded"
    return f"| `{family}` | {how} | yes | {sampler} | {read_by} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--all", action="store_true", help="all families instead")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for family in FAMILIES if arguments.all else arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            print(table_row(family, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
