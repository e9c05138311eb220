"""The dual loop end to end on a tiny model: every objective and reward model, survival, export."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import make_model, tiny_config, tiny_values
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from repirl.batch import EXPERT, pack
from repirl.checkpoint.manifest import list_checkpoints, resolve_checkpoint
from repirl.cli import main
from repirl.config import ConfigError
from repirl.distributed.world import World
from repirl.export import export_checkpoint
from repirl.irlconfig import IRLConfig
from repirl.learner import Learner
from repirl.loop import train
from repirl.models import load_model, load_tokenizer
from repirl.objectives import irl
from repirl.objectives.rloo import RLOO
from repirl.options import PRMConfig
from repirl.report.log import read_metrics
from repirl.rewards import read_rewards
from repirl.rollout.engine import MismatchError
from repirl.rollout.sampler import Sampler
from repirl.run import Reference, build, needs_reference
from repirl.systems import SYSTEMS
from repirl.work import PhaseTimer

SECONDS = ("seconds/", "tokens_per_second/", "mfu/", "memory/")


def metrics_of(config):
    """Lines of a run, without what differs between equal runs: speed and memory."""
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(SECONDS)} for line in lines]


def weights_of(config):
    run = build(config)
    run.restore(resolve_checkpoint(config.output_dir))
    return {
        f"{name}.{key}": value.clone()
        for name, learner in run.learners.items()
        for key, value in learner.model.state_dict().items()
    }


@pytest.mark.parametrize("reward", ["value", "logit", "soft_q", "logprob", "implicit"])
def test_every_reward_model_trains_both_sides(tmp_path, reward):
    config = tiny_config(tmp_path, steps=2, prm={"reward": reward}, irl={"use_outcome": False})
    assert train(config) == 2
    lines = metrics_of(config)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["prm/grad_norm"] > 0
        assert line["policy/grad_norm"] > 0
        assert line["rollout/sampler_mismatch_max"] < 1e-4
    trained, start = weights_of(config), build(config)
    for name, learner in start.learners.items():
        same = [torch.equal(trained[f"{name}.{k}"], v) for k, v in learner.model.state_dict().items()]
        assert not all(same), f"{name} did not move"


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "rloo"},
        {"objective": "rloo", "loss": {"kl_coefficient": 0.1, "kl_estimator": "k2", "whiten": True}},
        {"objective": "sft"},
        {"order": "policy_first", "irl": {"base_measure": "reference", "weights": "token"}},
        {"irl": {"weights": "trajectory", "target_ess": 0.5, "smooth": "psis", "truncate": 3.0}},
        {"irl": {"group": "batch", "normalize": "token", "reward_l2": 0.1, "weights": "uniform"}},
        {
            "loss": {"outcome_coefficient": 0.0},
            "irl": {"use_outcome": False, "gate": None},
            "data": {"answer_column": None, "eval": None},
        },
        {"policy": {"updates_per_step": 2}, "prm": {"updates_per_step": 3}, "batch": {"tokens_per_microbatch": 20}},
        {"loss": {"aggregation": "constant_length", "gamma": 0.9, "clip_high": 0.3, "sampler_ratio_cap": None}},
    ],
)
def test_options_run(tmp_path, changes):
    config = tiny_config(tmp_path, steps=2, **changes)
    train(config)
    last = metrics_of(config)[-1]
    assert last["step"] == 2
    assert last["policy/grad_norm"] > 0
    assert "nonfinite" not in last


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sampler_without_a_cache_ends_the_run(tmp_path, capsys, monkeypatch, dtype):
    """As where a model's forward swallows the cache under a name that it does not know."""
    changes = {"compute_dtype": dtype, "rollout": {"prompts_per_step": 8}}
    train(tiny_config(tmp_path, steps=1, output_dir=str(tmp_path / "sound"), **changes))
    monkeypatch.setattr("repirl.rollout.transformers.cache_argument", lambda _: "no_such_cache")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tmp_path, **changes)))
    capsys.readouterr()
    assert main(["train", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert "does not sample from the policy" in error
    assert f"rounding in {dtype} explains {'0.01 at most' if dtype == 'float32' else '0.25 in the mean'}" in error
    assert "repirl[train]" in error
    assert "Traceback" not in error
    # Nothing was trained on it: of the steps, only the evaluation before the first is there.
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0]


@pytest.mark.parametrize(
    ("changes", "mismatch", "ends"),
    [
        ({}, [5e-4, 9e-3], False),
        ({}, [0.0, 1.1e-2], True),
        ({}, [0.0, float("inf")], True),
        # What is not finite is the trainer's to find.
        ({}, [0.0, float("nan")], False),
        # Rounding of logits is divided by the temperature as they are.
        ({"rollout": {"temperature": 0.1}}, [0.0, 9e-2], False),
        ({"rollout": {"temperature": 0.1}}, [0.0, 0.11], True),
        # bfloat16: single tokens are far off, all of them together are not.
        ({"compute_dtype": "bfloat16"}, [0.4, 0.0, 0.0, 0.0], False),
        ({"compute_dtype": "bfloat16"}, [0.4, 0.2], True),
        # These are checked when they take weights, and their rollouts may come from older ones.
        ({"rollout": {"engine": "vllm"}}, [0.4, 0.2], False),
        ({"rollout": {"engine": "vllm_server", "overlap": "step"}}, [5.0], False),
    ],
)
def test_how_far_a_sampler_may_be_from_the_trainer(tmp_path, changes, mismatch, ends):
    config, policy = tiny_config(tmp_path, **changes), SimpleNamespace(model=None, world=World(torch.device("cpu")))
    sampler = Sampler(config, policy, load_tokenizer(config.policy.model), None, None, None, PhaseTimer())
    with pytest.raises(MismatchError) if ends else nullcontext():
        sampler.check(torch.tensor(mismatch))


def test_training_with_experts_raises_their_likelihood(tmp_path):
    config = tiny_config(tmp_path, objective="sft", steps=30, eval={"every": 0}, checkpoint={"every": 0})
    train(config)
    lines = metrics_of(config)
    assert lines[-1]["policy/loss"] < 0.7 * lines[0]["policy/loss"]


def test_a_run_repeats_to_the_bit(tmp_path):
    first, second = (tiny_config(tmp_path, output_dir=str(tmp_path / name)) for name in "ab")
    train(first)
    train(second)
    assert metrics_of(first) == metrics_of(second)
    third = tiny_config(tmp_path, output_dir=str(tmp_path / "c"), seed=1)
    train(third)
    assert metrics_of(third) != metrics_of(first)


def test_micro_batches_do_not_change_a_step(tmp_path):
    results = []
    for budget in (16, 100_000):
        config = tiny_config(
            tmp_path, output_dir=str(tmp_path / str(budget)), steps=1, batch={"tokens_per_microbatch": budget}
        )
        train(config)
        results.append(metrics_of(config)[-1])
    for key in ("policy/loss", "policy/grad_norm", "prm/loss", "prm/grad_norm", "policy/advantage_std"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4, abs=1e-6), key


def test_kill_9_and_resume_continues_to_the_bit(tmp_path):
    """N steps = k steps, kill -9 at an arbitrary moment, resume: same metrics and same weights."""
    options = {"steps": 12, "prm": {"reward": "logprob"}, "irl": {"use_outcome": False}}
    whole = tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    train(whole)

    killed = tiny_values(tmp_path, output_dir=str(tmp_path / "killed"), **options)
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(killed))
    code = (
        f"from repirl.configfile import load_config; from repirl.loop import train; train(load_config({str(file)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    folder, deadline = tmp_path / "killed" / "checkpoints", time.monotonic() + 120
    while len(list_checkpoints(folder)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    config = tiny_config(tmp_path, output_dir=str(tmp_path / "killed"), **options)
    resumed_from = int(list_checkpoints(folder)[-1].name.removeprefix("step_"))
    assert 0 < resumed_from < 12
    train(config, resume=True)

    assert metrics_of(config) == metrics_of(whole)
    ours, theirs = weights_of(config), weights_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_save_that_dies_half_way_costs_nothing(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=1)
    train(config)
    folder = Path(config.output_dir) / "checkpoints"
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    longer = tiny_config(tmp_path, steps=2)

    def die(*_, **__):
        raise KeyboardInterrupt

    for target in ("repirl.checkpoint.save._flush", "repirl.checkpoint.save.dcp.save"):
        with monkeypatch.context() as patch:
            patch.setattr(target, die)
            with pytest.raises(KeyboardInterrupt):
                train(longer, resume=True)
        assert [p.name for p in list_checkpoints(folder)] == ["step_1"]
        assert (folder / "step_2.tmp").exists()
        after = {p.relative_to(folder): p.read_bytes() for p in (folder / "step_1").rglob("*") if p.is_file()}
        assert before == after
    train(longer, resume=True)
    assert [p.name for p in list_checkpoints(folder)] == ["step_1", "step_2"]
    assert not list(folder.glob("*.tmp"))


def test_old_checkpoints_are_pruned(tmp_path):
    config = tiny_config(tmp_path, steps=4, checkpoint={"every": 1, "keep_last": 2})
    train(config)
    names = [p.name for p in list_checkpoints(Path(config.output_dir) / "checkpoints")]
    assert names == ["step_3", "step_4"]


def test_the_best_checkpoints_are_kept_besides_the_newest(tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3, 0.9, 0.2, 0.1])
    monkeypatch.setattr("repirl.evaluate.accuracy", lambda _: next(scores))
    checkpoint = {"every": 1, "keep_last": 1, "keep_best": 2}
    config = tiny_config(tmp_path, steps=5, eval={"every": 1}, checkpoint=checkpoint)
    train(config)
    names = [p.name for p in list_checkpoints(Path(config.output_dir) / "checkpoints")]
    # The first score is of step 0, which has no checkpoint; of equals the earlier one is better.
    assert names == ["step_1", "step_3", "step_5"]


def test_metrics_tell_speed_padding_and_utilisation(tmp_path):
    config = tiny_config(tmp_path, steps=1, log={"peak_tflops": 1.0}, eval={"every": 0})
    train(config)
    line = read_metrics(Path(config.output_dir) / "metrics.jsonl")[-1]
    for phase in ("rollout", "old_logprob", "policy"):
        assert line[f"tokens_per_second/{phase}"] > 0
        assert 0 <= line[f"padding/{phase}"] < 0.5
        assert 0 < line[f"mfu/{phase}"] < 1
    # Every token of the rollouts once through the policy.
    scored = line["tokens_per_second/old_logprob"] * line["seconds/old_logprob"]
    assert round(scored) == line["tokens"]
    # Three times a forward pass's operations for forward and backward, the same tokens.
    operations = {p: line[f"mfu/{p}"] * line[f"seconds/{p}"] for p in ("old_logprob", "policy")}
    assert operations["policy"] == pytest.approx(3 * operations["old_logprob"])


def test_a_resumed_run_takes_new_options_of_the_optimiser(tmp_path):
    """What the configuration says now is what counts, the moments and the schedule's place go on."""
    train(tiny_config(tmp_path, steps=2))
    optimizer = {"lr": 5e-4, "weight_decay": 0.1, "schedule": "linear"}
    config = tiny_config(tmp_path, steps=4, policy={"optimizer": optimizer})
    with pytest.raises(ConfigError, match=r"steps 2 -> 4; .*lr 0.001 -> 0.0005; .*--changed steps,policy.optim"):
        train(config, resume=True)
    run = build(config)
    run.restore(resolve_checkpoint(config.output_dir))
    optimizer = run.learners["policy"].optimizer
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert [g["lr"] for g in optimizer.param_groups] == [2.5e-4] * 2
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())
    train(config, resume=True, changed=["steps", "policy.optimizer"])
    rates = [line["policy/lr"] for line in metrics_of(config) if "policy/lr" in line]
    assert rates == pytest.approx([1e-3, 1e-3, 2.5e-4, 1.25e-4])


