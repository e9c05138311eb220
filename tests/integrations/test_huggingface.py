"""kernels/README.md, "A Hugging Face model's loss": the value and gradients of the model's own loss."""

import pytest
import torch
from readme_sections import run_section

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


def make_model(model_class, config_class, *, tied: bool):
    shape = {
        "vocab_size": 997,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
    }
    return model_class(config_class(**shape))


def gradients(model) -> dict[str, torch.Tensor]:
    taken = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return taken


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("classes", [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)])
def test_loss_and_gradients_equal_the_models_own(classes, tied):
    model = make_model(*classes, tied=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    input_ids = torch.randint(0, 997, (3, 29))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :11] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[2, :7] = -100  # a prompt that is not learned

    expected = model(input_ids, attention_mask=attention_mask, labels=labels).loss
    expected.backward()
    expected_gradients = gradients(model)

    loss = run_section("A Hugging Face model's loss").causal_lm_loss(model, input_ids, attention_mask, labels)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        scale = expected_gradients[name].abs().max().item()
        assert scale > 0, name
        assert (gradient - expected_gradients[name]).abs().max() <= 5e-6 * scale, name
