"""Models that are sound, but do not fit the run or each other."""

import json
import shutil

import pytest
import torch
from shared import CPU
from tiny import make_model, tiny_config
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, OlmoeConfig, OlmoeForCausalLM

from repirl.adapters import add_adapters, init_adapters, merged_weights, select_adapter
from repirl.attention import PackedLayout
from repirl.config import ConfigError
from repirl.model_checks import check_positions, longest_position
from repirl.models import load_model, load_tokenizer
from repirl.options import AdapterConfig
from repirl.prm import PRMDescription, load_prm
from repirl.run import build
from repirl.sources import check_sources


def describe(path, **changes):
    content = json.loads((path / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(content))


def with_vocabulary(path, change):
    """Change the mapping from tokens to ids, in place; returns the folder."""
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] = change(content["model"]["vocab"])
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def swapped(vocabulary):
    one, two = [token for token in vocabulary if token in "123"][:2]
    return vocabulary | {one: vocabulary[two], two: vocabulary[one]}


def test_a_prm_with_another_tokenizer_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    prm = make_model(tmp_path / "prm")

    def check(reward="logprob"):
        return build(tiny_config(tmp_path, prm={"model": str(prm), "reward": reward}))

    assert check().learners["prm"]
    with_vocabulary(prm, swapped)
    with pytest.raises(ConfigError, match=r"differ in 2 of 18 tokens .*has id \d+ in the first and \d+ in the second"):
        check()
    # Smaller: what the policy writes has no id there.
    shutil.rmtree(prm)
    with_vocabulary(make_model(prm), lambda v: {k: i for k, i in v.items() if i != max(v.values())})
    with pytest.raises(ConfigError, match=r"differ in 1 of 18 tokens \(sizes 18 and 17\).*no id at all in the second"):
        check("value")
    # Larger, the policy's own tokens all the same: the same text.
    shutil.rmtree(prm)
    tokenizer = AutoTokenizer.from_pretrained(make_model(prm))
    tokenizer.add_tokens(["step"])
    tokenizer.save_pretrained(prm)
    assert check().learners["prm"]
    # And one that says nothing of tokens is taken as it is.
    for file in prm.glob("tokenizer*"):
        file.unlink()
    assert check().learners["prm"]
    assert config.policy.model != str(prm)


def test_the_reference_of_an_implicit_prm_reads_the_same_tokens(tmp_path):
    prm, reference = make_model(tmp_path / "prm"), make_model(tmp_path / "reference")
    description = PRMDescription(reward="implicit")
    assert load_prm(prm, device="cpu", reference=reference, description=description).reference
    with_vocabulary(reference, swapped)
    with pytest.raises(ConfigError, match="differ in 2 of 18 tokens"):
        load_prm(prm, device="cpu", reference=reference, description=description)


def test_a_value_prm_without_its_head_is_refused(tmp_path):
    """Where config.json does not say what the files hold."""
    prm = make_model(tmp_path / "prm")
    describe(prm, architectures=...)
    with pytest.raises(ConfigError, match=r"hold no head 'score' .*no trained PRM of kind 'value'"):
        load_prm(prm, device="cpu", description=PRMDescription(reward="value"))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path):
    path = make_model(tmp_path / "model")
    tokenizer = load_tokenizer(str(path))
    tokenizer.add_tokens(["step"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ConfigError, match=r"has the token 'step' with id 18, .*embeddings for 18 tokens only"):
        build(tiny_config(tmp_path))
    with pytest.raises(ConfigError, match=r"has the token 'step' with id 18"):
        load_prm(path, device="cpu", description=PRMDescription(reward="logprob"))


def test_positions_for_the_longest_sequence(tmp_path):
    path = make_model(tmp_path / "model")
    lengths = {"data": {"max_prompt_tokens": 30, "max_expert_tokens": 50}, "rollout": {"max_response_tokens": 40}}
    describe(path, max_position_embeddings=80)
    assert check_sources(tiny_config(tmp_path, **lengths))
    describe(path, max_position_embeddings=79)
    with pytest.raises(ConfigError, match=r"positions for 79 tokens .*may have 80 .*lower data.max_prompt_tokens"):
        build(tiny_config(tmp_path, **lengths))
    # As PRM, too; and without experts their limit does not count.
    prm = shutil.copytree(path, tmp_path / "prm")
    describe(path, max_position_embeddings=80)
    with pytest.raises(ConfigError, match=r"prm' has positions for 79 tokens"):
        check_sources(tiny_config(tmp_path, prm={"model": str(prm)}, **lengths))
    describe(path, max_position_embeddings=70)
    assert check_sources(tiny_config(tmp_path, objective="rloo", **lengths))


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 25}, 100),
        # Frequencies of these depend on the longest sequence of a batch, where it is longer.
        ({"rope_type": "dynamic", "factor": 4.0}, 100),
        ({"rope_type": "longrope", "original_max_position_embeddings": 40, "factor": 4.0}, 40),
    ],
)
def test_rope_scaling_extends_positions(scaling, limit):
    config = LlamaConfig(max_position_embeddings=100)
    config.rope_parameters = {"rope_theta": 1e4, **scaling}
    assert longest_position(config)[0] == limit
    check_positions(config, "m", limit)
    with pytest.raises(ConfigError, match=f"positions for {limit} tokens"):
        check_positions(config, "m", limit + 1)


def test_adapters_of_layers_that_hold_weights_the_other_way_round(tmp_path):
    """GPT-2: merged weights compute what the base and its adapter do."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=18, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = load_model(str(tmp_path / "gpt2"), kind="causal", dtype=torch.float32, device=CPU)
    # c_proj of attention is square: transposed it would fit, too.
    add_adapters(model, AdapterConfig(rank=2), ["policy"], torch.float32, value_head=False)
    init_adapters(model, 0)
    adapted = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert len(adapted) == 8
    for parameter in adapted:
        torch.nn.init.normal_(parameter, std=0.3)
    ids, index = torch.arange(3, 13), torch.arange(1, 10)
    inputs = {"position_ids": torch.arange(10), "packed_layout": PackedLayout(torch.tensor([0, 10]), CPU)}
    base = model(ids, response_index=index, targets=ids[1:], **inputs).logprob.detach()
    select_adapter(model, "policy")
    expected = model(ids, response_index=index, targets=ids[1:], **inputs).logprob.detach()
    assert (base - expected).abs().max() > 0.1
    plain = GPT2LMHeadModel(config)
    plain.load_state_dict(dict(merged_weights(model, "policy")), strict=False)
    plain.tie_weights()
    actual = plain.eval()(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def test_adapters_that_would_leave_out_the_experts_are_refused(tmp_path):
    shape = {"vocab_size": 18, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    model = OlmoeForCausalLM(OlmoeConfig(**shape, **heads, pad_token_id=0))
    with pytest.raises(ConfigError, match=r"experts.* is no linear layer.* gets no adapter: name the layers"):
        add_adapters(model, AdapterConfig(rank=2), ["policy"], torch.float32, value_head=False)
    named = AdapterConfig(rank=2, target_modules=["q_proj", "v_proj"])
    add_adapters(model, named, ["policy"], torch.float32, value_head=False)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "norm"])
def test_adapters_of_what_is_no_linear_layer_below_the_head_are_refused(tmp_path, target):
    model = load_model(str(make_model(tmp_path / "m")), kind="causal", dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match=f"{target!r} is of type .*expected linear layers below the head"):
        add_adapters(model, AdapterConfig(target_modules=[target]), ["policy"], torch.float32, value_head=False)