def test_a_run_is_never_overwritten_by_accident(tmp_path):
    config = tiny_config(tmp_path, steps=1)
    train(config)
    with pytest.raises(ConfigError, match=r"already holds a run .*--resume"):
        train(config)


def test_resuming_with_other_data_is_refused(tmp_path):
    train(tiny_config(tmp_path, steps=1))
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    values = tiny_values(tmp_path, steps=2)
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:-3]))
    from repirl.configfile import build_config

    with pytest.raises(ConfigError, match=r"content of data.train \(24 rows, .* -> 21 rows, "):
        train(build_config(values), resume=True)


@pytest.mark.parametrize("reward", ["value", "logprob"])
def test_export_loads_as_plain_models_with_equal_outputs(tmp_path, reward):
    config = tiny_config(tmp_path, steps=2, prm={"reward": reward}, irl={"use_outcome": False})
    train(config)
    written = export_checkpoint(config.output_dir, tmp_path / "export")
    assert [p.name for p in written] == ["policy", "prm"]
    run = build(config)
    run.restore(resolve_checkpoint(config.output_dir))
    pairs = [([3, 4, 5], [6, 7, 8, 1]), ([9], [10, 1])]
    batch = pack(pairs)

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "policy", dtype=torch.float32)
    assert type(policy).__name__ == "Qwen3ForCausalLM"
    expected = [
        policy(torch.tensor([p + r])).logits[0, len(p) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(r)[:, None])
        for p, r in pairs
    ]
    ours = run.learners["policy"].score(batch)["logprob"]
    torch.testing.assert_close(ours, torch.cat(expected)[:, 0].detach(), atol=2e-5, rtol=1e-5)

    scored = run.learners["prm"].score(batch)
    if reward == "value":
        prm = AutoModelForTokenClassification.from_pretrained(tmp_path / "export" / "prm", dtype=torch.float32).eval()
        expected = [prm(torch.tensor([p + r])).logits[0, len(p) :, 0] for p, r in pairs]
        assert float(torch.cat(expected).abs().max()) > 0
        torch.testing.assert_close(scored["value"], torch.cat(expected).detach(), atol=2e-5, rtol=1e-5)
    else:
        prm = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "prm", dtype=torch.float32)
        ids = torch.tensor([pairs[0][0] + pairs[0][1]])
        expected = prm(ids).logits[0, 2:-1].log_softmax(-1).gather(1, torch.tensor(pairs[0][1])[:, None])[:, 0]
        torch.testing.assert_close(scored["logprob"][:4], expected.detach(), atol=2e-5, rtol=1e-5)


