"""kernels/README.md, "verl": the FSDP engine's actor step, with verl's own head and with ours.

The engine's constructor shards the model over accelerators. Its step does not need them: the functions that build the
model's inputs, run it, read log-probabilities and entropy from its output and compute verl's PPO loss are run here,
around an unsharded model on the CPU.
"""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch
from readme_sections import section_code

pytest.importorskip("verl", reason="verl is not installed; make test-integrations")

import verl.utils.torch_functional as verl_functional
import verl.workers.engine.fsdp.transformer_impl as fsdp_engine
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.utils import tensordict_utils
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.import_utils import import_external_libs
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

TEMPERATURE, PROMPT_LENGTH, RESPONSE_LENGTH = 0.8, 6, 9


class TinyActor(LlamaForCausalLM):
    """verl replaces `forward` in the model's class: this one is not shared with other tests."""


def make_actor() -> TinyActor:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=997,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return TinyActor(config)


def make_batch(*, fused: bool, remove_padding: bool) -> TensorDict:
    """Prompts padded on the left and responses on the right, brought by verl into its own form."""
    generator = torch.Generator().manual_seed(1)
    size = 4
    mask = torch.ones(size, PROMPT_LENGTH + RESPONSE_LENGTH, dtype=torch.int64)
    mask[1, :3] = 0
    mask[2, -4:] = 0
    response_mask = mask[:, PROMPT_LENGTH:]
    ids = torch.randint(0, 997, mask.shape, generator=generator) * mask
    tensors = {
        "input_ids": ids,
        "prompts": ids[:, :PROMPT_LENGTH],
        "responses": ids[:, PROMPT_LENGTH:],
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "response_mask": response_mask,
        "old_log_probs": -9 + torch.randn(response_mask.shape, generator=generator),
        "advantages": torch.randn(size, 1, generator=generator) * response_mask,
    }
    batch = left_right_2_no_padding(TensorDict(tensors, batch_size=size))
    tensordict_utils.assign_non_tensor(
        batch,
        temperature=TEMPERATURE,
        use_fused_kernels=fused,
        use_remove_padding=remove_padding,
        calculate_entropy=True,
        dp_size=1,
        batch_num_tokens=int(response_mask.sum()),
        global_batch_size=size,
    )
    return batch


def actor_step(*, fused: bool, remove_padding: bool):
    """One forward and backward pass; returns the loss, log-probabilities, entropies and gradients."""
    model = make_actor()
    if fused:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    engine = object.__new__(fsdp_engine.FSDPEngineWithLMHead)
    engine.module = model
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    engine.compute_entropy_from_logits = verl_functional.entropy_from_logits
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine.ulysses_device_mesh = None
    engine._autocast_dtype = torch.float32
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=4, entropy_coeff=0.05)
    loss, output = engine.forward_step(
        make_batch(fused=fused, remove_padding=remove_padding), functools.partial(ppo_loss, config), forward_only=False
    )
    loss.backward()
    # The last token of a sequence has no next one: what verl computes there is not used, and differs between its paths.
    logprob, entropy = [
        torch.cat([sequence[:-1] for sequence in output["model_output"][name].unbind()])
        for name in ("log_probs", "entropy")
    ]
    return loss.detach(), logprob, entropy, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("remove_padding", [True, False])
def test_actor_step_equals_verls_own(remove_padding, monkeypatch, tmp_path):
    monkeypatch.setattr(fsdp_engine, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(TinyActor, "forward", LlamaForCausalLM.forward)
    from_logits = actor_step(fused=False, remove_padding=remove_padding)
    from_hidden = actor_step(fused=True, remove_padding=remove_padding)

    monkeypatch.setattr(FusedLinearForPPO, "forward", None)
    (tmp_path / "token_stats_head.py").write_text(section_code("verl"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "token_stats_head", raising=False)
    import_external_libs("token_stats_head")  # what verl does with `external_lib`
    assert FusedLinearForPPO.forward is sys.modules["token_stats_head"].fused_forward
    loss, logprob, entropy, gradients = actor_step(fused=True, remove_padding=remove_padding)

    for expected_loss, expected_logprob, expected_entropy, expected_gradients in (from_logits, from_hidden):
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logprob, expected_logprob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            scale = expected_gradients[name].abs().max().item()
            assert scale > 0, name
            assert (gradient - expected_gradients[name]).abs().max() <= 2e-5 * scale, name
