"""Rollouts sampled beside the training, by an engine with weights of its own, as a server has."""

import threading
from pathlib import Path

import pytest
import torch
from rank_processes import rank_processes
from tiny import tiny_config, tiny_values

from repirl.config import ConfigError, build_config
from repirl.learner import Learner
from repirl.loop import train
from repirl.models import load_model
from repirl.report.metrics import read_metrics
from repirl.rollout.transformers import TransformersEngine

SPEED = ("seconds/", "tokens_per_second/", "mfu/", "memory/")
OPTIONS = {"steps": 5, "prm": {"reward": "logprob"}, "irl": {"use_outcome": False}, "order": "policy_first"}


class CopyingEngine:
    """Samples from a copy of the weights, so that the policy may change meanwhile; counts and checks its calls."""

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
    """Make setup.build use the copying engine; returns what undoes it."""
    import repirl.setup

    def make_engine(config, policy, tokenizer):
        engines.append(CopyingEngine(policy, config.policy.model, pad_id=tokenizer.pad_token_id, max_sequences=99))
        return engines[-1]

    patch = pytest.MonkeyPatch()
    patch.setattr(repirl.setup, "make_engine", make_engine)
    return patch


def run_with_own_weights(config, resume=False):
    patch = with_own_weights(config)
    try:
        train(config, resume=resume)
    finally:
        patch.undo()


def lines(folder):
    found = read_metrics(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(SPEED)} for line in found]


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


@pytest.mark.parametrize("overlap", ["prm", "step"])
def test_rollouts_in_flight_survive_in_a_checkpoint(tmp_path, overlap):
    run_with_own_weights(config_of(tmp_path, "whole", overlap))
    # A run that was to be longer has rollouts in flight at its checkpoint; here it is ended right after it.
    import repirl.setup

    save = repirl.setup.Run.save

    def save_and_die(self, step, accuracy=None):
        save(self, step, accuracy)
        if step == 3:
            assert self.in_flight is not None
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repirl.setup.Run, "save", save_and_die)
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
