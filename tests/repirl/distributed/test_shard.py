"""Two and three processes give what one gives: losses, gradients, weights, rollouts, checkpoints."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from families import save_model
from rank_processes import rank_processes
from safetensors.torch import load_file, save_file
from shared import CPU
from tiny import gradients, make_model, make_step_prm, tiny_config, tiny_values

from repirl.apps.label import label
from repirl.apps.start import Start, make_base, make_data
from repirl.batch import pack
from repirl.config import ConfigError
from repirl.configfile import build_config, load_preset, merge
from repirl.distributed.load import load_sharded_model
from repirl.distributed.shard import units, whole
from repirl.distributed.world import World, join_world
from repirl.learner import Learner, enable_checkpointing
from repirl.loop import train
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.report.history import read_history
from repirl.report.log import read_metrics
from repirl.report.samples import read_samples
from repirl.rounding import break_ties

# Uneven on purpose; with three ranks and the first two only, one rank has none.
PAIRS = [([3, 4, 5], [6, 7, 8, 9, 10, 1]), ([9], [10, 1]), ([4, 4], [5]), ([3] * 9, [4, 5, 6, 1]), ([7], [8, 8, 8, 1])]
# A large epsilon: Adam would otherwise turn the rounding of a gradient near zero into a whole step.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-2)


@pytest.fixture(scope="module")
def ranks():
    with rank_processes(2) as two, rank_processes(3) as three:
        yield {2: two, 3: three}


def loss(outputs, micro):
    values = outputs["logprob"] + 0.3 * outputs["entropy"] if "logprob" in outputs else outputs["value"]
    return (values * micro.read("weight")).sum() + 0.1 * (values**2).sum()


def loss_and_figures(outputs, micro):
    values = outputs["logprob" if "logprob" in outputs else "value"].detach()
    return loss(outputs, micro), {"mean": (values.sum(), values.numel())}


def updates(learner, count, num_steps):
    """Scores before, gradients of the first update, weights after the last; loss, norm and a figure of each update."""
    batch = pack(PAIRS[:count])
    batch.write("weight", torch.linspace(-1, 1, batch.num_response_tokens))
    before = learner.score(batch)
    grads = gradients(learner, batch, loss)
    metrics = [learner.update(batch, SimpleNamespace(loss=loss_and_figures)) for _ in range(num_steps)]
    after = {name: weight.clone() for name, weight in learner.weights()}
    return before, grads, after, [(m["loss"], m["grad_norm"], m["mean"]) for m in metrics], learner.score(batch)


def plain(path, kind, count, num_steps, *, checkpointing=False, **options):
    model = load_model(path, kind=kind, dtype=torch.float32, device=CPU)
    if checkpointing:
        enable_checkpointing(model)
    learner = Learner(model, OPTIMIZER, num_updates=9, tokens_per_microbatch=12, **options)
    return updates(learner, count, num_steps)


def sharded(_group, values, path, kind, count, num_steps, options, checkpointing=False):
    """The same on each rank of a process."""
    config = build_config(values)
    world = join_world(config)
    model = load_sharded_model(
        path,
        kind=kind,
        dtype=torch.float32,
        compute_dtype=getattr(torch, config.computes_in),
        world=world,
        cpu_offload=config.parallel.cpu_offload,
    )
    assert len(units(model)) >= 3
    if checkpointing:
        enable_checkpointing(model)
    learner = Learner(model, OPTIMIZER, num_updates=9, tokens_per_microbatch=12, world=world, **options)
    local = sum(p.to_local().numel() for p in model.parameters())
    return local, updates(learner, count, num_steps)


def assert_equal(actual, expected, atol):
    before, grads, after, metrics, scored = actual
    for ours, theirs in [(before, expected[0]), (grads, expected[1]), (after, expected[2]), (scored, expected[4])]:
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], atol=atol, rtol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(torch.tensor(metrics), torch.tensor(expected[3]), atol=atol, rtol=atol)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("kind", "tied", "architecture", "checkpointing"),
    [("causal", True, "qwen3", False), ("causal", False, "llama", True), ("value", True, "qwen3", True)],
)
@pytest.mark.parametrize("count", [2, 5])
def test_ranks_make_the_updates_of_one_process(
    ranks, tmp_path, num_ranks, kind, tied, architecture, checkpointing, count
):
    path = str(make_model(tmp_path / "model", tied=tied, architecture=architecture))
    options = {"temperature": 0.7}
    expected = plain(path, kind, count, 3, checkpointing=checkpointing, **options)
    values = tiny_values(tmp_path)
    results = ranks[num_ranks].run(num_ranks, sharded, values, path, kind, count, 3, options, checkpointing)
    total = sum(p.numel() for p in load_model(path, kind=kind, dtype=torch.float32, device=CPU).parameters())
    # Each process holds its share of the parameters, and each ends with the same numbers.
    assert sum(local for local, _ in results) == total
    for _, actual in results:
        assert_equal(actual, expected, 2e-5)


def test_ranks_make_the_updates_of_one_process_where_sequences_are_padded(ranks, tmp_path):
    path = str(save_model("nemotron", tmp_path / "model"))
    expected = plain(path, "causal", 5, 2)
    for _, actual in ranks[3].run(3, sharded, tiny_values(tmp_path), path, "causal", 5, 2, {}):
        assert_equal(actual, expected, 5e-5)


def without_ties(_group, values, path):
    world = join_world(build_config(values))
    options = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
    model = load_sharded_model(path, kind="value", world=world, **options)
    share = break_ties(model, world)
    return share, {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


def test_ranks_break_ties_as_one_process_does(ranks, tmp_path):
    path = make_model(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for tensor in tensors.values():
        bits = tensor.view(torch.int32).view(-1)
        bits[::5] = (bits[::5] & ~0xFFFF) | 0x8000
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = load_model(str(path), kind="value", dtype=torch.float32, device=CPU)
    expected = break_ties(model, World(CPU))
    assert 0.19 < expected < 0.21
    for share, weights in ranks[3].run(3, without_ties, tiny_values(tmp_path), str(path)):
        assert share == expected
        assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("parallel", [{"replicate": 2}, {"cpu_offload": True}])
def test_other_layouts_make_the_same_updates(ranks, tmp_path, parallel):
    path = str(make_model(tmp_path / "model"))
    values = tiny_values(tmp_path, parallel=parallel)
    for _, actual in ranks[2].run(2, sharded, values, path, "causal", 5, 2, {}):
        assert_equal(actual, plain(path, "causal", 5, 2), 2e-5)


def timeouts(_group, values):
    """Of the groups of each dimension, and of the whole world, in minutes."""
    world = join_world(build_config(values))
    groups = [*world.mesh.get_all_groups(), dist.group.WORLD]
    return [group._get_backend(CPU).options._timeout.total_seconds() / 60 for group in groups], world.mesh.mesh.tolist()


def test_every_group_of_a_mesh_waits_as_long_as_configured(ranks, tmp_path):
    values = tiny_values(tmp_path, parallel={"replicate": 2, "timeout_minutes": 7})
    for minutes, mesh in ranks[2].run(2, timeouts, values):
        # The world was there before, with a timeout of its own.
        assert minutes[:2] == [7, 7]
        assert mesh == [[0], [1]]


def test_bfloat16_computation_keeps_float32_weights(ranks, tmp_path):
    path = str(make_model(tmp_path / "model"))
    values = tiny_values(tmp_path, compute_dtype="bfloat16")
    expected = plain(path, "causal", 5, 2)
    for _, actual in ranks[2].run(2, sharded, values, path, "causal", 5, 2, {}):
        assert all(w.dtype == torch.float32 for w in actual[2].values())
        assert_equal(actual, expected, 8e-2)
        # It really computed in bfloat16.
        assert (actual[0]["logprob"] - expected[0]["logprob"]).abs().max() > 1e-4


def run_on_rank(_group, values, resume):
    config = build_config(values)
    train(config, resume=resume)
    return None


def lines(folder):
    return read_metrics(Path(folder) / "metrics.jsonl")


OPTIONS = {"steps": 4, "prm": {"reward": "logprob"}, "irl": {"use_outcome": False, "base_measure": "reference"}}
COMPARED = ("policy/loss", "policy/grad_norm", "policy/approx_kl", "policy/clip_fraction", "prm/loss", "prm/grad_norm")
COMPARED += ("rollout/length", "eval/accuracy", "tokens")


def assert_same_run(ours, theirs, rel):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in COMPARED:
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=rel, abs=1e-6), (a["step"], key)


def assert_same_rows(ours, theirs):
    """Kept responses and the history of prompts: the same in two folders but for rounding, one row each."""
    for read in (read_samples, read_history):
        rows, others = read(ours), read(theirs)
        assert len(rows) == len(others)
        for a, b in zip(rows, others, strict=True):
            assert a.keys() == b.keys()
            for name, value in a.items():
                inexact = isinstance(value, float) or name in ("token_rewards", "token_logprobs")
                expected = pytest.approx(b[name], rel=1e-2, abs=1e-3) if inexact and value is not None else b[name]
                assert value == expected, (a["step"], name)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_whole_run_is_the_same_on_any_number_of_ranks(ranks, tmp_path, num_ranks):
    options = OPTIONS | {"policy": {"updates_per_step": 2}}
    config = tiny_config(tmp_path, output_dir=str(tmp_path / "one"), **options)
    train(config)
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "many"), **options)
    ranks[num_ranks].run(num_ranks, run_on_rank, values, False)
    assert_same_run(lines(tmp_path / "many"), lines(tmp_path / "one"), 1e-3)
    assert_same_rows(tmp_path / "many", tmp_path / "one")
    assert len(read_history(tmp_path / "many")) == 4 * 3
    # There is something to compare: the second update starts from other weights than sampled.
    assert any(line.get("policy/approx_kl", 0) > 1e-4 for line in lines(tmp_path / "one"))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "prime", "prm": {"reward": "implicit"}, "prime": {"loss": "dpo", "reward": "whole"}},
        {"objective": "prime", "prm": {"reward": "implicit", "reference": "policy"}, "order": "policy_first"},
        {"objective": "airl", "discriminator": {"subtract_logprob": True, "reward_clip": 1.0}},
        {"objective": "iq-learn"},
        {"objective": "dpo", "dpo": {"sft_coefficient": 0.1}},
        {"objective": "online-dpo"},
        {"objective": "dqo", "dqo": {"importance_weights": True, "kl_coefficient": 0.1}},
        {"objective": "prm-offline", "data": {"eval": None, "verify_experts": True}},
        {"objective": "math-shepherd", "data": {"eval": None}, "step_prm": {"responses_per_step": 5}},
        {"irl": {"gate": 0.5}, "prm": {"updates_per_step": 2, "optimizer": {"head_lr": 1e-2, "head_updates": 1}}},
        # The rewards are of a pass that no update needs.
        {"loss": {"process_coefficient": 0.0}},
    ],
)
def test_other_systems_are_the_same_on_two_ranks(ranks, tmp_path, changes):
    options = changes | {"steps": 2, "verifier": {"kind": "custom", "function": "judges:even_length"}}
    config = tiny_config(tmp_path, output_dir=str(tmp_path / "one"), **options)
    train(config)
    ranks[2].run(2, run_on_rank, tiny_values(tmp_path, output_dir=str(tmp_path / "two"), **options), False)
    assert_same_run(lines(tmp_path / "two"), lines(tmp_path / "one"), 1e-3)
    assert_same_rows(tmp_path / "two", tmp_path / "one")
    for name in config.system.trains:
        assert lines(tmp_path / "one")[-1][f"{name}/grad_norm"] > 0


def test_a_frozen_prm_rewards_steps_the_same_on_two_ranks(ranks, tmp_path):
    options = {"objective": "rloo-prm", "steps": 2, "loss": {"outcome_coefficient": 0.0, "process_coefficient": 1.0}}
    options["prm"] = {"model": str(make_step_prm(tmp_path))}
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "one"), **options))
    ranks[2].run(2, run_on_rank, tiny_values(tmp_path, output_dir=str(tmp_path / "two"), **options), False)
    assert_same_run(lines(tmp_path / "two"), lines(tmp_path / "one"), 1e-3)
    for one, two in zip(lines(tmp_path / "one")[1:], lines(tmp_path / "two")[1:], strict=True):
        assert two["policy/step_reward"] == pytest.approx(one["policy/step_reward"], rel=1e-5)
        assert one["policy/grad_norm"] > 0


def label_on_rank(_group, values, output, method):
    config = build_config(merge(values, {"label": {"method": method}}))
    return label(config, f"{output}-{method}.jsonl")[0]


def test_two_ranks_label_as_one_does(ranks, tmp_path):
    values = tiny_values(
        tmp_path,
        objective="math-shepherd",
        data={"eval": None},
        label={"samples": 2, "num_prompts": 5, "prompts_per_batch": 3},
        rollout={"samples_per_prompt": 2, "max_response_tokens": 10},
    )
    for method in ("math-shepherd", "omega"):
        counts = label_on_rank(None, values, tmp_path / "one", method)
        for other in ranks[2].run(2, label_on_rank, values, tmp_path / "two", method):
            assert replace(other, seconds=0) == replace(counts, seconds=0)
        files = [(tmp_path / f"{name}-{method}.jsonl").read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]
        assert files[0] or method == "omega"


def refusal_on_rank(_group, values):
    with pytest.raises(ConfigError) as error:
        train(build_config(values), resume=True)
    return str(error.value)


def test_all_ranks_refuse_another_experiment(ranks, tmp_path):
    values = tiny_values(tmp_path, objective="sft", steps=1, eval={"every": 0})
    ranks[2].run(2, run_on_rank, values, False)
    values |= {"steps": 2, "seed": 5}
    (tmp_path / "train.jsonl").write_text("\n".join((tmp_path / "train.jsonl").read_text().splitlines()[::-1]))
    first, second = ranks[2].run(2, refusal_on_rank, values)
    assert first == second
    assert "seed 0 -> 5; content of data.experts (24 rows, " in first
    assert first.endswith("--changed seed,data.experts")


def checkpointed_weights(_group, values):
    """Whole weights of the newest checkpoint, loaded by this number of ranks."""
    from repirl.checkpoint.manifest import resolve_checkpoint
    from repirl.run import build

    config = build_config(values)
    run = build(config)
    run.restore(resolve_checkpoint(config.output_dir))
    return {f"{k}.{n}": w.clone() for k, x in run.learners.items() for n, w in x.weights()}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_goes_on_exactly_on_as_many_ranks_and_closely_on_others(ranks, tmp_path, asynchronous):
    """Two steps and a resume are four steps: to the bit on two ranks, within rounding on one and on three."""
    checkpoint = {"every": 2, "asynchronous": asynchronous}
    changes = {"checkpoint": checkpoint, "log": {"tensorboard": False}}
    whole_run = tiny_values(tmp_path, output_dir=str(tmp_path / "whole"), **OPTIONS | changes)
    ranks[2].run(2, run_on_rank, whole_run, False)
    expected = ranks[2].run(2, checkpointed_weights, whole_run)[0]
    for num_ranks in (2, 3, 1):
        values = tiny_values(tmp_path, output_dir=str(tmp_path / str(num_ranks)), **OPTIONS | changes)
        ranks[2].run(2, run_on_rank, values | {"steps": 2}, False)
        assert sorted(p.name for p in (tmp_path / str(num_ranks) / "checkpoints").iterdir()) == ["step_2"]
        if num_ranks == 1:
            train(build_config(values), resume=True)
            actual = checkpointed_weights(None, values)
        else:
            ranks[num_ranks].run(num_ranks, run_on_rank, values, True)
            actual = ranks[num_ranks].run(num_ranks, checkpointed_weights, values)[0]
        assert actual.keys() == expected.keys()
        for name in expected:
            if num_ranks == 2:
                assert torch.equal(actual[name], expected[name]), name
            else:
                torch.testing.assert_close(actual[name], expected[name], atol=2e-5, rtol=1e-4)
        assert_same_run(lines(tmp_path / str(num_ranks)), lines(tmp_path / "whole"), 1e-3)


def loaded(_group, values, path, kind):
    """Whole parameters and buffers, and whether this process had to load the model whole."""
    config = build_config(values)
    world = join_world(config)
    dtype = torch.float32
    with mock.patch("repirl.distributed.load.load_model", side_effect=load_model) as load_whole:
        model = load_sharded_model(path, kind=kind, dtype=dtype, compute_dtype=dtype, world=world)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {n: whole(p.detach()).clone() for n, p in model.named_parameters()} | buffers, load_whole.called


@pytest.mark.parametrize("layout", ["one file", "several files", "other names"])
@pytest.mark.parametrize(("kind", "tied"), [("causal", False), ("causal", True), ("value", True)])
def test_shards_are_read_from_files_in_any_layout(ranks, tmp_path, layout, kind, tied):
    path = make_model(tmp_path / "model", tied=tied)
    expected = load_model(str(path), kind=kind, dtype=torch.float32, device=CPU)
    if layout == "several files":
        expected.save_pretrained(path, max_shard_size="20KB")
        (path / "model.safetensors").unlink(missing_ok=True)
        assert (path / "model.safetensors.index.json").exists()
    elif layout == "other names":
        # As older checkpoints have it: transformers maps such names, and so every process loads the whole.
        weights = load_file(path / "model.safetensors")
        renamed = {n.removeprefix("model."): w for n, w in weights.items()}
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
        expected = load_model(str(path), kind=kind, dtype=torch.float32, device=CPU)
    for actual, was_whole in ranks[2].run(2, loaded, tiny_values(tmp_path), str(path), kind):
        assert was_whole == (layout == "other names")
        theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
        assert actual.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(actual[name], theirs[name]), name


def test_a_missing_model_or_a_wrong_layout_is_one_clear_message(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, parallel={"replicate": 2})
    with pytest.raises(ConfigError, match=r"parallel.replicate is 2, but there are 1 processes"):
        join_world(config)
    assert join_world(tiny_config(tmp_path)) == World(CPU)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU"):
        join_world(tiny_config(tmp_path, device="cuda"))


def torchrun(num_ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += ["-m", "repirl.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # The loopback device, whatever the host's name resolves to.
    environment |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        # Whatever happened, no rank is left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, errors


def test_torchrun_runs_the_demo_preset_as_one_process_does(tmp_path):
    make_data(tmp_path, 0, Start())
    make_base(tmp_path / "base", seed=0)
    data = {"train": str(tmp_path / "data" / "train.jsonl"), "eval": str(tmp_path / "data" / "eval.jsonl")}
    changes = {"steps": 3, "policy": {"model": str(tmp_path / "base")}, "data": data, "eval": {"num_prompts": 20}}
    values = merge(load_preset("demo"), changes)
    train(build_config(values | {"output_dir": str(tmp_path / "one")}))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values | {"output_dir": str(tmp_path / "two")}))
    code, out, errors = torchrun(2, "train", "--config", str(file))
    assert code == 0, errors
    assert_same_run(lines(tmp_path / "two"), lines(tmp_path / "one"), 1e-3)
    # One process speaks.
    assert out.count("repirl 3/3") == 1
    assert out.count("metrics, TensorBoard and checkpoints") == 1