def test_outcome_decides_who_is_an_expert():
    experts = pack([([3], [4, 1])], group_ids=[-1], source=EXPERT)
    rollouts = pack(
        [([3], [5, 1]), ([3], [6, 1]), ([3], [7, 1])], group_ids=[0, 0, 0], outcome=[1.0, 0.0, float("nan")]
    )
    for batch in (experts, rollouts):
        batch.write("old_logprob", -torch.ones(batch.num_response_tokens))
    joined = irl.training_batch(experts, rollouts, use_outcome=True)
    assert joined.source.tolist() == [0, 0, 1, 1]
    assert joined.response_ids.tolist() == [4, 1, 5, 1, 6, 1, 7, 1]
    assert irl.training_batch(experts, rollouts, use_outcome=False).source.tolist() == [0, 1, 1, 1]
    # With every rollout right there is nothing to estimate Z from.
    assert irl.training_batch(experts, rollouts.select([0]), use_outcome=True) is None

    joined.write("reward", torch.arange(8.0))
    irl.write_coefficients(joined, IRLConfig(weights="uniform"))
    coefficient = joined.read("coefficient")
    torch.testing.assert_close(coefficient[:4], torch.full((4,), -0.5))
    torch.testing.assert_close(coefficient[4:], torch.full((4,), 0.5))


