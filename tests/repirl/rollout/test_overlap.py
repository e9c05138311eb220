"""Rollouts sampled beside the training, by an engine with weights of its own, as a server has."""

import threading
from pathlib import Path

import pytest
import torch
from rank_processes import rank_processes
from shared import MEASURED
from tiny import tiny_config, tiny_values

from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.evaluate import evaluate_checkpoint
from repirl.learner import Learner
from repirl.loop import train
from repirl.models import load_model
from repirl.report.log import read_metrics
from repirl.rollout.transformers import TransformersEngine

OPTIONS = {"steps": 5, "prm": {"reward": "logprob"}, "irl": {"use_outcome": False}, "order": "policy_first"}


class CopyingEngine:
    """Samples from a copy of the weights, so that the policy may change meanwhile; counts and checks its calls."""

    has_weights = True

    def __init__(self, policy, path, **options):
        model = load_model(path, kind="causal", dtype=torch.float32, device=torch.device("cpu"))
        self._copy = Learner(model, None, tokens_per_microbatch=999, temperature=policy.temperature)
        self._engine = TransformersEngine(self._copy, **options)
        self._busy = threading.Lock()
        self.asleep = False
        self.threads = []

    def generate(self, prompts, seeds, sampling):
        assert not self.asleep
        self.threads.append(threading.current_thread().name)
        with self._busy:
            return self._engine.generate(prompts, seeds, sampling)

    def update_weights(self, policy):
        assert not self.asleep
        assert not self._busy.locked(), "weights change while responses are being sampled"
        missing, _ = self._copy.model.load_state_dict(dict(policy.weights()), strict=False)
        assert set(missing) <= {"lm_head.weight"}

    def sleep(self):
        assert not self._busy.locked()
        self.asleep = True

    def wake(self):
        self.asleep = False

    def close(self):
        self.closed = True


engines: list[CopyingEngine] = []


def with_own_weights(config):
    """Make runs and evaluations use the copying engine; returns what undoes it."""

    def make_engine(config, policy, tokenizer):
        engines.append(CopyingEngine(policy, config.policy.model, pad_id=tokenizer.pad_token_id, max_sequences=99))
        return engines[-1]

    patch = pytest.MonkeyPatch()
    for module in ("run", "evaluate"):
        patch.setattr(f"repirl.{module}.make_engine", make_engine)
    return patch


def run_with_own_weights(config, resume=False, changed=()):
    patch = with_own_weights(config)
    try:
        train(config, resume=resume, changed=changed)
    finally:
        patch.undo()


def lines(folder):
    metrics = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in metrics]


def config_of(tmp_path, name, overlap, **changes):
    rollout = {"engine": "vllm_server", "overlap": overlap}
    return tiny_config(tmp_path, output_dir=str(tmp_path / name), rollout=rollout, **OPTIONS | changes)


def test_overlapping_with_the_prm_changes_nothing(tmp_path):
    run_with_own_weights(config_of(tmp_path, "none", "none"))
    assert all(name == "MainThread" for name in engines[-1].threads)
    run_with_own_weights(config_of(tmp_path, "prm", "prm"))
    assert all(name.startswith("rollout") for name in engines[-1].threads)
    assert engines[-1].closed
    assert lines(tmp_path / "prm") == lines(tmp_path / "none")
    # The transformers engine, which samples with the policy itself, gives the same but for rounding.
    plain = tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **OPTIONS)
    train(plain)
    for ours, theirs in zip(lines(tmp_path / "plain"), lines(tmp_path / "none"), strict=True):
        for key in ("policy/grad_norm", "prm/loss", "rollout/length", "tokens"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-3), key


def test_rollouts_one_step_old_are_known_to_be(tmp_path):
    """Their log-probabilities are those of the weights that sampled them; the mismatch to the present ones shows."""
    run_with_own_weights(config_of(tmp_path, "none", "none"))
    run_with_own_weights(config_of(tmp_path, "step", "step"))
    fresh, stale = lines(tmp_path / "none"), lines(tmp_path / "step")
    assert len(fresh) == len(stale)
    # The first two steps' rollouts come from the first weights.
    assert stale[1]["rollout/sampler_mismatch_max"] < 1e-4
    assert all(line["rollout/sampler_mismatch_max"] > 1e-3 for line in stale[2:])
    assert all(line["rollout/sampler_mismatch_max"] < 1e-4 for line in fresh[1:])
    # What is evaluated is the present policy: after the first step both have made the same update.
    assert stale[1]["policy/grad_norm"] == fresh[1]["policy/grad_norm"]
    assert stale[2]["eval/accuracy"] is not None


