"""Switches that save memory change where numbers lie, never what they are: adapters, idle offload, 8-bit state."""

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from rank_processes import rank_processes
from shared import CPU, MEASURED
from tiny import gradients, make_model, objective, tiny_config, tiny_values
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from repirl.adapters import add_adapters, belongs, init_adapters, select_adapter
from repirl.batch import pack
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import ConfigError, RunError
from repirl.configfile import build_config
from repirl.distributed.load import load_sharded_model
from repirl.distributed.offload import HostMemory, Parked, Residency
from repirl.distributed.shard import whole
from repirl.distributed.world import join_world
from repirl.export import export_checkpoint
from repirl.learner import Learner
from repirl.loop import train
from repirl.models import load_model
from repirl.optimizer import make_optimizer
from repirl.options import AdapterConfig, OptimizerConfig
from repirl.report.log import read_metrics
from repirl.run import build

PAIRS = [([3, 4, 5], [6, 7, 8, 9, 10, 1]), ([9], [10, 1]), ([4, 4], [5]), ([3] * 9, [4, 5, 6, 1])]
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2, max_grad_norm=1e9)
ADAPTERS = {"adapters": {"rank": 4, "alpha": 8.0}}


def metrics_of(folder):
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]


def shared(path, dtype=torch.float32):
    """Policy, PRM with a value head and reference on one base, with adapters that are not zero any more."""
    model = load_model(str(path), kind="causal", dtype=dtype, device=CPU)
    add_adapters(model, AdapterConfig(rank=4, alpha=8.0), ["policy", "prm"], torch.float32, value_head=True)
    init_adapters(model, seed=0)
    options = {"tokens_per_microbatch": 12}
    policy = Learner(model, OPTIMIZER, adapter="policy", **options)
    prm = Learner(model, OPTIMIZER, adapter="prm", **options)
    return policy, prm, Learner(model, None, **options)


