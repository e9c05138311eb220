"""The plan against what it plans: parameters of models on the meta device, bytes that autograd saves, bytes that the
allocator hands out, and the trainer's own micro-batches and moments."""

import io
import itertools
import json
import math

import pytest
import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from repirl.adapters import add_adapters, init_adapters, select_adapter
from repirl.attention import PackedLayout
from repirl.batch import pack
from repirl.config import AdapterConfig, ConfigError
from repirl.configfile import build_config, merge
from repirl.learner import Learner, enable_checkpointing
from repirl.models import fuse
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
from repirl.plan.fit import find_fit, print_plan, usable
from repirl.plan.plan import GIB, _micro_batches, _Planner, plan
from repirl.rollout.engine import Sampling
from repirl.rollout.transformers import TransformersEngine

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LINEAR = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


def model_config(architecture, **changes):
    heads = {} if architecture == "qwen2" else {"head_dim": 24}
    sizes = {"vocab_size": 100, "num_hidden_layers": 4, "tie_word_embeddings": True}
    return CONFIGS[architecture](**(SIZES | heads | sizes | changes))


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
    found = {"input_ids": ids, "position_ids": positions, "packed_layout": layout, "response_index": index}
    return found | ({} if reads_values else {"targets": ids[index]})


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


def peak_of(call):
    """The most that PyTorch's CPU allocator had handed out at once during `call`, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    changes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))


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


# A configuration needs a model's config.json, and nothing else.


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


def phases(found):
    return {phase.name: phase for phase in found.phases}


def test_phases_and_rows(tmp_path):
    found = phases(plan(configured(tmp_path)))
    assert list(found) == ["load", "rollout", "old_logprob", "reference", "prm", "reward", "policy", "checkpoint"]
    shape = load_shape(str(tmp_path / "model"))
    count = sum(map(math.prod, shape.weights()))
    policy = found["policy"].rows
    assert policy["policy weights"] == policy["gradients"] == policy["reference weights"] == 4 * count
    assert policy["policy moments"] == 8 * count
    assert "policy moments" not in found["load"].rows
    assert policy["process"] == found["load"].rows["process"] > 0
    # 2 (keys, values) x 2 heads x 64 features x 4 layers x 4 bytes, for 64 sequences of 256 tokens.
    assert found["rollout"].rows["KV cache"] == 2 * 2 * 64 * 4 * 4 * 64 * 256
    assert list(phases(plan(configured(tmp_path, objective="rloo", irl={"base_measure": "uniform"})))) == [
        "load",
        "rollout",
        "old_logprob",
        "policy",
        "checkpoint",
    ]
    assert list(phases(plan(configured(tmp_path, objective="sft")))) == ["load", "policy", "checkpoint"]


def test_a_gpu_holds_no_process_and_no_padding(tmp_path):
    config = configured(tmp_path, compute_dtype="bfloat16", parallel={"cpu_offload": True})
    found = plan(config, device="cuda")
    assert all("process" not in phase.rows for phase in found.phases)
    assert all("policy weights" not in phase.rows for phase in found.phases)
    assert found.host["weights, gradients, moments"] > 0
    with pytest.raises(ConfigError, match=r"ranks is 3.*parallel.replicate, 2"):
        plan(configured(tmp_path, parallel={"replicate": 2}), ranks=3)


def test_an_engine_of_its_own_holds_weights_and_cache_while_it_is_awake(tmp_path):
    engine = {"engine": "vllm", "vllm": {"kv_cache_gib": 0.5}}
    small = {"batch": {"tokens_per_microbatch": 256}, "irl": {"base_measure": "uniform"}}
    config = configured(tmp_path, objective="rloo", rollout=engine, compute_dtype="bfloat16", **small)
    found = plan(config, device="cuda")
    count = sum(map(math.prod, load_shape(str(tmp_path / "model")).weights()))
    for name in ("rollout", "push_weights"):
        rows = phases(found)[name].rows
        assert (rows["engine weights"], rows["KV cache"]) == (2 * count, GIB // 2)
    assert "engine weights" not in phases(found)["policy"].rows
    assert found.host["sleeping engine"] == 2 * count
    server = plan(configured(tmp_path, objective="rloo", rollout={"engine": "vllm_server"}), device="cuda")
    assert "KV cache" not in phases(server)["rollout"].rows
    # Half a cache is what is missing.
    room = phases(found)["rollout"].total - GIB // 4
    assert find_fit(config, int((room + GIB) / 0.95) + 1, device="cuda").switches == ["rollout.vllm.kv_cache_gib 0.25"]


@pytest.mark.parametrize(
    ("changes", "phase", "smaller"),
    [
        ({"policy": {"gradient_checkpointing": True}}, "policy", "activations"),
        ({"prm": {"gradient_checkpointing": True}}, "prm", "activations"),
        ({"batch": {"tokens_per_microbatch": 1024}}, "policy", "activations"),
        ({"rollout": {"max_sequences": 8}}, "rollout", "KV cache"),
        ({"compute_dtype": "bfloat16"}, "policy", "activations"),
        ({"policy": {"optimizer": {"state_bits": 8}}}, "policy", "policy moments"),
        ({"prm": {"optimizer": {"state_bits": 8}}}, "prm", "PRM moments"),
        ({"offload_idle": True}, "policy", "PRM weights"),
        ({"offload_idle": True}, "prm", "policy moments"),
        ({"adapters": {"rank": 8}}, "policy", "gradients"),
        ({"adapters": {"rank": 8}}, "policy", "policy moments"),
        ({"irl": {"base_measure": "uniform"}}, "policy", "reference weights"),
    ],
)
def test_each_switch_lowers_what_it_says(tmp_path, changes, phase, smaller):
    device = "cuda" if "compute_dtype" in changes else "cpu"
    before = phases(plan(configured(tmp_path), device=device))[phase]
    after = phases(plan(configured(tmp_path, **changes), device=device))[phase]
    assert before.rows[smaller] > 0
    assert after.rows.get(smaller, 0) < 0.7 * before.rows[smaller]
    assert after.total < before.total


def test_activation_offload_moves_layer_inputs_to_the_host(tmp_path):
    kept = {"gradient_checkpointing": True}
    before = plan(configured(tmp_path, policy=kept), device="cuda")
    after = plan(configured(tmp_path, policy=kept | {"activation_offload": True}), device="cuda")
    saved = phases(before)["policy"].rows["activations"] - phases(after)["policy"].rows["activations"]
    # All layers' inputs go to host memory; two of four are on the device at a time.
    assert after.host["layers' inputs"] == 2 * saved > 0


def test_ranks_share_all_but_activations(tmp_path):
    config = configured(tmp_path, batch={"tokens_per_microbatch": 1024})
    one, four = (phases(plan(config, ranks))["policy"].rows for ranks in (1, 4))
    for name in ("policy weights", "PRM moments", "reference weights", "gradients"):
        assert four[name] == pytest.approx(one[name] / 4, rel=0.01)
    assert four["activations"] == one["activations"]
    assert four["gathered weights"] > 0
    replicated = phases(plan(merged(config, parallel={"replicate": 2}), 4))["policy"].rows
    assert replicated["policy weights"] == pytest.approx(one["policy weights"] / 2, rel=0.01)


def merged(config, **changes):
    return build_config(merge(config.model_dump(mode="json"), changes))


def test_micro_batches_are_the_trainers():
    sequences, budget, ranks = ((5, 3, 7), (9, 3, 4)), 24, 2
    batch = pack([([1] * p, [1] * r) for count, p, r in sequences for _ in range(count)])
    for place, micro in enumerate(_micro_batches(sequences, budget, ranks, (1, 0, 0))):
        mine = batch.microbatches(budget, ranks)[0][place]
        assert micro.tokens == int(batch.lengths[mine].sum()) <= budget
        assert micro.responses == micro.tokens - 3 * len(mine)


@pytest.mark.parametrize("ranks", [1, 3])
def test_sequences_longer_than_a_micro_batch_have_one_each(tmp_path, ranks):
    # 64 rollouts of 256 tokens make 64 micro-batches, whatever the budget that they exceed.
    batch = pack([([1] * 64, [1] * 192)] * 64)
    dealt = batch.microbatches(100, ranks)
    assert sum(len(mine) for mine in dealt) == -(-64 // ranks) * ranks
    assert sum(map(bool, itertools.chain(*dealt))) == 64
    short = plan(configured(tmp_path, batch={"tokens_per_microbatch": 100}), ranks)
    exact = plan(configured(tmp_path, batch={"tokens_per_microbatch": 256}), ranks)
    assert phases(short)["policy"].rows == phases(exact)["policy"].rows


def test_a_prm_of_another_shape_has_its_own_heads(tmp_path):
    # In float32 on a GPU keys and values are repeated where query heads share them: the PRM's do, the policy's do not.
    grouped = configured(tmp_path)
    model_config("llama", num_key_value_heads=4).save_pretrained(tmp_path / "other")
    other = merged(grouped, policy={"model": str(tmp_path / "other")}, prm={"model": grouped.policy.model})
    rows = [phases(plan(config, device="cuda"))["prm"].rows for config in (grouped, other)]
    assert rows[0]["activations"] == rows[1]["activations"]


def test_moments_are_torchaos(tmp_path):
    optim = pytest.importorskip("torchao.optim")
    config = configured(tmp_path, policy={"optimizer": {"state_bits": 8}})
    weights = [torch.nn.Parameter(torch.zeros(s)) for s in load_shape(str(tmp_path / "model")).weights()]
    optimizer = optim.AdamW8bit(weights)

    def held(buffer):
        parts = [buffer.codes, buffer.scale] if hasattr(buffer, "codes") else [buffer]
        return sum(part.nbytes for part in parts)

    counted = 2 * sum(held(optimizer._new_buffer(w, True)) for w in weights)
    assert phases(plan(config))["policy"].rows["policy moments"] == counted


@pytest.mark.parametrize(("prompts", "samples", "prompt", "response"), [(6, 1, 40, 4), (1, 12, 8, 40)])
def test_peak_of_sampling(tmp_path, prompts, samples, prompt, response):
    # Before the first response token the prompts' pass is the peak, with many short prompts the cache.
    count = prompts * samples
    config = configured(
        tmp_path,
        objective="rloo",
        irl={"base_measure": "uniform"},
        data={"max_prompt_tokens": prompt},
        rollout={"prompts_per_step": prompts, "samples_per_prompt": max(samples, 2), "max_response_tokens": response},
    )
    model_settings = model_config("qwen3", num_hidden_layers=4)
    model = fuse(AutoModelForCausalLM.from_config(model_settings, dtype=torch.float32, attn_implementation="sdpa"))
    learner = Learner(model, None, tokens_per_microbatch=512)
    engine = TransformersEngine(learner, pad_id=0, max_sequences=count)
    texts = [[2 + i] * prompt for i in range(prompts) for _ in range(samples)]
    sampling = Sampling(response, 1.0, end_ids=())
    counted = peak_of(lambda: engine.generate(texts, list(range(count)), sampling))
    shape = read_shape(model_settings)
    rows = _Planner(config, 1, "cpu", shape, shape)._decode("rollout", count, prompts).rows
    assert rows["KV cache"] + rows["temporary"] == pytest.approx(counted, rel=0.1)


def test_what_fits_needs_no_switch_and_what_never_fits_says_so(tmp_path):
    config = configured(tmp_path)
    assert find_fit(config, 1000 * GIB).switches == []
    assert find_fit(config, GIB // 8).switches is None
    assert usable(24 * GIB, "cuda") < 24 * GIB > usable(24 * GIB, "cpu")


def test_the_cheapest_switches_that_suffice(tmp_path):
    config = configured(tmp_path)
    first = plan(config).peak
    least = plan(merged(config, policy={"gradient_checkpointing": True}, prm={"gradient_checkpointing": True})).peak
    memory = int((first.total + least.total) / 2 / 0.85)
    fit = find_fit(config, memory)
    assert fit.switches == ["gradient_checkpointing"]
    assert fit.plan.peak.total == least.total
    # Where cheap ones do not help they are not named: here the KV cache is the peak.
    cache = configured(tmp_path, rollout={"max_response_tokens": 3000, "prompts_per_step": 64})
    found = find_fit(cache, int(0.7 * plan(cache).peak.total / 0.85))
    assert [name.split()[0] for name in found.switches] == ["rollout.max_sequences"]


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
    with pytest.raises(ConfigError, match="cannot load the configuration"):
        load_shape(str(tmp_path / "nothing"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ConfigError, match="cannot load the configuration"):
        load_shape(str(tmp_path / "odd"))


def test_printed_plan(tmp_path):
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(configured(tmp_path), [0.2, 2, 100], ranks=2, console=console)
    text = console.export_text()
    assert "policy moments" in text
    assert "2 CPU processes" in text
    assert "100 GiB (85.00 usable): fits" in text
    assert "0.2 GiB (0.17 usable): does not fit with all switches" in text
    assert "does not fit as it is; fits with " in text
