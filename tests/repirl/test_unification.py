"""docs/unification.md, made executable: how rePIRL's objective becomes that of other systems.

Gradients are compared on the enumerable process of `exact_mdp`, in float64, at random parameters; where only the
optimum is shared, optima are.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import exact_mdp as mdp
import pytest
import torch
import torch.nn.functional as F
from repirl_kernels import importance, losses, packed
from tiny import tiny_config
from torch import Tensor

from repirl.batch import PackedBatch, pack
from repirl.objectives.dpo import preference_losses
from repirl.objectives.dqo import PolicyDQO, lambda_returns
from repirl.objectives.iq import IQLearn
from repirl.objectives.prime import OutcomePRM
from repirl.objectives.steps import StepLabels
from repirl.options import DPOConfig, DQOConfig

BETA = 0.5
EVERYTHING = torch.arange(mdp.NUM_TRAJECTORIES)


def single(table: Tensor) -> Tensor:
    """The nearest float32 numbers: streams of a batch hold them exactly."""
    return table.float().double()


REFERENCE = single(mdp.random_table(0).log_softmax(-1))
# The same but for that rounding, and a distribution to the last bit.
NORMALISED = REFERENCE.log_softmax(-1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def gradient(loss: Tensor, table: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(loss, table)
    assert float(result.norm()) > 1e-3
    return result


class Side(NamedTuple):
    """Trajectories: the rewards of their tokens, and the group of each."""

    rewards: list[Tensor]
    groups: list[int]

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *(reward.numel() for reward in self.rewards)]).cumsum(0)


def prm_loss(experts: Side, rollouts: Side, log_density: Tensor | None = None) -> Tensor:
    """rePIRL's PRM loss in its two passes, as objectives/irl.py calls them: experts matched to the groups, trajectory
    weights, one Z a group. Its value is not that of the loss, its gradient is.

    log_density: of the rollouts' tokens, under the base measure and the sampler, which are the same here.
    """
    expert, policy = torch.cat(experts.rewards), torch.cat(rollouts.rewards)
    density = torch.zeros_like(policy) if log_density is None else log_density
    log_weights = importance.log_importance_weights(
        policy.detach(),
        density,
        rollouts.cu_seqlens,
        group_ids=torch.tensor(rollouts.groups),
        base_logprob=density,
        kind="trajectory",
    )
    weights = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
    c = importance.irl_coefficients(
        weights,
        log_weights,
        rollouts.cu_seqlens,
        experts.cu_seqlens,
        expert_groups=torch.tensor(experts.groups),
    )
    return losses.irl_token_loss(expert, c.expert).sum() + losses.irl_token_loss(policy, c.policy).sum()


def against_zero(rewards: list[Tensor], is_expert: list[bool]) -> Tensor:
    """rePIRL's PRM loss where each trajectory is alone in its group with a stand-in of reward 0.

    The expert of a group is the trajectory if `is_expert`, else the stand-in. Both estimate Z.
    """
    stand_ins = [torch.zeros(1, dtype=torch.float64)] * len(rewards)
    groups = list(range(len(rewards)))
    choices = zip(rewards, stand_ins, is_expert, strict=True)
    experts = [reward if right else stand_in for reward, stand_in, right in choices]
    return prm_loss(Side(experts, groups), Side([*rewards, *stand_ins], [*groups, *groups]))


def sample(seed: int, number: int) -> Tensor:
    return torch.randint(mdp.NUM_TRAJECTORIES, (number,), generator=torch.Generator().manual_seed(seed))


def outcomes(rows: Tensor) -> Tensor:
    """A verifier: half of all trajectories are right."""
    generator = torch.Generator().manual_seed(17)
    return torch.randint(2, (mdp.NUM_TRAJECTORIES,), generator=generator)[rows].double()


def as_batch(rows: Tensor) -> PackedBatch:
    """The trajectories as a batch of the trainer, with their log-probability under the reference."""
    states, actions, cu_seqlens = mdp.packed(rows)
    responses = [([0], part.tolist()) for part in actions.split(cu_seqlens.diff().tolist())]
    batch = pack(responses, outcome=outcomes(rows).tolist())
    for name in ("ref_logprob", "prm_ref_logprob"):
        batch.write(name, REFERENCE[states, actions])
    return batch


def split(values: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return list(values.split(cu_seqlens.diff().tolist()))


def implicit(logits: Tensor, states: Tensor, actions: Tensor, beta: float = BETA) -> Tensor:
    logprob = logits.log_softmax(-1)[states, actions]
    return losses.token_rewards("implicit", logprob=logprob, ref_logprob=REFERENCE[states, actions], beta=beta)


# PRIME


def test_prime_is_each_rollout_against_a_stand_in_of_reward_0(tmp_path):
    rows = sample(1, 24)
    states, actions, cu_seqlens = mdp.packed(rows)
    logits = mdp.random_table(1).requires_grad_()
    objective = OutcomePRM(tiny_config(tmp_path, objective="prime", prm={"reward": "implicit", "beta": BETA}))
    batch = as_batch(rows)
    objective.prepare(batch)
    theirs, _ = objective.loss({"logprob": logits.log_softmax(-1)[states, actions]}, batch)
    ours = against_zero(split(implicit(logits, states, actions), cu_seqlens), (outcomes(rows) > 0.5).tolist())
    close(gradient(ours, logits), gradient(theirs, logits))


# Monte-Carlo step values


def test_step_values_are_completions_against_a_stand_in_of_reward_0():
    """Math-Shepherd's soft labels: the share of 8 completions of a prefix that are right; its last token carries the
    reward. Hard labels are the same with one completion, right if any of them was."""
    states, actions, _ = mdp.packed(sample(2, 12))
    generator = torch.Generator().manual_seed(3)
    ends_step = torch.rand(states.numel(), generator=generator) < 0.6
    right = torch.rand(int(ends_step.sum()), 8, generator=generator) < 0.4
    table = mdp.random_table(4).requires_grad_()
    for successes in (right, right.any(1, keepdim=True)):
        batch = as_batch(sample(2, 12))
        labels = torch.full((states.numel(),), math.nan)
        labels[ends_step] = successes.float().mean(1)
        batch.write("step_label", labels)
        objective = StepLabels(None)
        objective.prepare(batch)
        theirs, _ = objective.loss({"value": table[states, actions]}, batch)
        values = table[states, actions][ends_step].repeat_interleave(successes.shape[1])
        ours = against_zero(list(values.split(1)), successes.flatten().tolist())
        close(gradient(ours, table), gradient(theirs, table))


def test_the_best_step_value_is_the_log_odds_of_success():
    """The minimum of that loss over all that a policy completes is the logit of Q, its probability of success."""
    policy = mdp.random_table(5).log_softmax(-1)
    probability, right = mdp.trajectory_sums(policy).exp(), outcomes(EVERYTHING)
    # Visits of right trajectories, over all visits.
    q = mdp.expected_counts(probability * right) / mdp.expected_counts(probability)
    certain = (q == 0) | (q == 1)
    reward = torch.logit(q.masked_fill(certain, 0.5)).requires_grad_()
    states, actions, cu_seqlens = mdp.packed(EVERYTHING)
    owner = packed.sequence_ids(cu_seqlens)
    terms = F.binary_cross_entropy_with_logits(reward[states, actions], right[owner], reduction="none")
    (slope,) = torch.autograd.grad((probability[owner] * terms).sum(), reward)
    close(slope[~certain], torch.zeros_like(slope[~certain]))
    assert float(reward[~certain].detach().std()) > 0.1


# DPO


def test_dpo_is_a_z_over_the_two_responses_of_a_pair():
    """Rollouts are the reference's, which is the base measure: weights are exp R. The preferred one is the expert."""
    chosen, rejected = sample(6, 16), sample(7, 16)
    logits, pairs = mdp.random_table(8).requires_grad_(), torch.cat([chosen, rejected])
    states, actions, cu_seqlens = mdp.packed(pairs)
    log_ratio = packed.segment_sum(implicit(logits, states, actions, beta=1.0), cu_seqlens)
    theirs = preference_losses(*log_ratio.chunk(2), DPOConfig(beta=BETA)).mean()
    by_hand = -F.logsigmoid(BETA * (log_ratio[:16] - log_ratio[16:])).mean()
    close(theirs, by_hand)
    rewards, groups = split(implicit(logits, states, actions), cu_seqlens), list(range(16))
    ours = prm_loss(Side(rewards[:16], groups), Side(rewards, [*groups, *groups]), REFERENCE[states, actions])
    close(gradient(ours, logits), gradient(theirs, logits))


