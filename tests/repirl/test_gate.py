"""The gate: when the policy waits for its PRM, and what an update that waits leaves alone."""

import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_config, tiny_values

from repirl.batch import EXPERT, concatenate, pack
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.export import export_checkpoint
from repirl.gate import Gate, separation
from repirl.loop import train
from repirl.report.log import read_metrics

ALONE = {"loss": {"outcome_coefficient": 0.0}, "irl": {"use_outcome": False}}
RAMP = ALONE | {"irl": {"use_outcome": False, "gate": 1.0, "gate_full": 4.0}}
CLOSED, OPEN = 1e9, 1e-9


def two_sides(expert_means, rollout_means):
    """Responses of two tokens with these means, a list for each prompt; the first token has the mean plus 1."""
    parts = []
    for source, prompts in ((EXPERT, expert_means), (1, rollout_means)):
        groups = [i for i, means in enumerate(prompts) for _ in means]
        part = pack([([3], [4, 1])] * len(groups), group_ids=groups, source=source)
        values = [x for means in prompts for m in means for x in (m + 1.0, m - 1.0)]
        part.write("reward", torch.tensor(values))
        parts.append(part)
    batch = concatenate(parts)
    return separation(batch.read("reward"), batch)


def test_z_counts_each_prompt_once():
    experts, rollouts = [[1.0], [2.0, 4.0]], [[0.0, 1.0], [-1.0], [0.5, 0.5]]
    # Prompts' means: 1 and 3, and 0.5, -1 and 0.5; variances 2 and 0.75.
    assert two_sides(experts, rollouts) == pytest.approx(2.0 / math.sqrt(2.0 / 2 + 0.75 / 3))
    assert two_sides(rollouts, experts) == pytest.approx(-2.0 / math.sqrt(2.0 / 2 + 0.75 / 3))


def test_z_where_nothing_varies_or_little_is_there():
    assert two_sides([[0.0], [0.0]], [[0.0], [0.0]]) == 0.0
    assert two_sides([[1.0], [1.0]], [[0.0], [0.0]]) == math.inf
    assert two_sides([[0.0], [0.0]], [[1.0], [1.0]]) == -math.inf
    assert math.isnan(two_sides([[1.0, 2.0]], [[0.0], [0.0]]))


def test_what_the_gate_does_at_each_z(tmp_path):
    gate = Gate(tiny_config(tmp_path, **ALONE))
    assert gate.threshold == 2.0
    for z, holds in ((1.9, True), (2.0, False), (math.nan, True), (math.inf, False)):
        gate.begin(0)
        gate.z = z
        assert gate.rate("policy") == float(not holds)
        assert gate.rate("prm") == 1.0
        assert gate.metrics() == {"policy/held": float(holds)} | ({} if math.isnan(z) else {"policy/gate_z": z})
    # Unless it is set, there is none beside an outcome reward.
    assert Gate(tiny_config(tmp_path)).metrics() == {}
    assert Gate(tiny_config(tmp_path, **ALONE | {"irl": {"use_outcome": False, "gate": None}})).threshold is None


def test_the_rate_grows_with_z_between_gate_and_gate_full(tmp_path):
    gate = Gate(tiny_config(tmp_path, **RAMP))
    for z, factor in ((0.5, 0.0), (1.0, 0.0), (1.75, 0.25), (3.0, 2 / 3), (4.0, 1.0), (9.0, 1.0), (math.inf, 1.0)):
        gate.begin(0)
        gate.z = z
        assert gate.rate("policy") == pytest.approx(factor, abs=1e-15)
        assert gate.rate("prm") == 1.0
        metrics = gate.metrics()
        assert metrics.pop("policy/gate_factor") == gate.rate("policy")
        assert metrics == {"policy/held": float(factor == 0), "policy/gate_z": z}
    gate.begin(1)
    assert gate.metrics() == {"policy/held": 1.0, "policy/gate_factor": 0.0}


def weights(config, side="policy"):
    export_checkpoint(config.output_dir, f"{config.output_dir}-export")
    return load_file(f"{config.output_dir}-export/{side}/model.safetensors")


def run(folder, name, **changes):
    config = tiny_config(folder, output_dir=str(folder / name), **changes)
    train(config)
    return config, read_metrics(folder / name / "metrics.jsonl")[1:]