def test_implicit_rewards_start_at_zero_at_any_temperature(tmp_path):
    changes = {"prm": {"reward": "implicit"}, "rollout": {"temperature": 0.5}, "irl": {"use_outcome": False}}
    config = tiny_config(tmp_path, steps=1, **changes)
    train(config)
    first = metrics_of(config)[-1]
    assert first["prm/reward_mean"] == pytest.approx(0.0, abs=1e-5)
    assert first["prm/reward_std"] == pytest.approx(0.0, abs=1e-5)
    assert first["rollout/sampler_mismatch_max"] < 1e-4


def test_the_reference_reads_each_expert_once(tmp_path, monkeypatch):
    """Two passes over the experts, and a resumed third: as many experts scored as there are."""
    changes = {"prm": {"reward": "implicit"}, "irl": {"use_outcome": False, "experts_per_step": 12}}
    scored, score = [], Learner.score

    def count(self, batch, temperature=None):
        if self.optimizer is None and (batch.group_ids < 0).all():
            scored.extend(batch.group_ids.tolist())
        return score(self, batch, temperature)

    monkeypatch.setattr(Learner, "score", count)
    whole = tiny_config(tmp_path, output_dir=str(tmp_path / "whole"), steps=6, **changes)
    train(whole)
    assert sorted(scored) == list(range(-24, 0))
    parts = tiny_config(tmp_path, output_dir=str(tmp_path / "parts"), steps=4, **changes)
    train(parts)
    scored.clear()
    parts = tiny_config(tmp_path, output_dir=str(tmp_path / "parts"), steps=6, **changes)
    train(parts, resume=True)
    assert not scored
    assert metrics_of(parts) == metrics_of(whole)