# DQO


def kl_return(logits: Tensor) -> Tensor:
    """J = E[outcome - beta log(pi / pi_ref)] over all trajectories, differentiable."""
    logprob = logits.log_softmax(-1)
    log_ratio = mdp.trajectory_sums(logprob - NORMALISED)
    return (mdp.trajectory_sums(logprob).exp() * (outcomes(EVERYTHING) - BETA * log_ratio)).sum()


def outcome_rewards(rows: Tensor) -> Tensor:
    """The outcome at each trajectory's last token, 0 elsewhere."""
    reward = torch.zeros(int(mdp.LENGTHS[rows].sum()), dtype=torch.float64)
    reward[mdp.LENGTHS[rows].cumsum(0) - 1] = outcomes(rows)
    return reward


def dqo_loss(logits: Tensor, value: Tensor, rows: Tensor, td_lambda: float) -> Tensor:
    states, actions, _ = mdp.packed(rows)
    batch = as_batch(rows)
    batch.write("state_value", value[states])
    config = DQOConfig(beta=BETA, td_lambda=td_lambda, kl_coefficient=0.0)
    objective = PolicyDQO(SimpleNamespace(dqo=config))
    objective.prepare(batch)
    return objective.loss({"logprob": logits.log_softmax(-1)[states, actions]}, batch)[0]


