"""The packed forward equals the plain model, for values and gradients, and export gives plain models back."""

import json
import sys
import types

import pytest
import torch
from shared import CPU
from tiny import gradients, make_model, objective, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, GraniteConfig, GraniteForCausalLM

from repirl.attention import PackedLayout, packed_attention, packed_kernel
from repirl.batch import pack
from repirl.config import ConfigError
from repirl.learner import Learner, enable_checkpointing
from repirl.models import load_model, load_tokenizer
from repirl.options import OptimizerConfig
from repirl.run import build

PAIRS = [([3, 4], [5, 6, 7, 1]), ([8], [9, 1]), ([3] * 5, [4] * 9), ([4, 4], [5]), ([7] * 3, [8] * 2)]


def learner(path, kind="causal", budget=10_000, checkpointing=False, **options):
    model = load_model(str(path), kind=kind, dtype=torch.float32, device=CPU)
    if checkpointing:
        enable_checkpointing(model)
    return Learner(model, OptimizerConfig(lr=1e-2), num_updates=1, tokens_per_microbatch=budget, **options)


def plain_logprobs(model, pairs, temperature=1.0):
    """Sequence by sequence, with the whole logits, by the untouched model."""
    logprobs, entropies = [], []
    for prompt, response in pairs:
        ids = torch.tensor([prompt + response])
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        logprobs.append(table.gather(1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_values_and_gradients_equal_the_plain_model(tmp_path, architecture, tied, checkpointing):
    path = make_model(tmp_path / "m", tied=tied, architecture=architecture)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours = learner(path, budget=12, checkpointing=checkpointing, temperature=0.7)
    batch = pack(PAIRS)
    logprob, entropy = plain_logprobs(plain, PAIRS, temperature=0.7)
    scored = ours.score(batch)
    torch.testing.assert_close(scored["logprob"], logprob.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scored["entropy"], entropy.detach(), atol=2e-5, rtol=1e-5)

    weight = torch.linspace(-1, 1, batch.num_response_tokens)
    (weight @ logprob + 0.3 * entropy.sum()).backward()
    batch.write("weight", weight)
    ours.max_grad_norm = float("inf")
    grads = gradients(ours, batch, lambda out, mb: (mb.read("weight") * out["logprob"] + 0.3 * out["entropy"]).sum())
    for name, b in plain.named_parameters():
        torch.testing.assert_close(grads[name], b.grad, atol=5e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_does_not_depend_on_packing_or_micro_batches(tmp_path):
    path = make_model(tmp_path / "m")
    grads = []
    for budget, order in [(10_000, [0, 1, 2, 3, 4]), (1, [4, 2, 0, 1, 3]), (9, [1, 3, 0, 4, 2])]:
        ours = learner(path, budget=budget)
        batch = pack(PAIRS).select(order)
        actual = gradients(ours, batch, lambda out, mb: -out["logprob"].sum() / 18)
        grads.append(torch.cat([grad.flatten() for grad in actual.values()]))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], atol=1e-6, rtol=1e-4)


def test_value_model_equals_plain_token_classifier(tmp_path):
    path = make_model(tmp_path / "m")
    ours = learner(path, kind="value")
    batch = pack(PAIRS)
    # A new head starts at zero, so that no reward is invented before training.
    assert torch.count_nonzero(ours.score(batch)["value"]) == 0
    torch.nn.init.normal_(ours.model.score.weight)
    ours.model.save_pretrained(tmp_path / "out")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = [plain(torch.tensor([p + r])).logits[0, len(p) :, 0] for p, r in PAIRS]
    torch.testing.assert_close(ours.score(batch)["value"], torch.cat(expected).detach(), atol=2e-5, rtol=1e-5)
    # A trained head is kept when it is loaded again.
    again = learner(tmp_path / "out", kind="value")
    torch.testing.assert_close(again.score(batch)["value"], ours.score(batch)["value"])


def test_saved_model_is_plain_and_generates(tmp_path):
    path = make_model(tmp_path / "m")
    ours = learner(path)
    ours.model.save_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    ids = torch.tensor([[3, 4, 5]])
    ours.model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(plain(ids).logits, ours.model(ids).logits)
    generated = plain.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 3


def test_packed_attention_refuses_to_run_without_a_layout(tmp_path):
    model = load_model(str(make_model(tmp_path / "m")), kind="causal", dtype=torch.float32, device=CPU)
    with pytest.raises(RuntimeError, match="packed_layout"):
        model(torch.tensor([[3, 4]]))


def test_layout_covers_every_token_once():
    lengths = torch.tensor([1, 30, 2, 29, 7, 7, 1])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    layout = PackedLayout(cu, CPU)
    flat = torch.cat([index.flatten() for index in layout.groups])
    assert flat[layout.inverse].tolist() == list(range(int(cu[-1])))
    assert sum(index.numel() for index in layout.groups) <= 2 * int(cu[-1])


def test_figures_are_means_over_all_micro_batches(tmp_path):
    """Quotients of sums, not means of means; a figure that only some micro-batches have is one of those alone."""
    batch, metrics = pack(PAIRS), []
    path = make_model(tmp_path / "m")

    def loss(outputs, micro):
        logprob = outputs["logprob"]
        figures = {"mean": (logprob.detach().sum(), micro.num_response_tokens), "sequences": (torch.tensor(1.0), 1)}
        if 9 in micro.token_ids:
            figures["rare"] = (torch.tensor(3.0), 2)
        return -logprob.sum(), figures

    for budget in (10_000, 9):
        ours = learner(path, budget=budget)
        expected = float(ours.score(batch)["logprob"].mean())
        metrics.append(ours.update(batch, types.SimpleNamespace(loss=loss)))
        assert metrics[-1]["mean"] == pytest.approx(expected, rel=1e-5)
        assert (metrics[-1]["sequences"], metrics[-1]["rare"]) == (1.0, 1.5)
        assert set(metrics[-1]) == {"loss", "grad_norm", "lr", "skipped_updates", "mean", "sequences", "rare"}
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


def test_nonfinite_update_is_skipped_and_counted(tmp_path):
    ours = learner(make_model(tmp_path / "m"))
    before = [p.clone() for p in ours.model.parameters()]
    result = ours.update(pack(PAIRS), objective(lambda out, mb: out["logprob"].sum() * float("nan")))
    assert result["skipped_updates"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, ours.model.parameters(), strict=True))
    assert ours.update(pack(PAIRS), objective(lambda out, mb: -out["logprob"].sum()))["skipped_updates"] == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, ours.model.parameters(), strict=True))


