"""Prompts kept by the outcomes of their responses, and sampled until there are enough."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rank_processes import rank_processes
from shared import MEASURED
from tiny import tiny_config, tiny_values

import repirl.run
from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.distributed.world import World
from repirl.loop import train
from repirl.models import load_tokenizer
from repirl.options import FilterConfig
from repirl.report.log import read_metrics
from repirl.rollout.engine import Response
from repirl.rollout.filter import Group, sample_filtered, why_dropped
from repirl.rollout.sampler import Sampler
from repirl.verify.process import Verifier
from repirl.work import PhaseTimer


def group(*outcomes, ended=True, row=0):
    responses = [Response([5], [-1.0], ended) for _ in outcomes]
    return Group(row, responses, [float(x) for x in outcomes])


@pytest.mark.parametrize(
    ("options", "outcomes", "reason"),
    [
        # DAPO: neither all right nor all wrong.
        ({}, [0, 0, 0, 0], "too_hard"),
        ({}, [1, 1, 1, 1], "too_easy"),
        ({}, [1, 0, 0, 0], None),
        ({}, [0.5, 0.5], None),
        # PRIME: bounds that count as inside.
        ({"min_accuracy": 0.2, "max_accuracy": 0.8}, [1, 0, 0, 0, 0], None),
        ({"min_accuracy": 0.2, "max_accuracy": 0.8}, [1, 1, 1, 1, 0], None),
        ({"min_accuracy": 0.25, "max_accuracy": 0.75}, [1, 0, 0, 0, 0], "too_hard"),
        ({"min_accuracy": 0.25, "max_accuracy": 0.75}, [1, 1, 1, 1, 0], "too_easy"),
        ({"min_accuracy": 0.0, "max_accuracy": 1.0}, [0, 0], None),
        ({"min_accuracy": 0.0, "max_accuracy": 1.0}, [1, 1], None),
    ],
)
def test_which_prompts_are_dropped(options, outcomes, reason):
    assert why_dropped(group(*outcomes), FilterConfig(**options)) == reason


def test_a_prompt_with_a_truncated_response_is_dropped_on_request():
    cut = Group(0, [Response([5], [-1.0], True), Response([5], [-1.0], False)], [1.0, 0.0])
    assert why_dropped(cut, FilterConfig()) is None
    assert why_dropped(cut, FilterConfig(truncated="drop")) == "truncated"
    assert why_dropped(group(0, 0, ended=False), FilterConfig(truncated="drop")) == "too_hard"


def endless(kinds):
    """Samples groups of the given outcomes in turn; row counts them."""
    asked, number = [], iter(range(10**6))

    def sample(count, start):
        asked.append((count, start))
        return [group(*kinds[i % len(kinds)], row=i) for i in (next(number) for _ in range(count))]

    return sample, asked


MIXED, HARD, EASY = (1, 0), (0, 0), (1, 1)


def test_sampling_goes_on_until_enough_prompts_pass():
    sample, asked = endless([MIXED, HARD, EASY, HARD])
    result = sample_filtered(FilterConfig(oversample=1.5), 4, [], sample)
    # Rounds of 1.5 times what is missing: 4 -> 6 (rows 0, 4 pass), 2 -> 3 (row 8), 1 -> 2 (none), 1 -> 2 (row 12).
    assert asked == [(6, 0), (3, 6), (2, 9), (2, 11)]
    assert [g.row for g in result.kept] == [0, 4, 8, 12]
    assert len(result.sampled) == 13
    assert not result.surplus
    assert result.metrics == {
        "filter/rounds": 4,
        "filter/sampled": 13,
        "filter/kept": 4,
        "filter/surplus": 0,
        "filter/too_hard": 6,
        "filter/too_easy": 3,
        "filter/truncated": 0,
    }


def test_what_passes_beyond_the_wanted_number_is_surplus_and_used_first():
    sample, asked = endless([MIXED])
    first = sample_filtered(FilterConfig(oversample=4.0), 3, [], sample)
    assert ([g.row for g in first.kept], [g.row for g in first.surplus]) == ([0, 1, 2], [*range(3, 12)])
    second = sample_filtered(FilterConfig(oversample=4.0), 10, first.surplus, sample)
    assert asked == [(12, 0), (4, 0)]
    assert [g.row for g in second.kept] == [*range(3, 13)]
    assert [g.row for g in second.surplus] == [13, 14, 15]


def test_rounds_end():
    sample, asked = endless([HARD])
    result = sample_filtered(FilterConfig(max_rounds=3), 2, [], sample)
    assert asked == [(2, 0), (2, 2), (2, 4)]
    assert not result.kept
    assert result.metrics["filter/too_hard"] == 6


def by_parity(self, pairs):
    """A verdict that a random model gets both ways."""
    return [float(sum(map(ord, text)) % 2) for text, _ in pairs]


def train_on_parity(config, resume=False, judge=by_parity):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verifier, "judge", judge)
        train(config, resume=resume)


def lines(config):
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED)}
        for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")
    ]


OPTIONS = {"objective": "rloo", "eval": {"every": 0}}
KEEPS = {"oversample": 2.0, "surplus": "keep", "truncated": "keep", "max_rounds": 4}


def values_of(tmp_path, name, options, **changes):
    rollout = {"filter": options, "prompts_per_step": 3}
    return tiny_values(tmp_path, output_dir=str(tmp_path / name), rollout=rollout, **OPTIONS | changes)


@pytest.mark.parametrize("options", [{}, {"min_accuracy": 0.3, "max_accuracy": 0.5, "max_rounds": 2}, KEEPS])
def test_a_run_trains_on_what_passes(tmp_path, options):
    batches = []
    rollouts = Sampler.rollouts

    def watched(self, *arguments, **options):
        batch, metrics = rollouts(self, *arguments, **options)
        batches.append(batch)
        return batch, metrics

    config = build_config(values_of(tmp_path, "run", options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "rollouts", watched)
        train_on_parity(config)
    low, high = options.get("min_accuracy", 0.01), options.get("max_accuracy", 0.99)
    carried = 0
    for line, batch in zip(lines(config), batches, strict=True):
        accuracies = batch.outcome.reshape(-1, 3).mean(1)
        assert ((accuracies >= low) & (accuracies <= high)).all()
        assert batch.group_ids.tolist() == [i for i in range(len(accuracies)) for _ in range(3)]
        dropped = line["filter/too_hard"] + line["filter/too_easy"] + line["filter/truncated"]
        passed = line["filter/kept"] + line["filter/surplus"] - carried
        assert line["filter/sampled"] == dropped + passed
        assert line["filter/kept"] == len(accuracies)
        assert line["filter/kept"] == 3 or line["filter/rounds"] == options["max_rounds"]
        assert line["policy/grad_norm"] > 0
        carried = line["filter/surplus"] if options == KEEPS else 0
    actual = lines(config)
    assert any(line["filter/rounds"] > 1 for line in actual) or options == KEEPS
    assert any(line["filter/surplus"] for line in actual) == (options == KEEPS)
    # Those of older weights show in the mismatch, and end no run.
    stale = [line["rollout/sampler_mismatch_max"] > 1e-2 for line in actual]
    assert any(stale) == (options == KEEPS)


def test_a_step_for_which_no_prompt_passes_is_skipped(tmp_path):
    config = build_config(values_of(tmp_path, "run", {"max_rounds": 2}, steps=2))
    train_on_parity(config, judge=lambda self, pairs: [1.0 for _ in pairs])
    for line in lines(config):
        assert line["policy/skipped"] == 1
        assert "policy/loss" not in line
        assert line["filter/too_easy"] == line["filter/sampled"] == 6
        assert line["rollout/outcome"] == 1.0
        assert line["tokens"] == 0


def test_a_filtered_run_resumes_to_the_bit(tmp_path):
    whole = build_config(values_of(tmp_path, "whole", KEEPS))
    train_on_parity(whole)
    parts = build_config(values_of(tmp_path, "parts", KEEPS))
    save = repirl.run.Run.save

    def save_and_die(self, step, accuracy=None):
        save(self, step, accuracy)
        if step == 2:
            assert self.sampler._surplus
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repirl.run.Run, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_on_parity(parts)
    train_on_parity(parts, resume=True)
    assert lines(parts) == lines(whole)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({}, r"holds 2 prompts with rollouts for later steps .rollout.filter.surplus: keep"),
        ({"filter": {}}, r"holds 2 prompts with rollouts for later steps .rollout.filter.surplus: keep"),
        ({"filter": KEEPS, "samples_per_prompt": 4}, r"samples_per_prompt is 4, but the checkpoint .* made with 3"),
    ],
)
def test_surplus_of_a_checkpoint_needs_the_options_that_made_it(tmp_path, rollout, message):
    def sampler_of(rollout):
        config = tiny_config(tmp_path, rollout=rollout)
        policy = SimpleNamespace(world=World(torch.device("cpu")))
        return Sampler(config, policy, load_tokenizer(config.policy.model), None, None, None, PhaseTimer())

    made = sampler_of({"filter": KEEPS})
    state = {"cursor": None, "in_flight": None, "surplus": [group(1, 0, 1).state(), group(0, 0, 1, row=7).state()]}
    made.load_state_dict(state)
    assert made.state_dict() == state
    with pytest.raises(ConfigError, match=message):
        sampler_of(rollout).load_state_dict(state)


def run_on_rank(_group, values):
    train_on_parity(build_config(values))


def test_two_processes_filter_as_one_does(tmp_path):
    """Also with other options of the policy's loss, which are about whole responses and whole groups."""
    loss = {"ratio": "sequence", "scale": "group", "overlong_tokens": 8, "aggregation": "sequence_mean"}
    changes = {"loss": loss | {"leave_one_out": False, "clip_low": 0.02, "clip_high": 0.02}, "steps": 3}
    changes["policy"] = {"updates_per_step": 2}
    one = build_config(values_of(tmp_path, "one", KEEPS, **changes))
    train_on_parity(one)
    assert any(line["policy/clip_fraction"] > 0 for line in lines(one))
    two = values_of(tmp_path, "two", KEEPS, **changes)
    with rank_processes(2) as ranks:
        ranks.run(2, run_on_rank, two)
    for ours, theirs in zip(lines(build_config(two)), lines(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name in [name for name in theirs if name.startswith(("filter/", "policy/", "rollout/", "tokens"))]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"filter": {"min_accuracy": 0.8, "max_accuracy": 0.2}}},
            "min_accuracy is 0.8, above max_accuracy",
        ),
        ({"rollout": {"filter": {"oversample": 0.5}}}, "rollout.filter.oversample"),
        (
            {
                "rollout": {"filter": {}},
                "data": {"answer_column": None, "eval": None},
                "loss": {"outcome_coefficient": 0.0},
            }
            | {"irl": {"use_outcome": False}},
            "rollout.filter keeps prompts by the outcomes",
        ),
        (
            {"rollout": {"filter": {}, "overlap": "prm", "engine": "vllm_server"}, "order": "policy_first"},
            "rollout.overlap is 'prm', but rollout.filter samples until enough prompts pass",
        ),
        (
            {"rollout": {"filter": {"surplus": "keep"}}, "loss": {"sampler_ratio_cap": None}},
            "rollout.filter.surplus is 'keep'",
        ),
    ],
)
def test_what_a_filter_needs(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)
