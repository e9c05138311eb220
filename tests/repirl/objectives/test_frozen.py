"""The policy on a frozen PRM: one that scores steps, and one that scores tokens."""

import pytest
import torch
from repirl_kernels import rloo_advantages
from tiny import make_model, make_step_prm, tiny_config, tiny_values

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.configfile import build_config, merge
from repirl.data import Data
from repirl.data.tasks.arithmetic import build_tokenizer
from repirl.loop import train
from repirl.objectives.frozen import FrozenPRM
from repirl.prm import load_prm
from repirl.report.log import read_metrics
from repirl.run import build

TOKENIZER = build_tokenizer()
TEXTS = ["8+7=15; 15-3=12; #### 12", "8+7=14; #### 14", "#### 3", "1+1=2; 2+1=3; "]


def values(folder, **changes):
    plain = {
        "objective": "rloo-prm",
        "prm": {"model": str(make_step_prm(folder))},
        "loss": {"process_coefficient": 0.5},
    }
    return tiny_values(folder, **merge(plain, changes))


def rollouts():
    prompt = TOKENIZER("8+7-3=").input_ids
    responses = [TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id] * (not text.endswith("; ")) for text in TEXTS]
    batch = pack([(prompt, r) for r in responses], group_ids=[0, 0, 0, 0], outcome=[1.0, 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    for name in ("reward", "old_logprob"):
        batch.write(name, torch.randn(batch.num_response_tokens, generator=generator))
    return batch


@pytest.mark.parametrize("loss", [{}, {"credit": "min"}, {"entropy_in": "return", "entropy_coefficient": 0.1}])
def test_steps_take_the_place_of_tokens(tmp_path, loss):
    config = build_config(values(tmp_path, loss=loss))
    policy, batch = FrozenPRM(config), rollouts()
    assert policy.select(batch, Data()) is batch
    metrics = policy.prepare(batch)
    advantage, reward = batch.read("advantage"), batch.read("reward")
    # Where steps end: behind each separator, and with the response, whether an end token ended it or not.
    counts, last = [3, 2, 1, 2], [6, 14, 18, 6, 10, 2, 5, 11]
    starts = [0, 0, 0, 19, 19, 30, 33, 33]
    ends = torch.tensor([start + end for start, end in zip(starts, last, strict=True)])
    assert batch.num_response_tokens == int(ends[-1]) + 1
    lengths = torch.cat([torch.zeros(1, dtype=torch.int64), ends + 1]).diff()
    options = config.loss
    of_steps = rloo_advantages(
        batch.outcome,
        reward[ends].sigmoid(),
        torch.tensor([0, 3, 5, 6, 8]),
        batch.group_ids,
        outcome_coefficient=1.0,
        process_coefficient=0.5,
        credit=options.credit,
        old_logprob=torch.stack([part.sum() for part in batch.read("old_logprob").split(lengths.tolist())]),
        entropy_coefficient=0.1 if loss.get("entropy_in") else 0.0,
    )
    torch.testing.assert_close(advantage, of_steps.repeat_interleave(lengths))
    assert metrics["steps"] == sum(counts) / 4
    assert metrics["step_reward"] == pytest.approx(float(reward[ends].sigmoid().mean()))
    of_responses = [part.mean() for part in reward[ends].sigmoid().split(counts)]
    assert metrics["response_reward"] == pytest.approx(float(torch.stack(of_responses).mean()))
    # A number inside a step is nobody's.
    changed = reward.clone()
    changed[0] = 9.0
    batch.write("reward", changed)
    policy.prepare(batch)
    assert batch.read("advantage").equal(advantage)


def test_a_prm_of_tokens_gives_token_rewards(tmp_path):
    config = build_config(values(tmp_path, prm={"reward": "logprob", "model": str(tmp_path / "model")}))
    policy, batch = FrozenPRM(config), rollouts()
    policy.select(batch, Data())
    metrics = policy.prepare(batch)
    assert "steps" not in metrics
    means = [part.mean() for part in batch.read("reward").split(batch.response_cu_seqlens.diff().tolist())]
    assert metrics["response_reward"] == pytest.approx(float(torch.stack(means).mean()))
    expected = rloo_advantages(
        batch.outcome,
        batch.read("reward"),
        batch.response_cu_seqlens,
        batch.group_ids,
        outcome_coefficient=1.0,
        process_coefficient=0.5,
    )
    torch.testing.assert_close(batch.read("advantage"), expected)


def test_a_run_trains_the_policy_and_not_the_prm(tmp_path):
    """Three turns without any outcome; the PRM of the run is what `load_prm` reads."""
    config = build_config(values(tmp_path, steps=3, loss={"outcome_coefficient": 0.0, "process_coefficient": 1.0}))
    train(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        assert line["policy/advantage_std"] > 1e-3
        assert 0 < line["policy/step_reward"] < 1
        assert line["policy/steps"] >= 1
        assert "seconds/reward" in line
    newest = tmp_path / "run" / "checkpoints" / "step_3"
    assert (newest / "policy").is_dir()
    assert not (newest / "prm").exists()

    run = build(config)
    batch = rollouts()
    prm = load_prm(tmp_path / "prm", device="cpu")
    score = run.learners["prm"].score(batch)["value"]
    prompt = TOKENIZER("8+7-3=").input_ids
    ids = [batch.response_ids[a:b].tolist() for a, b in [(0, 19), (19, 30)]]
    ours = prm.rewards([(prompt, part) for part in ids])
    torch.testing.assert_close(score[:30], torch.cat(ours))
    run.close()


def test_a_frozen_prm_has_to_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"'rloo-prm' reads a trained PRM: set prm.model"):
        tiny_config(tmp_path, objective="rloo-prm")
    # A head that was never trained would reward at random.
    with pytest.raises(ConfigError, match="is no trained PRM of kind 'value'"):
        build(build_config(values(tmp_path, prm={"model": str(make_model(tmp_path / "plain"))})))
