"""What each learner holds: of the weights and moments of PyTorch and torchao, and by the table of systems."""

import math

import pytest
import torch
from plan_cases import configured, merged, model_config, phases

from repirl.plan.activations import load_shape
from repirl.plan.plan import make_planner, plan
from repirl.systems import SYSTEMS, System


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


def test_a_prm_of_another_shape_has_its_own_heads(tmp_path):
    # In float32 on a GPU keys and values are repeated where query heads share them: the PRM's do, the policy's do not.
    grouped = configured(tmp_path, compute_dtype="float32")
    model_config("llama", num_key_value_heads=4).save_pretrained(tmp_path / "other")
    other = merged(grouped, policy={"model": str(tmp_path / "other")}, prm={"model": grouped.policy.model})
    rows = [phases(plan(config, device="cuda"))["prm"].rows for config in (grouped, other)]
    assert rows[0]["activations"] == rows[1]["activations"]


def test_a_frozen_prm_has_weights_and_nothing_else(tmp_path, monkeypatch):
    row = System(
        "the policy on a PRM that stays as it is",
        objectives={"policy": "repirl.objectives.rloo:RLOO"},
        data=("prompts", "answers"),
        online=True,
        reads=("prm",),
    )
    monkeypatch.setitem(SYSTEMS, "frozen", row)
    config = configured(tmp_path)
    config = merged(config, objective="frozen", prm={"model": config.policy.model}, irl={"base_measure": "uniform"})
    planned = plan(config)
    assert list(phases(planned)) == ["load", "rollout", "old_logprob", "reward", "policy", "checkpoint"]
    shape = load_shape(config.policy.model)
    for name, phase in phases(planned).items():
        assert phase.rows["PRM weights"] == 4 * sum(map(math.prod, shape.weights(reads_values=True))), name
        assert "PRM moments" not in phase.rows
    side = make_planner(config, 1, "cpu").by_name["prm"]
    assert (side.gradients, side.moments, side.embeddings, side.head) == (0, 0, 0, 0)
    # It is not written, and without a share in the reward it is not asked.
    asynchronous = {"checkpoint": {"asynchronous": True}}
    copied = phases(plan(merged(config, **asynchronous)))["policy"].rows
    assert copied["checkpoint copy"] == copied["policy weights"] + copied["policy moments"]
    assert "reward" not in phases(plan(merged(config, loss={"process_coefficient": 0.0})))


def test_a_system_without_a_policy_holds_none(tmp_path, monkeypatch):
    row = System("a PRM alone", objectives={"prm": "repirl.objectives.sft:SFT"}, data=("experts",), online=False)
    monkeypatch.setitem(SYSTEMS, "alone", row)
    planned = phases(plan(configured(tmp_path, objective="alone")))
    assert list(planned) == ["load", "prm", "checkpoint"]
    assert not any("policy" in name or "reference" in name for phase in planned.values() for name in phase.rows)
    assert planned["prm"].rows["PRM moments"] > 0
