"""Peak memory of a forward and a backward pass, before and after each section of kernels/README.md.

    python tests/integrations/memory.py [--section huggingface trl verl torch.compile] [--tokens 2048]

A one-layer model of SmolLM2's width and vocabulary (576 x 49152, float32, tied embeddings), random, on the CPU. Each
row is measured in a process of its own: after one pass that is not counted, the process' high-water mark is reset
(/proc/self/clear_refs), and the figure is how far the next pass rises above what model and batch held: gradients and
activations are in it. Linux only.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from readme_sections import run_section

VOCABULARY, WIDTH, SEQUENCE = 49152, 576, 256
VARIANTS = {
    "huggingface": ("transformers", ("the model's loss", "linear_token_loss")),
    "trl": ("trl", ("TRL's head", "linear_token_stats")),
    "verl": ("verl", ("from logits", "verl's fused head", "linear_token_stats")),
    "torch.compile": ("torch", ("from logits", "linear_token_stats")),
}


def make_model(model_class=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def huggingface_pass(variant: str, ids: torch.Tensor):
    model, mask = make_model(), torch.ones_like(ids)
    if variant == "the model's loss":
        return model, lambda: model(ids, attention_mask=mask, labels=ids).loss.backward()
    loss = run_section("A Hugging Face model's loss").causal_lm_loss
    return model, lambda: loss(model, ids, mask, ids).backward()


def trl_pass(variant: str, ids: torch.Tensor):
    from trl.trainer.utils import add_fused_lm_head

    if variant != "TRL's head":
        run_section("TRL")
    model = make_model()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model, lambda: policy_loss(model(ids, labels=ids, fused_lm_head=True)).backward()


def verl_pass(variant: str, ids: torch.Tensor):
    import verl.utils.torch_functional as verl_functional
    from verl.models.transformers.dense_common import CausalLMOutputForPPO
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    if variant == "linear_token_stats":
        run_section("verl")
    model = make_model()
    if variant != "from logits":
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        return model, lambda: policy_loss(model(ids, return_dict=True)).backward()

    def step() -> None:
        logits, labels = model(ids).logits, ids.roll(-1, dims=-1)
        log_probs = verl_functional.logprobs_from_logits(logits, labels, inplace_backward=False)
        entropy = verl_functional.entropy_from_logits(logits)
        policy_loss(CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)).backward()

    return model, step


def policy_loss(output) -> torch.Tensor:
    return -(output.log_probs + 0.01 * output.entropy).mean()


def torch_compile_pass(variant: str, ids: torch.Tensor):
    model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = model[0].weight
    advantage, old_logprob = torch.ones(len(ids)), torch.full((len(ids), SEQUENCE - 1), -10.8)

    @torch.compile(fullgraph=True)
    def from_logits(model, head, tokens, advantage, old_logprob):
        logprobs = torch.log_softmax(head(model(tokens[:, :-1])) / 0.8, dim=-1)
        ratio = torch.exp(logprobs.gather(-1, tokens[:, 1:, None])[..., 0] - old_logprob)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        return -(ratio * advantage[:, None] + 0.01 * entropy).mean()

    loss = from_logits
    if variant != "from logits":
        loss = run_section("A plain loop under `torch.compile`").policy_loss
    return model, lambda: loss(model, head, ids, advantage, old_logprob).backward()


PASSES = {"huggingface": huggingface_pass, "trl": trl_pass, "verl": verl_pass, "torch.compile": torch_compile_pass}


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: Linux is needed")


def measure(section: str, variant: str, num_tokens: int) -> int:
    """Peak memory in MiB of one forward and backward pass beyond the model and its batch."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (num_tokens // SEQUENCE, SEQUENCE))
    model, step = PASSES[section](variant, ids)
    step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    step()
    return (status_kib("VmHWM") - before) >> 10


def measure_apart(section: str, variant: str, num_tokens: int) -> int:
    """:func:`measure` in a process of its own."""
    arguments = json.dumps([section, variant, num_tokens])
    command = [sys.executable, __file__, "--measure", arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"{section}, {variant}: {result.stderr[-2000:]}")
    return int(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {SEQUENCE}")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(*json.loads(arguments.measure)))
        return
    print(f"| {arguments.tokens} tokens, {WIDTH} x {VOCABULARY}, float32 | in the head | peak, MiB |\n|---|---|---:|")
    for section in arguments.section:
        package, variants = VARIANTS[section]
        for variant in variants:
            if importlib.util.find_spec(package) is None:
                print(f"| {section} | {variant} | {package} is not installed |")
            else:
                print(f"| {section} | {variant} | {measure_apart(section, variant, arguments.tokens)} |", flush=True)


if __name__ == "__main__":
    main()