def disturb(learner, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def policy_loss(outputs, micro):
    return -(outputs["logprob"] * micro.read("weight")).sum() + 0.1 * outputs["entropy"].sum()


def value_loss(outputs, micro):
    return ((outputs["value"] - micro.read("weight")) ** 2).sum()


def weighted_batch():
    batch = pack(PAIRS)
    batch.write("weight", torch.linspace(-1, 1, batch.num_response_tokens))
    return batch


def test_three_models_live_on_one_base(tmp_path):
    path = make_model(tmp_path / "model")
    batch = weighted_batch()
    plain = Learner(
        load_model(str(path), kind="causal", dtype=torch.float32, device=CPU), None, tokens_per_microbatch=99
    )
    policy, prm, reference = shared(path)
    # Adapters begin as the base, a value head at zero.
    for learner in (policy, reference):
        torch.testing.assert_close(learner.score(batch)["logprob"], plain.score(batch)["logprob"])
    assert torch.count_nonzero(prm.score(batch)["value"]) == 0
    disturb(policy, 1)
    disturb(prm, 2)
    assert set(policy.trained).isdisjoint(prm.trained)
    # Each says what its merged weights say in a plain model.
    for learner in (policy, prm):
        merged = load_model(str(path), kind="causal", dtype=torch.float32, device=CPU)
        missing, unexpected = merged.load_state_dict(dict(learner.weights()), strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        if learner is prm:
            merged.value_head = learner.model.value_head
        expected = Learner(merged, None, tokens_per_microbatch=99, adapter=learner.adapter).score(batch)
        for name, values in learner.score(batch).items():
            torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference.score(batch)["logprob"], plain.score(batch)["logprob"])


def test_an_update_moves_its_own_adapter_only(tmp_path):
    policy, prm, reference = shared(make_model(tmp_path / "model"))
    disturb(policy, 1)
    disturb(prm, 2)
    batch = weighted_batch()
    for learner, loss in ((policy, policy_loss), (prm, value_loss), (policy, policy_loss)):
        before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
        assert learner.update(batch, objective(loss))["grad_norm"] > 0
        moved = {n for n, p in learner.model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == set(learner.trained)
        # Asking others between two updates costs none of them its gradients.
        reference.score(batch)
        prm.score(batch)


def test_gradients_of_adapters_equal_those_of_the_merged_weights(tmp_path):
    """dL/dA = scale B^T dL/dW, dL/dB = scale dL/dW A^T, with dL/dW of the plain model with merged weights."""
    path = make_model(tmp_path / "model")
    policy, _, _ = shared(path)
    disturb(policy, 1)
    batch = weighted_batch()
    merged = load_model(str(path), kind="causal", dtype=torch.float32, device=CPU)
    merged.load_state_dict(dict(policy.weights()), strict=False)
    plain = gradients(Learner(merged, OPTIMIZER, tokens_per_microbatch=99), batch, policy_loss)
    for name, grad in gradients(policy, batch, policy_loss).items():
        module = policy.model.get_submodule(name.split(".lora_")[0])
        d_weight = plain[name.split(".lora_")[0] + ".weight"]
        if "lora_A" in name:
            expected = module.scaling["policy"] * module.lora_B["policy"].weight.T @ d_weight
        else:
            expected = module.scaling["policy"] * d_weight @ module.lora_A["policy"].weight.T
        torch.testing.assert_close(grad, expected.detach(), atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def losses_of_updates(policy, prm, batch):
    """Of two updates of each, in turns."""
    turns = ((policy, objective(policy_loss)), (prm, objective(value_loss))) * 2
    return [learner.update(batch, loss)["loss"] for learner, loss in turns]


def sharded_adapters(_group, values, path):
    config = build_config(values)
    world = join_world(config)
    base = getattr(torch, config.computes_in)
    adapters = AdapterConfig(rank=4, alpha=8.0)
    model = load_sharded_model(
        path,
        kind="causal",
        dtype=base,
        compute_dtype=base,
        world=world,
        prepare=lambda m: add_adapters(m, adapters, ["policy", "prm"], torch.float32, value_head=True),
    )
    init_adapters(model, seed=0)
    options = {"tokens_per_microbatch": 12, "world": world}
    policy = Learner(model, OPTIMIZER, adapter="policy", **options)
    prm = Learner(model, OPTIMIZER, adapter="prm", **options)
    batch = weighted_batch()
    metrics = losses_of_updates(policy, prm, batch)
    scores = (
        policy.score(batch) | prm.score(batch) | {"reference": Learner(model, None, **options).score(batch)["logprob"]}
    )
    return metrics, {n: whole(p.detach()).clone() for n, p in model.named_parameters()}, scores, dict(policy.weights())


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_sharded_adapters_train_as_those_of_one_process(tmp_path, compute_dtype):
    path = make_model(tmp_path / "model")
    policy, prm, reference = shared(path, getattr(torch, compute_dtype))
    batch = weighted_batch()
    expected = losses_of_updates(policy, prm, batch)
    scores = policy.score(batch) | prm.score(batch) | {"reference": reference.score(batch)["logprob"]}
    atol = 2e-5 if compute_dtype == "float32" else 5e-2
    with rank_processes(2) as ranks:
        for metrics, weights, actual, merged in ranks.run(
            2, sharded_adapters, tiny_values(tmp_path, compute_dtype=compute_dtype), str(path)
        ):
            assert metrics == pytest.approx(expected, rel=atol, abs=atol)
            for name, weight in policy.model.named_parameters():
                torch.testing.assert_close(weights[name], weight.detach(), atol=atol, rtol=atol)
            for name, values in scores.items():
                torch.testing.assert_close(actual[name], values, atol=4 * atol, rtol=4 * atol)
            for name, weight in policy.weights():
                torch.testing.assert_close(merged[name], weight, atol=atol, rtol=atol)


@pytest.mark.parametrize("reward", ["value", "implicit"])
def test_a_run_with_adapters_resumes_to_the_bit_and_exports(tmp_path, reward):
    options = {"prm": {"reward": reward}, "irl": {"use_outcome": False, "base_measure": "reference"}, **ADAPTERS}
    whole_run = tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    train(whole_run)
    parts = {"output_dir": str(tmp_path / "parts"), **options}
    train(tiny_config(tmp_path, **parts, steps=2))
    train(tiny_config(tmp_path, **parts), resume=True)
    ours, theirs = metrics_of(tmp_path / "parts"), metrics_of(tmp_path / "whole")
    # The first part ended with an evaluation of its own.
    assert ours == theirs
    # The frozen base is in no checkpoint.
    names = (
        FileSystemReader(resolve_checkpoint(tmp_path / "whole") / "policy" / "tensors")
        .read_metadata()
        .state_dict_metadata
    )
    assert names
    assert not [name for name in names if "base_layer" in name or "embed" in name]
    run = build(whole_run)
    run.restore(resolve_checkpoint(tmp_path / "whole"))

    export_checkpoint(tmp_path / "whole", tmp_path / "export")
    batch = pack(PAIRS)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "policy", dtype=torch.float32)
    prompt, response = PAIRS[0]
    logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].detach()
    ours = run.learners["policy"].score(batch)["logprob"][: len(response)]
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    if reward == "value":
        prm = AutoModelForTokenClassification.from_pretrained(tmp_path / "export" / "prm", dtype=torch.float32).eval()
        expected = prm(torch.tensor([prompt + response])).logits[0, len(prompt) :, 0].detach()
        assert expected.abs().max() > 0
        ours = run.learners["prm"].score(batch)["value"][: len(response)]
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def test_an_idle_model_leaves_nothing_behind_and_comes_back_whole(tmp_path):
    path = make_model(tmp_path / "model")
    models = [load_model(str(path), kind="causal", dtype=torch.float32, device=CPU) for _ in range(2)]
    first, second = (Learner(m, OPTIMIZER, tokens_per_microbatch=99) for m in models)
    batch = weighted_batch()
    first.update(batch, objective(policy_loss))
    expected = first.score(batch)["logprob"]
    weights = {n: w.clone() for n, w in first.weights()}
    moments = {n: {k: v.clone() for k, v in first.optimizer.state[p].items()} for n, p in first.trained.items()}
    residency = Residency(tmp_path / "away")
    with pytest.MonkeyPatch.context() as patch:
        # Small tensors stay; here all are small.
        patch.setattr("repirl.distributed.offload._SMALLEST_BYTES", 0)
        residency.add(first)
        residency.add(second)
        second.score(batch)
        assert all(p.untyped_storage().nbytes() == 0 for p in first.model.parameters())
        assert all(v.untyped_storage().nbytes() == 0 for s in first.optimizer.state.values() for v in s.values())
        assert all(p.untyped_storage().nbytes() > 0 for p in second.model.parameters())
        assert torch.equal(first.score(batch)["logprob"], expected)
        assert all(p.untyped_storage().nbytes() == 0 for p in second.model.parameters())
        residency.use_all()
    for name, weight in first.weights():
        assert torch.equal(weight, weights[name])
        for key, value in first.optimizer.state[first.trained[name]].items():
            assert torch.equal(value, moments[name][key])
    assert not list((tmp_path / "away").iterdir())


@pytest.mark.parametrize("call", ["tempfile.TemporaryFile", "repirl.distributed.offload._view"])
def test_an_idle_model_for_which_there_is_no_room_stays_whole(tmp_path, monkeypatch, call):
    monkeypatch.setattr("repirl.distributed.offload._SMALLEST_BYTES", 0)
    model = load_model(str(make_model(tmp_path / "model")), kind="causal", dtype=torch.float32, device=CPU)
    learner, residency = Learner(model, OPTIMIZER, tokens_per_microbatch=99), Residency(tmp_path / "away")
    weights = {n: w.clone() for n, w in learner.weights()}

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(RunError, match=r"offload_idle\): No space left on device. Make room"):
            residency.add(learner)
    assert all(torch.equal(weight, weights[name]) for name, weight in learner.weights())


def test_host_memory_is_dealt_out_without_gaps(tmp_path, monkeypatch):
    """As from a GPU, but for the pinning: several storages share a piece, and one may lie in several."""
    monkeypatch.setattr("repirl.distributed.offload._PIECE_BYTES", 1000)
    tensors = [torch.randn(n) for n in (30, 700, 1, 250)]
    expected = [t.clone() for t in tensors]
    memory = HostMemory(pinned=False)
    parked = [Parked(t.untyped_storage(), memory) for t in tensors]
    for p in parked:
        p.empty()
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    pieces = {part.untyped_storage().data_ptr() for p in parked for part in p._copy}
    assert len(pieces) == math.ceil(sum(t.nbytes for t in expected) / 1000)
    for p in reversed(parked):
        p.restore()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected, strict=True))


