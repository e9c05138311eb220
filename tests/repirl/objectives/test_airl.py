"""The discriminator's losses, by hand and as probabilities."""

import math

import pytest
import torch
from tiny import tiny_config

from repirl.batch import EXPERT, concatenate, pack
from repirl.objectives.airl import AIRL, ClippedRLOO


def softplus(x):
    return math.log1p(math.exp(x))


def sides(expert_rows, rollout_rows):
    """A batch of responses with these rewards, experts first, and the rewards end to end."""
    experts = pack([([1], [2] * len(row)) for row in expert_rows], source=EXPERT)
    rollouts = pack([([1], [2] * len(row)) for row in rollout_rows])
    rewards = [x for row in expert_rows + rollout_rows for x in row]
    return concatenate([experts, rollouts]), torch.tensor(rewards, dtype=torch.float64)


def airl(tmp_path, irl=None, **discriminator):
    return AIRL(tiny_config(tmp_path, objective="airl", discriminator=discriminator, irl=irl or {}))


def test_the_logistic_loss_of_two_responses(tmp_path):
    batch, reward = sides([[0.2, -0.1]], [[0.5, 0.0, -0.3]])
    objective = airl(tmp_path)
    objective.prepare(batch)
    loss, figures = objective.loss({"value": reward}, batch)
    assert float(loss) == pytest.approx(0.705897, abs=1e-6)
    means = {name: float(total) / count for name, (total, count) in figures.items()}
    assert means == pytest.approx(
        {"expert_reward": 0.05, "expert_accuracy": 0.5, "rollout_reward": 0.2 / 3, "rollout_accuracy": 1 / 3}
    )


EXPERTS, ROLLOUTS = [[0.2, -0.1], [1.5]], [[0.5, 0.0, -0.3], [0.7, -2.0], [0.1], [0.4, 0.4, 0.4, 0.4]]


@pytest.mark.parametrize("loss", ["bce", "wgan"])
def test_each_side_is_a_mean_over_responses_of_means_over_tokens(tmp_path, loss):
    batch, reward = sides(EXPERTS, ROLLOUTS)
    objective = airl(tmp_path, loss=loss, irl={"reward_l2": 0.1})
    objective.prepare(batch)
    term = (lambda x: x) if loss == "wgan" else (lambda x: softplus(x) / 2)
    expected = sum(sum(term(-x) for x in row) / len(row) for row in EXPERTS) / len(EXPERTS)
    expected += sum(sum(term(x) for x in row) / len(row) for row in ROLLOUTS) / len(ROLLOUTS)
    expected += 0.1 * float(reward.square().mean())
    whole = float(objective.loss({"value": reward}, batch)[0])
    assert whole == pytest.approx(expected, abs=1e-6)
    # Micro-batches, some with one side only, add up to it.
    parts = [[0, 4], [1], [2, 3, 5]]
    shares = [objective.loss({"value": reward[batch.response_positions(p)]}, batch.select(p)) for p in parts]
    assert sum(float(share) for share, _ in shares) == pytest.approx(whole, abs=1e-12)
    assert sum(figures["expert_reward"][1] for _, figures in shares) == 3


def test_with_the_policys_probability_it_is_the_discriminator_of_airl(tmp_path):
    """D = exp r / (exp r + mu) for each token, and the loss - log D of experts, - log (1 - D) of rollouts."""
    batch, reward = sides(EXPERTS, ROLLOUTS)
    objective = airl(tmp_path, subtract_logprob=True)
    assert objective.reads_learners == ("policy",)
    assert airl(tmp_path).reads_learners == ()
    # The gate asks for rewards.
    alone = {"loss": {"outcome_coefficient": 0.0}, "irl": {"use_outcome": False}}
    assert AIRL(tiny_config(tmp_path, objective="airl", **alone)).reads_learners == ("prm",)
    logprob = -torch.linspace(0.1, 3, reward.numel())
    batch.write("logprob", logprob)
    objective.prepare(batch)
    d = reward.exp() / (reward.exp() + logprob.double().exp())
    weight, first = batch.read("loss_weight").double(), 3
    expected = -(weight * torch.where(torch.arange(reward.numel()) < first, d, 1 - d).log()).sum() / 2
    assert float(objective.loss({"value": reward}, batch)[0]) == pytest.approx(float(expected), abs=1e-9)


def test_the_best_discriminator_finds_the_experts_odds(tmp_path):
    """Where mu is subtracted, r = log of the experts' probability: the discriminator has recovered their policy."""
    experts, policy = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.375, 0.5])
    counts = [(experts * 8).long().tolist(), (policy * 8).long().tolist()]
    chosen = [torch.tensor([a for a, n in enumerate(side) for _ in range(n)]) for side in counts]
    batch, _ = sides([[0.0]] * 8, [[0.0]] * 8)
    actions = torch.cat(chosen)
    batch.write("logprob", policy.log()[actions])
    objective = airl(tmp_path, subtract_logprob=True)
    objective.prepare(batch)
    table = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = objective.loss({"value": table[actions]}, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(table.detach().exp(), experts.double(), atol=1e-6, rtol=1e-6)


def test_the_policys_rewards_are_cut(tmp_path):
    rewards = [[0.5, 4.0], [-3.0]]
    rollouts = pack([([1], [2, 2]), ([1], [2])], group_ids=[0, 0], outcome=[1.0, 0.0], streams={"reward": rewards})
    config = tiny_config(tmp_path, objective="airl", discriminator={"reward_clip": 1.0})
    ClippedRLOO(config).prepare(rollouts)
    assert rollouts.read("reward").tolist() == [0.5, 1.0, -1.0]
    uncut = tiny_config(tmp_path, objective="airl")
    rollouts.write("reward", torch.tensor([0.5, 4.0, -3.0]))
    ClippedRLOO(uncut).prepare(rollouts)
    assert rollouts.read("reward").tolist() == [0.5, 4.0, -3.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": {"subtract_logprob": True, "loss": "wgan"}}, "drops out of discriminator.loss 'wgan'"),
        ({"discriminator": {"subtract_logprob": True}, "order": "policy_first"}, "set order: prm_first"),
        ({"objective": "repirl", "discriminator": {"reward_clip": 1.0}}, "'repirl' does not read them.*'airl'"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **({"objective": "airl"} | changes))