def test_a_cache_too_large_to_save_is_computed_anew(tmp_path, monkeypatch):
    """The experts' log-probabilities under the reference are the same, whether they come from a checkpoint or not, but
    for rounding: other experts share their batch the second time."""
    changes = {"prm": {"reward": "implicit"}, "irl": {"use_outcome": False, "experts_per_step": 12}}
    for name, limit in {"saved": 1 << 20, "anew": 0}.items():
        monkeypatch.setattr("repirl.data.experts.MAX_SAVED_CACHE_BYTES", limit)
        parts = {"output_dir": str(tmp_path / name), **changes}
        train(tiny_config(tmp_path, steps=3, **parts))
        run = build(tiny_config(tmp_path, **parts))
        run.restore(resolve_checkpoint(tmp_path / name))
        # 24 experts, 12 a turn.
        assert len(run.data.experts.state_dict()["reference"]) == (24 if name == "saved" else 0)
        train(tiny_config(tmp_path, steps=6, **parts), resume=True)
    saved, anew = (metrics_of(tiny_config(tmp_path, output_dir=str(tmp_path / name))) for name in ("saved", "anew"))
    assert [line["step"] for line in anew] == list(range(7))
    assert saved[:4] == anew[:4]
    for ours, theirs in zip(anew[4:], saved[4:], strict=True):
        # The reference computes more there.
        del ours["padding/prm"], theirs["padding/prm"]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("prm_temperature", "passes"), [(None, 1), (0.7, 1), (1.0, 2)])