@pytest.mark.parametrize(
    "changes", [{"prm": {"reward": "implicit"}}, {"objective": "rloo", "loss": {"kl_coefficient": 0.1}}]
)
def test_a_run_with_offload_is_the_same_to_the_bit(tmp_path, changes, monkeypatch):
    monkeypatch.setattr("repirl.distributed.offload._SMALLEST_BYTES", 0)
    for name, offload in {"with": True, "without": False}.items():
        folder = tmp_path / name
        config = tiny_config(tmp_path, output_dir=str(folder), offload_idle=offload, steps=3, **changes)
        train(config)
    assert metrics_of(tmp_path / "with") == metrics_of(tmp_path / "without")


def test_moments_of_8_bits_train_and_resume(tmp_path):
    """One parameter is large enough to be quantised; the run goes on from a checkpoint as if it had not stopped."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    target = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    optimizer = make_optimizer({"weight": weight}, OptimizerConfig(lr=5e-2, state_bits=8))
    for _ in range(60):
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().backward()
        optimizer.step()
    assert float((weight - target).detach().pow(2).mean()) < 0.05 * float(target.pow(2).mean())
    state = optimizer.state[weight]
    held = sum(getattr(v, "codes", v).nbytes for k, v in state.items() if k != "step")
    assert held == 2 * weight.numel()
    bits = {"optimizer": {"state_bits": 8, "lr": 1e-3}}
    options = {"policy": bits, "prm": bits, "irl": {"use_outcome": False}}
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **options))
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "parts"), steps=2, **options))
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "parts"), **options), resume=True)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ADAPTERS, "offload_idle": True}, "offload_idle moves whole models"),
        ({**ADAPTERS, "prm": {"model": "other"}}, "prm.model is 'other'"),
        ({**ADAPTERS, "prm": {"gradient_checkpointing": True}}, "only one model: set all of them"),
        ({"offload_idle": True, "parallel": {"cpu_offload": True}}, "leave out offload_idle"),
        ({"policy": {"activation_offload": True}}, "set policy.gradient_checkpointing, too"),
    ],
)
def test_switches_that_do_not_go_together_say_so(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["no_such_layer"],
            r"adapters.target_modules \['no_such_layer'\]: the model has no layer 'no_such_layer'; its",
        ),
        (["q_proj", "v_prj"], r"the model has no layer 'v_prj'; its linear layers are \[.*'v_proj'\]"),
        ([], r"adapters.target_modules \[\]: it is empty"),
        (["embed_tokens"], r"'embed_tokens' is of type Embedding, expected linear layers below the head"),
        (["q_proj", "lm_head"], r"'lm_head' is of type FusedHead, expected linear layers below the head"),
    ],
)
def test_adapters_for_layers_that_cannot_have_one_say_so(tmp_path, targets, message):
    config = tiny_config(tmp_path, adapters={"target_modules": targets})
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_adapters_ask_nothing_of_the_version_of_peft(tmp_path, monkeypatch):
    """transformers' own way of adding them refuses a peft that is older than it likes, which may be the newest."""

    def refuse(*_, **__):
        raise ValueError("The version of PEFT you are using is not compatible")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    policy, prm, _ = shared(make_model(tmp_path / "model"))
    assert policy.trained
    assert prm.trained
    assert not any("lm_head" in name for name in (*policy.trained, *prm.trained))


