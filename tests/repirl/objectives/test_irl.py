"""The PRM's update: who is an expert, what each token weighs, and what the options change."""

import pytest
import torch
from repirl_kernels import log_importance_weights, log_partition
from tiny import tiny_config

from repirl.batch import EXPERT, pack
from repirl.irlconfig import IRLConfig
from repirl.objectives import irl

NAN = float("nan")


def experts_and_rollouts():
    """Four prompts. 0 and 3: experts and failures; 1: all rollouts right; 2: no expert, but a right rollout."""
    experts = pack(
        [([3], [4, 1]), ([3], [4, 4, 1]), ([4], [5, 1]), ([6], [9, 1])], group_ids=[0, 0, 1, 3], source=EXPERT
    )
    pairs = [([3], [5, 1]), ([3], [6, 6, 1]), ([4], [5, 1]), ([4], [7, 1]), ([5], [8, 1]), ([5], [9, 9, 1])]
    pairs += [([6], [9, 8, 1]), ([6], [1])]
    outcome = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, NAN]
    rollouts = pack(pairs, group_ids=[0, 0, 1, 1, 2, 2, 3, 3], outcome=outcome)
    generator = torch.Generator().manual_seed(0)
    rollouts.write("old_logprob", -torch.rand(rollouts.num_response_tokens, generator=generator))
    return experts, rollouts


def with_rewards(batch, seed=1):
    batch.write("reward", torch.randn(batch.num_response_tokens, generator=torch.Generator().manual_seed(seed)))
    return batch


def test_matched_prompts_have_an_expert_and_a_failure():
    experts, rollouts = experts_and_rollouts()
    batch = irl.training_batch(experts, rollouts, use_outcome=True, matched=True)
    # Of prompt 1 nothing is left, not even its right rollouts. Prompt 2 has a right rollout as its expert.
    assert batch.group_ids.tolist() == [0, 0, 3, 0, 2, 0, 2, 3, 3]
    assert batch.source.tolist() == [0] * 5 + [1] * 4
    without = irl.training_batch(experts, rollouts, use_outcome=False, matched=True)
    assert sorted(set(without.group_ids.tolist())) == [0, 1, 3]
    assert irl.training_batch(experts, rollouts.select([2, 3]), use_outcome=True, matched=True) is None
    assert irl.training_batch(None, rollouts, use_outcome=False, matched=True) is None
    assert irl.training_batch(None, rollouts.select([4, 5]), use_outcome=True, matched=True).num_sequences == 2


@pytest.mark.parametrize("use_outcome", [False, True])
def test_matched_coefficients_are_the_gradient_of_the_mean_over_prompts(use_outcome):
    experts, rollouts = experts_and_rollouts()
    batch = with_rewards(irl.training_batch(experts, rollouts, use_outcome, matched=True))
    irl.write_coefficients(batch, IRLConfig(weights="trajectory", use_outcome=use_outcome), matched=True)
    reward = batch.read("reward").double().requires_grad_()
    losses = []
    for group in batch.group_ids.unique():
        chosen = (batch.group_ids == group).nonzero()[:, 0]
        mine = chosen[batch.source[chosen] == EXPERT].tolist()
        theirs = chosen[batch.source[chosen] != EXPERT].tolist()
        expert_mean = torch.stack([reward[batch.response_positions([i])].sum() for i in mine]).mean()
        part = batch.select(theirs)
        weights = log_importance_weights(
            reward[batch.response_positions(theirs)], part.read("old_logprob"), part.response_cu_seqlens
        )
        losses.append(log_partition(weights.log_weight, weights.bucket_ids).sum() - expert_mean)
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(batch.read("coefficient").double(), reward.grad, rtol=1e-5, atol=1e-7)


def test_what_a_reward_says_of_the_prompt_cancels_only_if_experts_are_matched():
    experts, rollouts = experts_and_rollouts()
    for matched in (True, False):
        batch = with_rewards(irl.training_batch(experts, rollouts, use_outcome=True, matched=matched))
        irl.write_coefficients(batch, IRLConfig(), matched=matched)
        first = batch.read("coefficient")[batch.response_cu_seqlens[:-1]]
        totals = {int(g): float(first[batch.group_ids == g].sum()) for g in batch.group_ids.unique()}
        assert (max(map(abs, totals.values())) < 1e-6) == matched


def test_one_group_for_the_batch_weighs_all_experts_alike():
    experts, rollouts = experts_and_rollouts()
    batch = with_rewards(irl.training_batch(experts, rollouts, use_outcome=False, matched=True))
    irl.write_coefficients(batch, IRLConfig(group="batch"), matched=True)
    count = int((batch.source == EXPERT).sum())
    is_expert = batch.read("coefficient") < 0
    torch.testing.assert_close(batch.read("coefficient")[is_expert], torch.full((int(is_expert.sum()),), -1 / count))


def test_without_use_outcome_the_prm_does_not_see_outcomes():
    """Whatever reward the policy has: with a verifier that can be fooled, right rollouts must not become experts."""
    coefficients = []
    for outcome in (0.0, 1.0):
        experts, rollouts = experts_and_rollouts()
        rollouts.outcome.fill_(outcome)
        batch = with_rewards(irl.training_batch(experts, rollouts, use_outcome=False, matched=True))
        irl.write_coefficients(batch, IRLConfig(use_outcome=False), matched=True)
        coefficients.append(batch.read("coefficient"))
    torch.testing.assert_close(*coefficients, rtol=0, atol=0)


def test_the_effective_sample_size_is_that_of_contested_prompts():
    experts, rollouts = experts_and_rollouts()
    batch = with_rewards(irl.training_batch(experts, rollouts, use_outcome=True, matched=True))
    metrics = irl.write_coefficients(batch, IRLConfig(weights="uniform"), matched=True)
    # Prompts 0 and 2 have one failure each, prompt 3 has two.
    assert metrics["lone"] == pytest.approx(2 / 3)
    assert metrics["ess"] == pytest.approx(2.0)
    batch = with_rewards(irl.training_batch(experts, rollouts.select([0, 1, 4, 5]), use_outcome=True, matched=True))
    metrics = irl.write_coefficients(batch, IRLConfig(), matched=True)
    assert metrics["lone"] == 1.0
    assert "ess" not in metrics


def test_squared_rewards_cost_something_where_failures_alone_estimate_z(tmp_path):
    assert (IRLConfig().l2, IRLConfig(use_outcome=False).l2) == (0.01, 0.0)
    assert (IRLConfig(reward_l2=0.0).l2, IRLConfig(use_outcome=False, reward_l2=0.3).l2) == (0.0, 0.3)
    losses = {}
    for l2 in (None, 0.0):
        objective = irl.IRL(tiny_config(tmp_path, irl={"reward_l2": l2}))
        experts, rollouts = experts_and_rollouts()
        batch = with_rewards(irl.training_batch(experts, rollouts, use_outcome=True, matched=True))
        objective.prepare(batch)
        losses[l2], _ = objective.loss({"value": batch.read("reward")}, batch)
    expected = 0.01 * (batch.read("reward") ** 2).mean()
    assert float(losses[None] - losses[0.0]) == pytest.approx(float(expected), rel=1e-4)