def test_dqo_on_its_own_rollouts_is_the_policy_update_with_a_critic():
    """Rewards: the outcome, minus beta log(pi / pi_ref) (entropy in the return, KL to the reference); baseline: V."""
    rows = sample(9, 20)
    states, actions, cu_seqlens = mdp.packed(rows)
    logits, value = mdp.random_table(10).requires_grad_(), single(mdp.random_table(11)[:, 0])
    theirs = dqo_loss(logits, value, rows, td_lambda=1.0)
    logprob = logits.log_softmax(-1)[states, actions]
    reward = outcome_rewards(rows) - BETA * (logprob.detach() - REFERENCE[states, actions])
    advantage = packed.returns_to_go(reward, cu_seqlens) - value[states]
    tokens = losses.policy_loss(logprob, logprob.detach(), advantage).loss
    ours = packed.segment_mean(tokens, cu_seqlens).mean()
    close(2 * BETA * gradient(ours, logits), gradient(theirs, logits))


def test_dqo_climbs_the_kl_regularised_return():
    """In expectation over its own rollouts, with residuals summed over tokens, for any V."""
    logits, value = mdp.random_table(12).requires_grad_(), mdp.random_table(13)[:, 0]
    states, actions, cu_seqlens = mdp.packed(EVERYTHING)
    k = BETA * (logits.log_softmax(-1) - NORMALISED)[states, actions]
    target = packed.returns_to_go(outcome_rewards(EVERYTHING) - k.detach(), cu_seqlens) + k.detach()
    residual = (k + value[states] - target).square()
    probability = mdp.trajectory_sums(logits.detach().log_softmax(-1)).exp()
    theirs = (probability * packed.segment_sum(residual, cu_seqlens)).sum()
    close(gradient(theirs, logits), -2 * BETA * gradient(kl_return(logits), logits))


