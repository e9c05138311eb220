"""The policy's objective: its options reach advantages and loss; presets of the systems that they make train."""

from itertools import pairwise

import pytest
import torch
from repirl_kernels import advantages
from tiny import tiny_config, tiny_values

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.configfile import build_config, load_preset, merge
from repirl.loop import train
from repirl.objectives.rloo import RLOO, overlong_penalty
from repirl.report.log import read_metrics

LENGTHS = [3, 5, 4, 2, 6, 12]
OUTCOME = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]


def batch():
    """Two prompts with three responses each, and what the loop writes."""
    rollouts = pack([([1], [2] * n) for n in LENGTHS], group_ids=[0, 0, 0, 1, 1, 1], outcome=OUTCOME)
    generator = torch.Generator().manual_seed(0)
    for name in ("reward", "old_logprob", "sampler_logprob"):
        noise = torch.randn(rollouts.num_response_tokens, generator=generator)
        rollouts.write(name, noise if name == "reward" else -noise.abs())
    return rollouts


def advantage_of(tmp_path, **loss):
    rollouts = batch()
    objective = RLOO(tiny_config(tmp_path, prm={"reward": "logprob"}, loss=loss))
    objective.prepare(rollouts)
    assert rollouts.outcome.tolist() == OUTCOME
    return rollouts.read("advantage")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"leave_one_out": False, "scale": "group"},
        {"scale": "batch", "whiten": True},
        {"baseline": "position", "gamma": 0.9},
        {"baseline": "none"},
        {"process_norm": "return"},
        {"process_norm": "std", "process_std_floor": 0.5},
        {"credit": "min", "credit_temperature": 0.3},
        {"outcome_coefficient": 0.0, "process_coefficient": 1.0},
    ],
)
def test_options_of_the_advantage(tmp_path, options):
    rollouts = batch()
    given = {"outcome_coefficient": 1.0, "process_coefficient": 0.05} | options
    expected = advantages.rloo_advantages(
        rollouts.outcome, rollouts.read("reward"), rollouts.response_cu_seqlens, rollouts.group_ids, **given
    )
    actual = advantage_of(tmp_path, **options)
    torch.testing.assert_close(actual, expected)
    if options:
        assert not torch.allclose(actual, advantage_of(tmp_path))


def test_entropy_is_in_the_return_or_a_bonus(tmp_path):
    rollouts, beta = batch(), 0.3
    plain = advantage_of(tmp_path)
    in_return = advantage_of(tmp_path, entropy_coefficient=beta, entropy_in="return")
    surprise = advantages.rloo_advantages(
        None,
        -beta * rollouts.read("old_logprob"),
        rollouts.response_cu_seqlens,
        rollouts.group_ids,
        outcome_coefficient=0.0,
        process_coefficient=1.0,
    )
    torch.testing.assert_close(in_return, plain + surprise)
    torch.testing.assert_close(advantage_of(tmp_path, entropy_coefficient=beta), plain)
    losses = {}
    for entropy_in in ("bonus", "return"):
        config = tiny_config(tmp_path, loss={"entropy_coefficient": beta, "entropy_in": entropy_in})
        rollouts = batch()
        rollouts.write("advantage", plain)
        rollouts.write("loss_weight", torch.ones_like(plain))
        outputs = {"logprob": rollouts.read("old_logprob"), "entropy": torch.ones_like(plain)}
        losses[entropy_in] = float(RLOO(config).loss(outputs, rollouts)[0])
    assert losses["bonus"] == pytest.approx(losses["return"] - beta * plain.numel(), rel=1e-5)


def test_the_overlong_penalty_is_linear_in_the_last_tokens():
    cu = torch.tensor([16384, 16385, 18432, 20480, 9]).cumsum(0)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), cu])
    assert overlong_penalty(cu, 20480, 4096).tolist() == [0.0, 1 / 4096, 0.5, 1.0, 0.0]
    assert overlong_penalty(cu, 20480, 0).tolist() == [0.0] * 5