def test_what_goes_wrong_inside_peft_is_not_blamed_on_the_layers(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("something else")

    monkeypatch.setattr("peft.inject_adapter_in_model", fail)
    with pytest.raises(ValueError, match="something else") as caught:
        shared(make_model(tmp_path / "model"))
    assert not isinstance(caught.value, ConfigError)


def test_moving_activations_needs_a_gpu(tmp_path):
    config = tiny_config(tmp_path, policy={"gradient_checkpointing": True, "activation_offload": True})
    with pytest.raises(ConfigError, match=r"policy.activation_offload .* runs on a CPU"):
        build(config)


def test_names_tell_whose_a_parameter_is():
    assert belongs("model.layers.0.mlp.up_proj.lora_A.policy.weight", "policy")
    assert not belongs("model.layers.0.mlp.up_proj.lora_A.policy.weight", "prm")
    assert belongs("value_head.weight", "prm")
    assert not belongs("value_head.weight", "policy")
    assert not belongs("model.layers.0.mlp.up_proj.base_layer.weight", "policy")


def test_all_adapters_stay_trainable_whoever_is_on(tmp_path):
    policy, prm, _ = shared(make_model(tmp_path / "model"))
    for name in ("policy", None, "prm"):
        select_adapter(policy.model, name)
        assert all(p.requires_grad for x in (policy, prm) for p in x.trained.values())
        base = [p for n, p in policy.model.named_parameters() if n not in policy.trained and n not in prm.trained]
        assert not any(p.requires_grad for p in base)
