"""One process computes in another dtype than it keeps: the numbers of FSDP2, without it, and nothing left behind."""

import pytest
import torch
from rank_processes import rank_processes
from shared import CPU
from tiny import gradients, make_model, tiny_config, tiny_values

from repirl.batch import pack
from repirl.configfile import build_config
from repirl.distributed.precision import keep_in
from repirl.distributed.shard import units
from repirl.distributed.world import World, join_world, leave_world
from repirl.learner import Learner, enable_checkpointing
from repirl.loop import train
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.report.log import read_metrics
from repirl.run import build

HALF = {"compute_dtype": "bfloat16", "eval": {"every": 0}}
PAIRS = [([3, 4, 5], [6, 7, 8, 9, 10, 1]), ([9], [10, 1]), ([4, 4], [5]), ([3] * 9, [4, 5, 6, 1])]


def learner(path, *, kind="causal", compute_dtype=torch.bfloat16, checkpointing=False):
    model = load_model(str(path), kind=kind, dtype=torch.float32, compute_dtype=compute_dtype, device=CPU)
    if checkpointing:
        enable_checkpointing(model)
    return Learner(model, OptimizerConfig(lr=1e-2), tokens_per_microbatch=12)


def batch():
    result = pack(PAIRS)
    result.write("weight", torch.linspace(-1, 1, result.num_response_tokens))
    return result


def loss(outputs, micro):
    values = outputs["logprob"] + 0.3 * outputs["entropy"] if "logprob" in outputs else outputs["value"]
    return (values * micro.read("weight")).sum()


def trained(config, resume=False):
    """The weights after a run, by learner and name, and what it logged, without times and memory."""
    train(config, resume=resume)
    leave_world()
    keys = ("loss", "grad_norm", "entropy", "mismatch_max", "length")
    lines = read_metrics(f"{config.output_dir}/metrics.jsonl")
    return weights_of(config), [{k: v for k, v in line.items() if k.endswith(keys)} for line in lines]


def weights_of(config):
    from repirl.checkpoint.manifest import resolve_checkpoint

    run = build(config)
    run.restore(resolve_checkpoint(config.output_dir))
    weights = {f"{k}.{n}": w.clone() for k, x in run.learners.items() for n, w in x.weights()}
    run.close()
    leave_world()
    return weights


@pytest.mark.parametrize(
    "changes",
    [
        {"prm": {"reward": "value"}, "irl": {"base_measure": "reference"}},
        {"prm": {"reward": "logprob", "gradient_checkpointing": True}, "policy": {"gradient_checkpointing": True}},
    ],
)
def test_a_run_is_that_of_a_sharded_model_to_the_bit(tmp_path, changes):
    """FSDP2 on one process, which `cpu_offload` still uses; on a CPU it changes nothing else."""
    options = HALF | {"steps": 2} | changes
    plain = tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **options)
    sharded = tiny_config(tmp_path, output_dir=str(tmp_path / "fsdp"), parallel={"cpu_offload": True}, **options)
    assert join_world(plain) == World(CPU)
    weights, lines = trained(plain)
    expected, expected_lines = trained(sharded)
    assert lines == expected_lines
    assert lines[-1]["policy/grad_norm"] > 0
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight), name


def run_on_rank(_group, values, resume):
    train(build_config(values), resume=resume)


def weights_on_rank(_group, values):
    return weights_of(build_config(values))


def test_checkpoints_go_from_one_process_to_two_and_back(tmp_path):
    def values(name, steps):
        return tiny_values(tmp_path, output_dir=str(tmp_path / name), objective="sft", steps=steps, **HALF)

    weights = {}
    with rank_processes(2) as two:
        for name, order in {"one": (1, 1), "one, two": (1, 2), "two, one": (2, 1)}.items():
            for steps, ranks in enumerate(order, 1):
                if ranks == 1:
                    run_on_rank(None, values(name, steps), steps == 2)
                else:
                    two.run(2, run_on_rank, values(name, steps), steps == 2)
            weights[name] = weights_of(build_config(values(name, 2)))
    for name in ("one, two", "two, one"):
        assert weights[name].keys() == weights["one"].keys()
        for key, expected in weights["one"].items():
            # Adam makes a whole step of the rounding of a gradient near zero.
            difference = (weights[name][key] - expected).abs()
            assert difference.mean() < 2e-4, (name, key)
            assert difference.max() < 5e-3, (name, key)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "tied"), [("causal", True), ("causal", False), ("value", True)])
def test_products_are_in_one_dtype_and_weights_and_gradients_in_the_other(tmp_path, kind, tied, checkpointing):
    path = make_model(tmp_path / "model", tied=tied)
    ours, exact = learner(path, kind=kind, checkpointing=checkpointing), learner(path, kind=kind, compute_dtype=None)
    if kind == "value":
        for model in (ours.model, exact.model):
            torch.manual_seed(0)
            torch.nn.init.normal_(model.score.weight)
    seen = []
    ours.model.model.layers[0].mlp.register_forward_hook(lambda module, _, out: seen.append(out.dtype))
    names, values = list(ours.model.state_dict()), gradients(ours, batch(), loss)
    assert set(seen) == {torch.bfloat16}
    assert not units(ours.model)
    for name, expected in gradients(exact, batch(), loss).items():
        assert values[name].dtype == torch.float32
        torch.testing.assert_close(values[name], expected, rtol=0.1, atol=1e-6 + 0.1 * float(expected.abs().max()))
    # Everything is as it was, whatever happened in between.
    assert names == list(ours.model.state_dict()) == list(exact.model.state_dict())
    with pytest.raises(TypeError):
        ours.model(torch.tensor([1, 2]), packed_layout=object())
    assert all(isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 for p in ours.model.parameters())


def test_weights_are_cast_once_for_many_passes(tmp_path):
    ours = learner(make_model(tmp_path / "model"))
    projection = ours.model.model.layers[0].mlp.up_proj
    seen = []
    projection.register_forward_hook(lambda module, *_: seen.append(module.weight))
    with ours.ordinary_model() as model:
        for _ in range(2):
            model(torch.tensor([[1, 2, 3]]))
    assert seen[0] is seen[1]
    assert seen[0].dtype == torch.bfloat16
    assert projection.weight.dtype == torch.float32
    for _ in range(2):
        ours.score(batch())
    assert seen[-1] is not seen[2]


def test_frozen_weights_are_kept_as_they_are_computed_with(tmp_path):
    config = tiny_config(tmp_path, objective="rloo", loss={"kl_coefficient": 0.1}, **HALF)
    with build(config) as run:
        reference = run.reference.learner
        assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in run.learners["policy"].model.parameters()} == {torch.float32}
        ours, policys = (x.score(batch())["logprob"] for x in (reference, run.learners["policy"]))
    assert torch.equal(ours, policys)
    other = learner(make_model(tmp_path / "other"))
    before = other.score(batch())["logprob"]
    keep_in(other.model, torch.bfloat16)
    assert torch.equal(other.score(batch())["logprob"], before)
