"""Models and configurations of which plans are made: a plan needs a model's config.json, and nothing else of it."""

import itertools

from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from repirl.configfile import build_config, merge

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def model_config(architecture, **changes):
    heads = {} if architecture == "qwen2" else {"head_dim": 24}
    sizes = {"vocab_size": 100, "num_hidden_layers": 4, "tie_word_embeddings": True}
    return CONFIGS[architecture](**(SIZES | heads | sizes | changes))


def values(folder, **changes):
    path = folder / "model"
    if not path.exists():
        path.mkdir()
        config = model_config("qwen3", vocab_size=20_000, hidden_size=512, intermediate_size=1536, head_dim=64)
        config.save_pretrained(path)
    plain = {
        "output_dir": "nowhere",
        "steps": 2,
        "device": "cpu",
        "policy": {"model": str(path)},
        "data": {"train": "missing.jsonl", "solution_column": "s", "max_prompt_tokens": 64, "max_expert_tokens": 192},
        "rollout": {"prompts_per_step": 16, "samples_per_prompt": 4, "max_response_tokens": 192},
        "batch": {"tokens_per_microbatch": 4096},
        "irl": {"base_measure": "reference"},
    }
    return merge(plain, changes)


def configured(folder, **changes):
    return build_config(values(folder, **changes))


def merged(config, **changes):
    return build_config(merge(config.model_dump(mode="json"), changes))


def phases(planned):
    """A plan's phases by name."""
    return {phase.name: phase for phase in planned.phases}


def peak_of(call):
    """The most that PyTorch's CPU allocator had handed out at once during `call`, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))