def test_what_is_evaluated_has_the_present_weights(tmp_path):
    """Where nothing else brings them to the engine: in supervised fine-tuning, and of a checkpoint."""
    changes = {"objective": "sft", "policy": {"optimizer": {"lr": 1e-2}}, "steps": 4}
    config = config_of(tmp_path, "own", "none", **changes)
    run_with_own_weights(config)
    plain = tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **OPTIONS | changes)
    train(plain)
    accuracies = [line["eval/accuracy"] for line in lines(tmp_path / "own") if "eval/accuracy" in line]
    assert len(accuracies) == 3
    assert lines(tmp_path / "own") == lines(tmp_path / "plain")
    learned = weights_of(engines[-1])
    # Evaluating a checkpoint begins with the weights of policy.model.
    patch = with_own_weights(config)
    try:
        evaluate_checkpoint(config, str(tmp_path / "own"))
        assert all(torch.equal(w, learned[n]) for n, w in weights_of(engines[-1]).items())
        evaluate_checkpoint(config, None)
        assert not all(torch.equal(w, learned[n]) for n, w in weights_of(engines[-1]).items())
    finally:
        patch.undo()


def weights_of(engine):
    return dict(engine._copy.weights())


def test_the_engine_sleeps_while_models_train(tmp_path, monkeypatch):
    update, asleep = Learner.update, []

    def watched(self, *arguments):
        asleep.append(engines[-1].asleep)
        return update(self, *arguments)

    monkeypatch.setattr(Learner, "update", watched)
    for order in ("policy_first", "prm_first"):
        asleep.clear()
        run_with_own_weights(config_of(tmp_path, order, "none", order=order))
        assert asleep == [True] * 10


def test_a_failed_run_does_not_wait_for_what_is_sampled_beside_it(tmp_path, monkeypatch):
    """The next rollouts would take for ever; ending the engine ends them."""
    ended = threading.Event()
    generate = CopyingEngine.generate

    def slow(self, *arguments):
        if len(self.threads) >= 2:
            ended.wait(60)
            raise RuntimeError("ended")
        return generate(self, *arguments)

    monkeypatch.setattr(CopyingEngine, "generate", slow)
    monkeypatch.setattr(CopyingEngine, "close", lambda self: ended.set())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("repirl.objectives.rloo.RLOO.select", fail)
    with pytest.raises(KeyboardInterrupt):
        run_with_own_weights(config_of(tmp_path, "step", "step", eval={"every": 0}))
    assert ended.is_set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"overlap": "none"},
            "rollout.overlap is 'none', but the checkpoint holds rollouts that were made with 'step'",
        ),
        ({"samples_per_prompt": 4}, "rollout.samples_per_prompt is 4, .* made with 3"),
    ],
)
def test_rollouts_in_flight_are_gone_on_with_as_they_were_made(tmp_path, monkeypatch, changes, message):
    import repirl.run

    save = repirl.run.Run.save

    def save_and_die(self, step, accuracy=None):
        save(self, step, accuracy)
        raise KeyboardInterrupt

    config = config_of(tmp_path, "run", "step")
    monkeypatch.setattr(repirl.run.Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_with_own_weights(config)
    rollout = config.rollout.model_copy(update=changes)
    with pytest.raises(ConfigError, match=message):
        run_with_own_weights(config.model_copy(update={"rollout": rollout}), resume=True, changed=["rollout"])


@pytest.mark.parametrize("overlap", ["prm", "step"])
def test_rollouts_in_flight_survive_in_a_checkpoint(tmp_path, overlap):
    run_with_own_weights(config_of(tmp_path, "whole", overlap))
    # A run that was to be longer has rollouts in flight at its checkpoint; here it is ended right after it.
    import repirl.run

    save = repirl.run.Run.save

    def save_and_die(self, step, accuracy=None):
        save(self, step, accuracy)
        if step == 3:
            assert self.sampler._in_flight is not None
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repirl.run.Run, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_with_own_weights(config_of(tmp_path, "parts", overlap))
    run_with_own_weights(config_of(tmp_path, "parts", overlap), resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def run_on_rank(_group, values):
    run_with_own_weights(build_config(values))


@pytest.mark.parametrize("overlap", ["prm", "step"])
def test_overlap_on_two_ranks(tmp_path, overlap):
    run_with_own_weights(config_of(tmp_path, "one", overlap))
    rollout = {"engine": "vllm_server", "overlap": overlap}
    values = tiny_values(tmp_path, output_dir=str(tmp_path / "two"), rollout=rollout, **OPTIONS)
    with rank_processes(2) as ranks:
        ranks.run(2, run_on_rank, values)
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        for key in ("policy/loss", "policy/grad_norm", "prm/loss", "rollout/length", "tokens"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"overlap": "prm"}}, "only rollout.engine: vllm_server can sample meanwhile"),
        ({"rollout": {"overlap": "prm", "engine": "vllm_server"}}, "set order: policy_first"),
        (
            {"rollout": {"overlap": "step", "engine": "vllm_server"}, "loss": {"sampler_ratio_cap": None}},
            "rollout.overlap is 'step'",
        ),
    ],
)
def test_overlap_needs_what_makes_it_right(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)