def optimum() -> tuple[Tensor, Tensor]:
    """log pi* [state, action] and V* [state] of J, by backward induction."""
    outcome = torch.zeros(mdp.NUM_STATES, mdp.V, dtype=torch.float64)
    last = mdp.LENGTHS - 1
    outcome[mdp.STATES[EVERYTHING, last], mdp.ACTIONS[EVERYTHING, last]] = outcomes(EVERYTHING)
    q, value = mdp.soft_optimal(outcome + BETA * NORMALISED, BETA)
    return (q - value[:, None]) / BETA, value


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
def test_dqo_off_its_rollouts_shares_the_optimum(td_lambda):
    """Whatever trajectories it is trained on, the residuals are 0 at the policy that rePIRL's policy update ends at."""
    policy, value = optimum()
    logits = policy.clone().requires_grad_()
    (slope,) = torch.autograd.grad(kl_return(logits), logits)
    close(slope, torch.zeros_like(slope))
    states, actions, cu_seqlens = mdp.packed(EVERYTHING)
    k = BETA * (policy - NORMALISED)[states, actions]
    returns = lambda_returns(outcome_rewards(EVERYTHING) - k, value[states], cu_seqlens, td_lambda)
    close(returns, value[states])
    # Elsewhere they are not.
    other = BETA * (mdp.random_table(14).log_softmax(-1) - NORMALISED)[states, actions]
    elsewhere = lambda_returns(outcome_rewards(EVERYTHING) - other, value[states], cu_seqlens, td_lambda)
    assert float((elsewhere - value[states]).abs().max()) > 0.1


def test_dqos_best_policy_is_the_prm_that_repirl_learns_from_it():
    """Experts of that policy, base measure pi_ref, reward `implicit`: Z is 1, and the experts' own density the optimum.
    Times beta, its rewards are the outcome, shaped by V."""
    policy, value = optimum()
    states, actions, cu_seqlens = mdp.packed(EVERYTHING)
    reward = losses.token_rewards("implicit", logprob=policy[states, actions], ref_logprob=NORMALISED[states, actions])
    length = mdp.LENGTHS.repeat_interleave(mdp.LENGTHS).double()
    log_weights = importance.log_importance_weights(
        reward, -math.log(mdp.NUM_TRAJECTORIES) / length, cu_seqlens, base_logprob=NORMALISED[states, actions]
    )
    model = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
    close(model, mdp.trajectory_sums(policy).exp())
    close(importance.log_partition(log_weights.log_weight, log_weights.bucket_ids), torch.zeros(1).double())
    following = torch.cat([value, value.new_zeros(1)])[mdp.NEXT_STATE[states, actions]]
    close(BETA * reward, outcome_rewards(EVERYTHING) + following - value[states])
    close(BETA * packed.segment_sum(reward, cu_seqlens), outcomes(EVERYTHING) - value[0])


# Behaviour cloning and inverse soft-Q


@pytest.mark.parametrize("kind", ["logprob", "soft_q"])
def test_cloning_is_rewards_of_logits_with_the_exact_z(tmp_path, kind):
    """`logprob` has Z = 1, `soft_q` (gamma 1) log Z = V(s_0): both losses are - log pi of the experts."""
    rows = sample(15, 10)
    logits = mdp.random_table(16).requires_grad_()

    def rewards(chosen):
        states, actions, cu_seqlens = mdp.packed(chosen)
        reward = losses.token_rewards(
            kind,
            logprob=logits.log_softmax(-1)[states, actions],
            target_logit=logits[states, actions],
            logsumexp=logits.logsumexp(-1)[states],
            cu_seqlens=cu_seqlens,
        )
        return split(reward, cu_seqlens)

    # Every trajectory once, from a sampler to which all are equally likely: the Z of the uniform base measure.
    ours = prm_loss(Side(rewards(rows), [0] * len(rows)), Side(rewards(EVERYTHING), [0] * mdp.NUM_TRAJECTORIES))
    states, actions, _ = mdp.packed(rows)
    batch, cloning = as_batch(rows), IQLearn(tiny_config(tmp_path, objective="iq-learn", iq={"alpha": None}))
    cloning.prepare(batch)
    outputs = {
        "logprob": logits.log_softmax(-1)[states, actions],
        "target_logit": logits[states, actions],
        "logsumexp": logits.logsumexp(-1)[states],
    }
    per_token = cloning.loss(outputs, batch)[0]
    close(gradient(ours, logits), batch.num_response_tokens / len(rows) * gradient(per_token, logits))