def test_the_reference_writes_both_streams_in_as_few_passes_as_there_are_temperatures(
    tmp_path, monkeypatch, prm_temperature, passes
):
    model = load_model(str(make_model(tmp_path / "m")), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
    learner, calls, score = Learner(model, None, tokens_per_microbatch=99, temperature=0.7), [], Learner.score
    batch = pack([([3, 4, 5], [6, 7, 8, 1]), ([9], [10, 1])])
    expected = {temperature: learner.score(batch, temperature)["logprob"] for temperature in (0.7, 1.0)}
    monkeypatch.setattr(Learner, "score", lambda *arguments: calls.append(1) or score(*arguments))
    reference = Reference(learner, prm_temperature)
    reference.write(batch)
    assert len(calls) == passes
    assert torch.equal(batch.read("ref_logprob"), expected[0.7])
    if prm_temperature is None:
        assert "prm_ref_logprob" not in batch.streams
    else:
        assert torch.equal(batch.read("prm_ref_logprob"), expected[prm_temperature])
        assert torch.equal(reference.for_prm(batch), expected[prm_temperature])
    assert not torch.equal(*expected.values())


def test_a_frozen_learner_is_asked_but_neither_trained_nor_saved(tmp_path, monkeypatch):
    """A system that reads a trained PRM: its row is all that it takes."""
    model = load_model(str(make_model(tmp_path / "m")), kind="causal", dtype=torch.float32, device=torch.device("cpu"))
    frozen = Learner(model, None, tokens_per_microbatch=99)
    assert frozen.state_dict() == {}
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(AssertionError, match="frozen"):
        frozen.update(pack([([3], [4])]), None)

    row = dataclasses.replace(SYSTEMS["rloo"], reads=("prm",))
    monkeypatch.setitem(SYSTEMS, "frozen_prm", row)
    prm = {"model": str(tmp_path / "m"), "reward": "logprob"}
    changes = {"objective": "frozen_prm", "prm": prm}
    config = tiny_config(tmp_path, **changes, steps=3)
    train(config)
    path = resolve_checkpoint(config.output_dir)
    assert set(json.loads((path / "trainer.json").read_text())["learners"]) == {"policy"}
    assert [p.name for p in path.iterdir() if p.is_dir()] == ["policy"]
    run = build(config)
    assert list(run.trained) == list(run.objectives) == ["policy"]
    run.restore(path)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert all(torch.equal(w, before.get_parameter(n)) for n, w in run.learners["prm"].weights())
    # Its rewards count, from the first update on.
    lines = metrics_of(config)
    assert not any(name.startswith("prm/") for line in lines for name in line)
    without = tiny_config(tmp_path, output_dir=str(tmp_path / "without"), objective="rloo", steps=3)
    train(without)
    assert lines[1]["rollout/length"] == metrics_of(without)[1]["rollout/length"]
    assert lines[1]["policy/advantage_std"] != metrics_of(without)[1]["policy/advantage_std"]
    # And such a run resumes as any other.
    parts = {"output_dir": str(tmp_path / "parts"), **changes}
    train(tiny_config(tmp_path, **parts, steps=2))
    train(tiny_config(tmp_path, **parts, steps=3), resume=True)
    assert [line for line in metrics_of(tiny_config(tmp_path, **parts)) if line["step"] == 3] == lines[-1:]


def test_another_objective_goes_on_only_if_it_is_named(tmp_path):
    train(tiny_config(tmp_path, objective="sft", steps=1))
    config = tiny_config(tmp_path, objective="rloo", steps=2)
    with pytest.raises(ConfigError, match=r'objective "sft" -> "rloo"; .*--changed objective,data.experts,data.train'):
        train(config, resume=True)
    # The fine-tuned policy goes on, and the prompts begin.
    train(config, resume=True, changed=["objective", "data.experts", "data.train"])
    assert [line["step"] for line in metrics_of(config)] == [0, 1, 2]
    # But there is no PRM to go on with.
    names = ["objective", "prm.model", "data.experts"]
    with pytest.raises(ConfigError, match=r"has no 'prm'; it holds \['policy'\]"):
        train(tiny_config(tmp_path, objective="repirl", steps=3), resume=True, changed=names)


def test_only_what_needs_the_reference_loads_it(tmp_path):
    assert not needs_reference(tiny_config(tmp_path))
    assert needs_reference(tiny_config(tmp_path, prm={"reward": "implicit"}))
    assert needs_reference(tiny_config(tmp_path, irl={"base_measure": "reference"}))
    assert needs_reference(tiny_config(tmp_path, objective="rloo", loss={"kl_coefficient": 0.1}))
    assert not needs_reference(tiny_config(tmp_path, objective="rloo", prm={"reward": "implicit"}))


def test_policy_loss_has_the_policy_gradient(tmp_path):
    """On policy and unclipped, the loss's gradient in log-probs is -advantage, averaged as configured."""
    rollouts = pack([([3], [4, 5]), ([3], [6])], group_ids=[0, 0], outcome=[1.0, 0.0])
    old = torch.tensor([-1.0, -2.0, -0.5])
    for name in ("old_logprob", "sampler_logprob"):
        rollouts.write(name, old)
    objective = RLOO(tiny_config(tmp_path, objective="rloo", loss={"entropy_coefficient": 0.1}))
    objective.prepare(rollouts)
    torch.testing.assert_close(rollouts.read("advantage"), torch.tensor([1.0, 1.0, -1.0]))
    outputs = {"logprob": old.clone().requires_grad_(), "entropy": torch.ones(3, requires_grad=True)}
    objective.loss(outputs, rollouts)[0].backward()
    torch.testing.assert_close(outputs["logprob"].grad, torch.tensor([-1.0, -1.0, 1.0]) / 3)
    torch.testing.assert_close(outputs["entropy"].grad, torch.full((3,), -0.1 / 3))


def test_an_update_tells_what_it_clipped_and_how_far_it_went(tmp_path):
    """Means over tokens, whatever the micro-batches: clip share, KL(old || new), pi_old / mu and its truncation."""
    rollouts = pack([([3], [4, 5]), ([3], [6])], group_ids=[0, 0], outcome=[1.0, 0.0])
    old, new = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-0.5, -2.0, -0.6])
    sampler, reference = torch.tensor([-1.0, -4.0, -0.4]), torch.tensor([-0.7, -2.0, -0.6])
    for name, values in (("old_logprob", old), ("sampler_logprob", sampler), ("ref_logprob", reference)):
        rollouts.write(name, values)
    loss = {"kl_coefficient": 0.1, "kl_estimator": "k1", "sampler_ratio_cap": 2.0}
    update = RLOO(tiny_config(tmp_path, objective="rloo", loss=loss))
    update.prepare(rollouts)
    halves = ((0, [0, 1]), (1, [2]))
    parts = [update.loss({"logprob": new[i], "entropy": new[i]}, rollouts.select([n])) for n, i in halves]
    assert all(set(figures) == set(parts[0][1]) for _, figures in parts)
    sums = {name: [sum(column) for column in zip(*(f[name] for _, f in parts), strict=True)] for name in parts[0][1]}
    actual = {name: float(total) / count for name, (total, count) in sums.items()}
    ratio, log_ratio = (new - old).exp(), new - old
    expected = {
        # Of the three only the first, with advantage 1, went beyond 1.2.
        "clip_fraction": 1 / 3,
        "approx_kl": float((ratio - 1 - log_ratio).mean()),
        "sampler_ratio": float((old - sampler).exp().clamp(max=2.0).mean()),
        "sampler_ratio_truncated": 1 / 3,
        "kl_reference": float((new - reference).mean()),
    }
    assert actual == pytest.approx(expected, rel=1e-5)
    assert all(torch.isfinite(part) for part, _ in parts)
    plain = RLOO(tiny_config(tmp_path, objective="rloo", loss={"sampler_ratio_cap": None}))
    _, figures = plain.loss({"logprob": new, "entropy": new}, rollouts)
    assert set(figures) == {"clip_fraction", "approx_kl"}


