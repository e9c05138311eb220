"""Ties of bfloat16: what an update moves before and after they are broken, and that shards agree."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import CPU
from tiny import tiny_config
from torch import nn

from repirl.distributed.shard import whole
from repirl.distributed.world import World
from repirl.rounding import break_ties
from repirl.run import build

LR = 1e-6


def dequantised(count=20_000, ties=0.08):
    """Weights with ten digits after the leading one, as float16 has them, of which the given share are ties."""
    generator = torch.Generator().manual_seed(0)
    values = 0.05 * torch.randn(count, generator=generator)
    bits = values.view(torch.int32)
    chosen = torch.rand(count, generator=generator) < ties
    bits[chosen] = (bits[chosen] & ~0xFFFF) | 0x8000
    return values


def model_of(values):
    model = nn.Linear(100, len(values) // 100, bias=False)
    model.weight.data.copy_(values.view(-1, 100))
    return model


def moved(values):
    """The mean distance by which an update of LR in a random direction each moves the weights as computed with, in
    units of LR."""
    step = LR * torch.randint(2, values.shape, generator=torch.Generator().manual_seed(1)).mul(2).sub(1)
    return float(((values + step).bfloat16().float() - values.bfloat16().float()).abs().mean()) / LR


def test_the_first_update_moves_computed_weights_by_the_learning_rate():
    values = dequantised(200_000)
    model = model_of(values)
    before = moved(model.weight.detach())
    assert break_ties(model, World(CPU)) == pytest.approx(0.08, abs=0.005)
    after = moved(model.weight.detach())
    assert before > 5
    assert after == pytest.approx(1, abs=0.25)
    # Nothing but ties moves, and these by less than half a step of bfloat16, up or down.
    change = (model.weight.detach().view(-1) - values).abs()
    ties = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert not change[~ties].any()
    assert (change[ties] <= values[ties].abs() * 2**-8).all()
    assert 0.45 < float((model.weight.detach().view(-1)[ties] > values[ties]).float().mean()) < 0.55


def test_few_ties_and_other_types_are_left_alone():
    few = model_of(dequantised(ties=0.005))
    half = model_of(dequantised()).to(torch.bfloat16)
    for model in (few, half):
        expected = model.weight.detach().clone()
        assert break_ties(model, World(CPU)) == 0
        assert torch.equal(model.weight, expected)


def test_names_and_places_decide_alone():
    values = dequantised()
    one, two = model_of(values), model_of(values)
    for model in (one, two):
        break_ties(model, World(CPU))
    assert torch.equal(one.weight, two.weight)
    pair = nn.ModuleDict({"other": model_of(values)})
    break_ties(pair, World(CPU))
    assert not torch.equal(pair["other"].weight, one.weight)


def test_a_run_that_computes_in_bfloat16_breaks_ties_once_for_policy_and_reference(tmp_path, capsys):
    config = tiny_config(tmp_path, compute_dtype="bfloat16", loss={"kl_coefficient": 0.1}, objective="rloo")
    path = Path(config.policy.model) / "model.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        if tensor.dim() == 2:
            tensor.copy_(dequantised(tensor.numel()).view(tensor.shape))
    save_file(tensors, path, {"format": "pt"})
    with build(config) as run:
        policy, reference = (dict(x.model.named_parameters()) for x in (run.learners["policy"], run.reference.learner))
        # The reference is frozen, and kept as it is computed with.
        assert all(torch.equal(whole(policy[n]).bfloat16(), whole(reference[n])) for n in policy)
        assert not all(torch.equal(whole(policy[n]), tensors[n]) for n in policy)
    assert capsys.readouterr().out.count("% of the weights lay halfway between two bfloat16 numbers") == 1
