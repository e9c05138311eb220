"""Activations as planned against bytes that autograd saves and that the allocator hands out, and parameters against
those of models on the meta device."""

import itertools
import json
import math

import pytest
import torch
from plan_cases import CONFIGS, SIZES, model_config, peak_of
from shared import CPU
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, GPT2Config, MixtralConfig

from repirl.adapters import add_adapters, init_adapters, select_adapter
from repirl.attention import PackedLayout
from repirl.config import ConfigError
from repirl.fused import fuse
from repirl.learner import enable_checkpointing
from repirl.options import AdapterConfig
from repirl.plan.activations import (
    Micro,
    Precision,
    backward_bytes,
    forward_bytes,
    load_shape,
    read_shape,
    recomputed_bytes,
    saved_bytes,
)

LINEAR = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_counts_parameters_exactly(architecture, tied):
    config = model_config(architecture, tie_word_embeddings=tied, num_hidden_layers=3)
    shape = read_shape(config)
    config.num_labels = 1
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        value = AutoModelForTokenClassification.from_config(config)
    assert sum(map(math.prod, shape.weights())) == sum(p.numel() for p in causal.parameters())
    assert sum(map(math.prod, shape.weights(reads_values=True))) == sum(p.numel() for p in value.parameters())


LENGTHS, PROMPT = [50, 40, 10, 37], 6


def micro_batch(lengths):
    layout = PackedLayout(torch.tensor([0, *itertools.accumulate(lengths)]), CPU)
    groups = tuple((group.shape[0], group.shape[1]) for group in layout.groups)
    return Micro(sum(lengths), sum(lengths) - PROMPT * len(lengths), groups), layout


def make_model(architecture, dtype, *, adapted=False, checkpointing=False, reads_values=False, **changes):
    config = model_config(architecture, **changes)
    config.num_labels = 1
    factory = AutoModelForTokenClassification if reads_values else AutoModelForCausalLM
    model = fuse(factory.from_config(config, dtype=dtype, attn_implementation="sdpa"))
    if adapted:
        add_adapters(model, AdapterConfig(rank=4), ["policy", "prm"], torch.float32, value_head=True)
        init_adapters(model, 0)
        select_adapter(model, "policy")
    if checkpointing:
        enable_checkpointing(model)
    model.train()
    return model


def arguments(layout, lengths, reads_values=False):
    positions = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.randint(0, 100, positions.shape)
    index = (positions >= PROMPT).nonzero()[:, 0]
    inputs = {"input_ids": ids, "position_ids": positions, "packed_layout": layout, "response_index": index}
    return inputs | ({} if reads_values else {"targets": ids[index]})


def precision_of(dtype, adapted):
    size = dtype.itemsize
    return Precision(4, size, 4, LINEAR, 4) if adapted else Precision(size, size)


def count_saved(model, call):
    """Bytes of the distinct storages that autograd saves, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    del result
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_activations_are_what_autograd_saves(architecture, dtype, checkpointing, adapted):
    model = make_model(architecture, dtype, adapted=adapted, checkpointing=checkpointing)
    micro, layout = micro_batch(LENGTHS)
    inputs = arguments(layout, LENGTHS)
    counted = count_saved(model, lambda: model(**inputs))
    precision = precision_of(dtype, adapted)
    shape = read_shape(model_config(architecture))
    if checkpointing:
        # Held for all layers by what will run again: rotary factors, and where tokens stand.
        counted += 2 * dtype.itemsize * shape.head_dim * micro.tokens + 8 * (micro.slots + micro.tokens)
    predicted = saved_bytes(shape, micro, precision, checkpointing=checkpointing, reads_values=False)
    assert predicted == pytest.approx(counted, rel=0.02)


def test_activations_of_a_model_that_reads_values():
    model = make_model("qwen3", torch.float32, reads_values=True)
    micro, layout = micro_batch(LENGTHS)
    inputs = arguments(layout, LENGTHS, reads_values=True)
    counted = count_saved(model, lambda: model(**inputs))
    shape = read_shape(model_config("qwen3"))
    predicted = saved_bytes(shape, micro, Precision(4, 4), checkpointing=False, reads_values=True)
    assert predicted == pytest.approx(counted, rel=0.01)


def test_keys_and_values_that_are_repeated_for_every_head(monkeypatch):
    # As on a GPU in float32, where query heads share keys and values.
    model = make_model("qwen3", torch.float32)
    micro, layout = micro_batch(LENGTHS)
    inputs = arguments(layout, LENGTHS)
    expected = model(**inputs).logprob
    monkeypatch.setattr("repirl.attention._shares_heads", lambda q: False)
    torch.testing.assert_close(model(**inputs).logprob, expected)
    counted = count_saved(model, lambda: model(**inputs))
    shape = read_shape(model_config("qwen3"))
    predicted = saved_bytes(shape, micro, Precision(4, 4, repeated=True), checkpointing=False, reads_values=False)
    assert predicted == pytest.approx(counted, rel=0.01)


LONG = [200, 190, 160, 150]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_a_second_micro_batch(dtype, checkpointing, adapted):
    model = make_model("qwen3", dtype, adapted=adapted, checkpointing=checkpointing)
    micro, layout = micro_batch(LONG)
    inputs = arguments(layout, LONG)

    def update():
        model(**inputs).logprob.sum().backward()

    update()
    counted = peak_of(update)
    shape, precision = read_shape(model_config("qwen3")), precision_of(dtype, adapted)
    predicted = saved_bytes(shape, micro, precision, checkpointing=checkpointing, reads_values=False)
    if checkpointing:
        predicted += recomputed_bytes(shape, micro, precision)
    predicted += backward_bytes(shape, micro, precision)
    assert predicted == pytest.approx(counted, rel=0.08)


@pytest.mark.parametrize("adapted", [False, True])
def test_peak_of_scoring(adapted):
    model = make_model("llama", torch.float32, adapted=adapted)
    micro, layout = micro_batch(LONG)
    inputs = arguments(layout, LONG)
    with torch.no_grad():
        counted = peak_of(lambda: model(**inputs))
    predicted = forward_bytes(read_shape(model_config("llama")), micro, precision_of(torch.float32, adapted))
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=10), r"'gpt2'.*it has no .*q_proj.*c_attn"),
        (
            MixtralConfig(**SIZES, num_hidden_layers=1, vocab_size=10, num_local_experts=2),
            r"'mixtral'.*it has no .*mlp\.down_proj.*experts",
        ),
    ],
)
def test_other_structures_are_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        read_shape(config)


def test_missing_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot load the "):
        load_shape(str(tmp_path / "nothing"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ConfigError, match="cannot load the "):
        load_shape(str(tmp_path / "odd"))