def test_rewards_of_micro_batches_equal_those_of_the_batch(tmp_path):
    config = tiny_config(tmp_path, prm={"reward": "soft_q", "gamma": 0.9})
    run = build(config)
    batch = pack([([3], [4, 5, 1]), ([3, 4], [6]), ([5], [7, 8, 9, 1])])
    prm = run.learners["prm"]
    whole = read_rewards(prm.score(batch), batch, PRMConfig(reward="soft_q", gamma=0.9))
    prm.tokens_per_microbatch = 4
    parts = read_rewards(prm.score(batch), batch, PRMConfig(reward="soft_q", gamma=0.9))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_metrics_are_json_lines_with_the_promised_names(tmp_path):
    config = tiny_config(tmp_path, steps=1, log={"tensorboard": True})
    train(config)
    lines = [json.loads(x) for x in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    promised = {"rollout/outcome", "prm/ess_fraction", "prm/log_z", "prm/reward_gap", "prm/max_weight"}
    promised |= {"policy/clip_fraction", "policy/approx_kl", "policy/sampler_ratio"}
    promised |= {"policy/entropy", "seconds/rollout", "seconds/policy", "seconds/step", "memory/peak_bytes"}
    assert promised <= set(lines[-1])
    assert list((Path(config.output_dir) / "tensorboard").glob("events*"))


def test_a_prm_from_fixed_rollouts_starts_an_online_one(tmp_path):
    """The loop goes on with the rewards that the PRM had learned without sampling."""
    offline = tiny_config(tmp_path, objective="prm-offline", steps=3, data={"eval": None}, prm={"reward": "logprob"})
    train(offline)
    assert all(line["prm/grad_norm"] > 0 for line in metrics_of(offline))
    prm = export_checkpoint(offline.output_dir, tmp_path / "out")[0]
    changes = {"prm": {"reward": "logprob", "model": str(prm)}, "output_dir": str(tmp_path / "online")}
    online = tiny_config(tmp_path, steps=2, irl={"use_outcome": False}, **changes)
    batch = pack([([3, 4], [5, 6, 1])])
    learned, started = weights_of(offline), build(online).learners["prm"]
    for name, value in started.model.state_dict().items():
        assert torch.equal(value, learned[f"prm.{name}"]), name
    before = started.score(batch)["logprob"]
    assert not torch.equal(before, build(online).learners["policy"].score(batch)["logprob"])
    train(online)
    assert [line["step"] for line in metrics_of(online)] == [0, 1, 2]


def test_offline_systems_need_their_data(tmp_path):
    for objective, kind in (("dpo", "pairs"), ("dqo", "trajectories")):
        with pytest.raises(ConfigError, match=rf"'{objective}' learns from {kind}: set data.{kind}"):
            tiny_config(tmp_path, objective=objective, data={kind: None})
    unknown = {"path": str(tmp_path / "trajectories.jsonl"), "outcome_column": None}
    with pytest.raises(ConfigError, match=r"outcome_column is null, .* name the column$"):
        tiny_config(tmp_path, objective="dqo", data={"trajectories": unknown})
    with pytest.raises(ConfigError, match=r"or set irl.use_outcome: false"):
        tiny_config(tmp_path, objective="prm-offline", data={"trajectories": unknown, "eval": None})
    with pytest.raises(ConfigError, match=r"'prm-offline' has no policy to evaluate"):
        tiny_config(tmp_path, objective="prm-offline")
    with pytest.raises(ConfigError, match=r"options of 'dpo' are set, but objective 'repirl' does not read them"):
        tiny_config(tmp_path, dpo={"beta": 0.2})