def differs(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


def test_a_held_policy_keeps_its_weights_while_the_prm_learns(tmp_path):
    irl = {"use_outcome": False, "gate": CLOSED}
    config, lines = run(tmp_path, "held", steps=2, **ALONE | {"irl": irl})
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert not differs(weights(config), start)
    assert weights(config, "prm")["score.weight"].abs().max() > 0
    assert [line["policy/held"] for line in lines] == [1.0, 1.0]
    # The head starts at 0, so that at first nothing tells the sides apart.
    assert lines[0]["policy/gate_z"] == 0.0
    assert math.isfinite(lines[1]["policy/gate_z"])
    assert not any("policy/loss" in line for line in lines)
    config, lines = run(tmp_path, "free", steps=2, **ALONE | {"irl": {"use_outcome": False, "gate": None}})
    assert differs(weights(config), start)
    assert "policy/held" not in lines[0]


def test_the_factor_scales_the_policys_rate_and_nothing_else(tmp_path, monkeypatch):
    """A third of the rate by the gate is a third of it by hand; the PRM, and an open gate, are as without it."""
    irl = {"use_outcome": False, "gate": OPEN}
    open_config, plain = run(tmp_path, "open", steps=2, **ALONE | {"irl": irl})
    monkeypatch.setattr(Gate, "factor", property(lambda gate: 1 / 3))
    config, ramped = run(tmp_path, "ramp", steps=2, **ALONE | {"irl": irl | {"gate_full": 1.0}})
    monkeypatch.setattr(Gate, "factor", property(lambda gate: 1.0))
    rate = open_config.policy.optimizer.lr
    by_hand, lines = run(tmp_path, "hand", steps=2, policy={"optimizer": {"lr": rate / 3}}, **ALONE | {"irl": irl})
    assert [line["policy/gate_factor"] for line in ramped] == [1 / 3, 1 / 3]
    assert [line["policy/lr"] for line in ramped] == pytest.approx([rate / 3, rate / 3])
    assert not differs(weights(config), weights(by_hand))
    assert not differs(weights(config, "prm"), weights(by_hand, "prm"))
    assert all("policy/gate_factor" not in line for line in (*plain, *lines))


def test_a_ramp_holds_after_a_resumption(tmp_path):
    changes = RAMP | {"irl": {"use_outcome": False, "gate": OPEN, "gate_full": 50.0}, "order": "policy_first"}
    whole_config, whole = run(tmp_path, "whole", steps=4, **changes)
    run(tmp_path, "parts", steps=2, **changes)
    config = tiny_config(tmp_path, output_dir=str(tmp_path / "parts"), steps=4, **changes)
    train(config, resume=True)
    parts = read_metrics(tmp_path / "parts" / "metrics.jsonl")[1:]
    names = ("policy/held", "policy/gate_z", "policy/gate_factor", "policy/lr")
    assert [[line.get(name) for name in names] for line in parts] == [
        [line.get(name) for name in names] for line in whole
    ]
    assert any(0 < line["policy/gate_factor"] < 1 for line in whole)
    assert not differs(weights(config), weights(whole_config))


def test_an_outcome_reward_goes_on_when_the_gate_is_closed(tmp_path):
    config, lines = run(tmp_path, "held", steps=2, irl={"gate": CLOSED})
    assert [line["policy/held"] for line in lines] == [1.0, 1.0]
    alone, _ = run(tmp_path, "outcome", steps=2, loss={"process_coefficient": 0.0})
    assert not differs(weights(config), weights(alone))
    both, _ = run(tmp_path, "both", steps=2)
    assert differs(weights(config), weights(both))


def test_the_policy_waits_for_the_prms_warm_up_turns(tmp_path):
    gate = {"use_outcome": False, "gate": None}
    config, lines = run(tmp_path, "run", steps=3, **ALONE | {"prm": {"warmup_turns": 2}, "irl": gate})
    assert [line["policy/held"] for line in lines] == [1.0, 1.0, 0.0]
    assert ["policy/loss" in line for line in lines] == [False, False, True]
    assert all("prm/loss" in line for line in lines)
    assert differs(weights(config), load_file(tmp_path / "model" / "model.safetensors"))


def test_with_the_policy_first_the_turn_before_decides_also_after_a_resumption(tmp_path):
    changes = ALONE | {"irl": {"use_outcome": False, "gate": OPEN}, "order": "policy_first"}
    _, whole = run(tmp_path, "whole", steps=4, **changes)
    run(tmp_path, "parts", steps=2, **changes)
    config = tiny_config(tmp_path, output_dir=str(tmp_path / "parts"), steps=4, **changes)
    train(config, resume=True)
    parts = read_metrics(tmp_path / "parts" / "metrics.jsonl")[1:]
    assert whole[0]["policy/held"] == 1.0
    assert "policy/gate_z" not in whole[0]
    names = ("policy/held", "policy/gate_z", "policy/loss", "prm/loss")
    assert [[line.get(name) for name in names] for line in parts] == [
        [line.get(name) for name in names] for line in whole
    ]
    assert all("policy/gate_z" in line for line in whole[1:])


def test_a_policy_without_updates_is_only_read(tmp_path):
    changes = ALONE | {"policy": {"updates_per_step": 0}, "rollout": {"samples_per_prompt": 1}}
    config, lines = run(tmp_path, "prm", steps=2, **changes)
    assert config.system.trains == ("prm",)
    assert all("prm/loss" in line and "policy/loss" not in line and "policy/held" not in line for line in lines)
    assert weights(config, "prm")["score.weight"].abs().max() > 0
    # The verifier is for the policy's reward alone here, so no answers are needed.
    data = {"answer_column": None, "eval": None}
    run(tmp_path, "no answers", steps=1, **changes | {"data": data, "loss": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "rloo", "irl": {"gate": 2.0}}, "irl.gate is set, but objective 'rloo' trains no policy"),
        ({"objective": "sft", "prm": {"warmup_turns": 1}}, "prm.warmup_turns is set, but objective 'sft'"),
        ({"policy": {"updates_per_step": 0}, "irl": {"gate": 2.0}}, "irl.gate is set"),
        ({"objective": "rloo", "irl": {"gate_full": 3.0}}, "irl.gate_full is set, but objective 'rloo'"),
        ({"irl": {"gate_full": 3.0}}, "irl.gate_full is 3.0, but the policy has an outcome reward"),
        (ALONE | {"irl": {"use_outcome": False, "gate_full": 2.0}}, "gate_full is 2.0, and irl.gate 2.0"),
        (
            ALONE | {"irl": {"use_outcome": False, "gate": None, "gate_full": 2.0}},
            "gate_full is 2.0, and irl.gate None",
        ),
        ({"prm": {"warmup_turns": 4}}, "prm.warmup_turns is 4 of 4 steps"),
        ({"objective": "rloo", "policy": {"updates_per_step": 0}}, "objective 'rloo' trains nothing else"),
        ({"irl": {"experts": "matched", "experts_per_step": 5}}, "irl.experts_per_step is 5, but irl.experts"),
        ({"policy": {"optimizer": {"head_lr": 1e-3}}}, "policy.optimizer has head_lr"),
        ({"prm": {"reward": "logit", "optimizer": {"head_updates": 3}}}, "prm.optimizer has head_lr or head_updates"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_config(tiny_values(tmp_path, **changes))


def test_implicit_rewards_have_the_scale_of_their_system(tmp_path):
    prime = {"objective": "prime", "prm": {"reward": "implicit"}}
    assert tiny_config(tmp_path, **prime).prm.beta == 0.05
    assert tiny_config(tmp_path, **prime | {"prm": {"reward": "implicit", "beta": 0.3}}).prm.beta == 0.3
    assert tiny_config(tmp_path, prm={"reward": "implicit"}).prm.beta == 1.0


def test_value_rewards_alone_without_a_gate_are_warned_of(tmp_path):
    ungated = ALONE | {"irl": {"use_outcome": False, "gate": None}}
    [warning] = tiny_config(tmp_path, **ungated).warnings
    assert "set irl.gate: 2.0" in warning
    assert tiny_config(tmp_path, **ALONE).warnings == []
    assert tiny_config(tmp_path, **ungated | {"prm": {"reward": "logprob"}}).warnings == []
    assert tiny_config(tmp_path, irl={"gate": None}).warnings == []
