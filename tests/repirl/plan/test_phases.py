"""What is there in each phase, which switch lowers it, and the peak of sampling against the allocator's."""

import math

import pytest
import torch
from plan_cases import configured, merged, model_config, peak_of, phases
from transformers import AutoModelForCausalLM

from repirl.config import ConfigError
from repirl.fused import fuse
from repirl.learner import Learner
from repirl.plan.activations import load_shape
from repirl.plan.fit import find_fit
from repirl.plan.plan import GIB, make_planner, plan
from repirl.rollout.engine import Sampling
from repirl.rollout.transformers import TransformersEngine


def test_phases_and_rows(tmp_path):
    planned = phases(plan(configured(tmp_path)))
    assert list(planned) == ["load", "rollout", "old_logprob", "reference", "prm", "reward", "policy", "checkpoint"]
    shape = load_shape(str(tmp_path / "model"))
    count = sum(map(math.prod, shape.weights()))
    policy = planned["policy"].rows
    assert policy["policy weights"] == policy["gradients"] == policy["reference weights"] == 4 * count
    assert policy["policy moments"] == 8 * count
    assert "policy moments" not in planned["load"].rows
    assert policy["process"] == planned["load"].rows["process"] > 0
    # 2 (keys, values) x 2 heads x 64 features x 4 layers x 4 bytes, for 64 sequences of 256 tokens: first there is room
    # for the prompt's 64 and 64 more, then for 64 beside each token that has none.
    assert planned["rollout"].rows["KV cache"] == 2 * 2 * 64 * 4 * 4 * 64 * (64 + 64 + 2 * 65)
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
    planned = plan(config, device="cuda")
    assert all("process" not in phase.rows for phase in planned.phases)
    assert all("policy weights" not in phase.rows for phase in planned.phases)
    assert planned.host["weights, gradients, moments"] > 0
    with pytest.raises(ConfigError, match=r"ranks is 3.*parallel.replicate, 2"):
        plan(configured(tmp_path, parallel={"replicate": 2}), ranks=3)


def test_an_engine_of_its_own_holds_weights_and_cache_while_it_is_awake(tmp_path):
    engine = {"engine": "vllm", "vllm": {"kv_cache_gib": 0.5}}
    small = {"batch": {"tokens_per_microbatch": 256}, "irl": {"base_measure": "uniform"}}
    config = configured(tmp_path, objective="rloo", rollout=engine, compute_dtype="bfloat16", **small)
    planned = plan(config, device="cuda")
    count = sum(map(math.prod, load_shape(str(tmp_path / "model")).weights()))
    for name in ("rollout", "push_weights"):
        rows = phases(planned)[name].rows
        assert (rows["engine weights"], rows["KV cache"]) == (2 * count, GIB // 2)
    assert "engine weights" not in phases(planned)["policy"].rows
    assert planned.host["sleeping engine"] == 2 * count
    server = plan(configured(tmp_path, objective="rloo", rollout={"engine": "vllm_server"}), device="cuda")
    assert "KV cache" not in phases(server)["rollout"].rows
    # Half a cache is what is missing.
    room = phases(planned)["rollout"].total - GIB // 4
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
    plain = {"compute_dtype": "float32"}
    before = phases(plan(configured(tmp_path, **plain), device=device))[phase]
    after = phases(plan(configured(tmp_path, **plain | changes), device=device))[phase]
    assert before.rows[smaller] > 0
    assert after.rows.get(smaller, 0) < 0.7 * before.rows[smaller]
    assert after.total < before.total


def test_a_filter_samples_more_prompts_at_once(tmp_path):
    rollout = {"prompts_per_step": 4, "max_sequences": 1000}
    before = phases(plan(configured(tmp_path, rollout=rollout), device="cuda"))["rollout"].rows["KV cache"]
    changes = {"rollout": rollout | {"filter": {"oversample": 2.5}}}
    assert phases(plan(configured(tmp_path, **changes), device="cuda"))["rollout"].rows["KV cache"] == 2.5 * before


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


@pytest.mark.parametrize(("prompts", "samples", "prompt", "response"), [(6, 1, 40, 4), (1, 12, 8, 40)])
def test_peak_of_sampling(tmp_path, prompts, samples, prompt, response):
    # Before the first response token the prompts' pass is the peak, with many short prompts the cache.
    count = prompts * samples
    model_settings = model_config("qwen3")
    model_settings.save_pretrained(tmp_path / "small")
    config = configured(
        tmp_path,
        objective="rloo",
        policy={"model": str(tmp_path / "small")},
        irl={"base_measure": "uniform"},
        data={"max_prompt_tokens": prompt},
        rollout={"prompts_per_step": prompts, "samples_per_prompt": max(samples, 2), "max_response_tokens": response},
    )
    model = fuse(AutoModelForCausalLM.from_config(model_settings, dtype=torch.float32, attn_implementation="sdpa"))
    learner = Learner(model, None, tokens_per_microbatch=512)
    engine = TransformersEngine(learner, pad_id=0, max_sequences=count)
    texts = [[2 + i] * prompt for i in range(prompts) for _ in range(samples)]
    sampling = Sampling(response, 1.0, end_ids=())
    counted = peak_of(lambda: engine.generate(texts, list(range(count)), sampling))
    rows = make_planner(config, 1, "cpu").decode("rollout", count, prompts).rows
    assert rows["KV cache"] + rows["temporary"] == pytest.approx(counted, rel=0.1)