def test_the_penalty_lowers_the_policys_outcome_alone(tmp_path):
    # Of at most 12 tokens the last 8 count: lengths 3, 5, 4, 2, 6, 12 lose 0, 1/8, 0, 0, 2/8, 8/8.
    outcome = torch.tensor([1.0, -1 / 8, 0.0, 1.0, -2 / 8, 0.0])
    expected = torch.cat(
        [
            (outcome[i] - (outcome[3 * (i // 3) : 3 * (i // 3) + 3].sum() - outcome[i]) / 2).expand(n)
            for i, n in enumerate(LENGTHS)
        ]
    )
    torch.testing.assert_close(advantage_of(tmp_path, overlong_tokens=8, process_coefficient=0.0), expected)


def ratio_term(logratio, advantage, options):
    """A token's loss, from its log-ratio or its sequence's, with clips at 0.8 and 1.2."""
    ratio = logratio.exp()
    if options.get("form") == "cispo":
        return -ratio.clamp(0.8, 1.2) * advantage
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    bound = options.get("clip_dual")
    return -gain if bound is None else -torch.where(advantage < 0, torch.maximum(gain, bound * advantage), gain)


@pytest.mark.parametrize("options", [{"ratio": "sequence"}, {"form": "cispo"}, {"clip_dual": 1.5}])
def test_options_of_the_loss_and_micro_batches(tmp_path, options):
    loss = {"entropy_coefficient": 0.0, "sampler_ratio_cap": None, "process_coefficient": 0.0} | options
    objective, rollouts = RLOO(tiny_config(tmp_path, loss=loss, prm={"reward": "logprob"})), batch()
    objective.prepare(rollouts)
    old, advantage = rollouts.read("old_logprob"), rollouts.read("advantage")
    logprob = old + 0.4 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
    logratio = logprob - old
    if options.get("ratio") == "sequence":
        pieces = pairwise(rollouts.response_cu_seqlens.tolist())
        logratio = torch.cat([logratio[a:b].mean().expand(b - a) for a, b in pieces])
    terms = ratio_term(logratio, advantage, options)
    expected = (terms * logprob if options.get("form") == "cispo" else terms).mean()
    parts = torch.zeros(())
    for chosen in ([4, 0], [1, 5, 2], [3]):
        outputs = {"logprob": logprob[rollouts.response_positions(chosen)]}
        outputs["entropy"] = torch.zeros_like(outputs["logprob"])
        part, figures = objective.loss(outputs, rollouts.select(chosen))
        assert figures["clip_fraction"][1] == sum(LENGTHS[i] for i in chosen)
        parts += part
    torch.testing.assert_close(parts, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"form": "cispo", "clip_dual": 3.0}}, "loss.clip_dual is 3.0, but loss.form 'cispo'"),
        ({"loss": {"clip_dual": 0.5}}, "loss.clip_dual"),
        ({"loss": {"overlong_tokens": 13}}, "loss.overlong_tokens is 13, more than the 12 of"),
        (
            {"objective": "rloo", "loss": {"process_norm": "std"}},
            "process_norm is 'std', but the policy has no process",
        ),
        ({"objective": "rloo", "loss": {"baseline": "position"}}, "baseline is 'position', but .* no process reward"),
        (
            {"loss": {"process_coefficient": 0.0, "credit": "min"}},
            "credit is 'min', but the policy has no process reward",
        ),
        ({"loss": {"outcome_coefficient": 0.0, "scale": "group"}}, "scale is 'group', but the policy has no outcome"),
        ({"rollout": {"samples_per_prompt": 1}}, "needs 2 or more responses a prompt"),
    ],
)
def test_options_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)


def test_one_response_a_prompt_needs_no_baseline(tmp_path):
    changes = {"objective": "rloo", "rollout": {"samples_per_prompt": 1}, "eval": {"every": 0}, "steps": 1}
    train(tiny_config(tmp_path, loss={"baseline": "none", "whiten": True}, **changes))
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["policy/skipped_updates"] == 0


SYSTEMS = ["rloo", "grpo", "dr-grpo", "dapo", "gspo", "sft"]


@pytest.mark.parametrize("preset", [*SYSTEMS, *(f"demo-{name}" for name in SYSTEMS)])
def test_presets_train(tmp_path, preset):
    """Three turns with a tiny model, in place of theirs, on tiny data."""
    tiny = tiny_values(tmp_path)
    values = merge(
        load_preset(preset),
        {
            "output_dir": str(tmp_path / "run"),
            "compute_dtype": None,
            "steps": 3,
            "device": "cpu",
            "policy": {"model": tiny["policy"]["model"], "optimizer": {"lr": 1e-3, "warmup_steps": 0}},
            "data": tiny["data"] | {"prompt_column": "prompt", "chat_template": False, "prompt_template": "{prompt}"},
            "verifier": {"kind": "custom", "function": "judges:even_length"},
            "rollout": {"prompts_per_step": 3, "max_response_tokens": 12},
            "irl": {"experts_per_step": 4} if preset.endswith("sft") else {},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
            "log": {"tensorboard": False},
        },
    )
    if "overlong_tokens" in values.get("loss", {}):
        values["loss"] = values["loss"] | {"overlong_tokens": 4}
    config = build_config(values)
    train(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    # In the second update of GSPO's narrow clip all responses may be beyond it.
    assert all(line["policy/grad_norm"] > 0 or line["policy/clip_fraction"] > 0.3 for line in lines)
    assert lines[-1]["policy/skipped_updates"] == 0
    assert all(("filter/kept" in line) == preset.endswith("dapo") for line in lines)
    if config.policy.updates_per_step > 1:
        assert any(line["policy/clip_fraction"] > 0 for line in lines)