def test_a_model_that_scales_its_logits_in_an_unknown_way_is_refused(tmp_path, monkeypatch):
    shape = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = GraniteConfig(**shape, num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0)
    config.initializer_range = 0.5
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    assert load_model(str(tmp_path / "granite"), kind="causal", dtype=torch.float32, device=CPU)
    monkeypatch.setattr("repirl.fused._logit_divisor", lambda config: 1.0)
    with pytest.raises(ConfigError, match=r"does not know: log-probabilities differ"):
        load_model(str(tmp_path / "granite"), kind="causal", dtype=torch.float32, device=CPU)


def test_a_model_whose_window_is_shorter_than_sequences_may_be_pads_them(tmp_path):
    path = make_model(tmp_path / "model", architecture="llama")
    description = json.loads((path / "config.json").read_text())
    window = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 80}
    (path / "config.json").write_text(json.dumps(description | window))
    data, rollout = {"max_prompt_tokens": 30, "max_expert_tokens": 51}, {"max_response_tokens": 50}
    with build(tiny_config(tmp_path, data=data, rollout=rollout)) as run:
        assert not any(learner.model.packs for learner in run.learners.values())
    # Without experts their limit does not count.
    with build(tiny_config(tmp_path, data=data, rollout=rollout, objective="rloo")) as run:
        assert run.learners["policy"].model.packs


def test_missing_model_is_one_clear_message(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot load the model .*nowhere"):
        load_model(str(tmp_path / "nowhere"), kind="causal", dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match=r"cannot load the tokenizer .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_flash_attn_is_called_where_it_is_installed(monkeypatch):
    """Its kernel needs a GPU; here a stand-in with its signature shows that what reaches it is what it expects."""
    lengths = torch.tensor([3, 1, 5])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    layout = PackedLayout(cu, CPU)
    q, k, v = (torch.randn(9, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == 5
        assert options == {"softmax_scale": 0.3, "causal": True}
        parts = [x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)]
        attend = torch.nn.functional.scaled_dot_product_attention
        outs = [
            attend(*(x.transpose(0, 1) for x in qkv), is_causal=True, scale=0.3, enable_gqa=True).transpose(0, 1)
            for qkv in zip(*parts, strict=True)
        ]
        return torch.cat(outs)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    packed_kernel.cache_clear()
    try:
        actual = packed_kernel()(q, k, v, layout, 0.3)
    finally:
        packed_kernel.cache_clear()
    batched = (x.transpose(0, 1)[None] for x in (q, k, v))
    expected, _ = packed_attention(torch.nn.Module(), *batched, None, scaling=0.3, packed_layout=layout)
    torch.testing.assert_close(actual, expected[0], atol=1e-6, rtol=1e-5)
