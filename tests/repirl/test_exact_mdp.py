"""The method's claims on an MDP where every expectation can be computed exactly."""

import math

import exact_mdp as mdp
import pytest
import torch
from repirl_kernels import importance, losses, packed, rloo_advantages
from torch import Tensor

GROUPS = packed.GROUPINGS


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def slope(x: list[int], y: list[float]) -> float:
    a = torch.tensor(x, dtype=torch.float64).log()
    b = torch.tensor(y, dtype=torch.float64).log()
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a @ a))


def two_pass_gradient(table: Tensor, expert_rows: Tensor, policy_rows: Tensor, sampler: Tensor, **options) -> Tensor:
    """Gradient of the IRL loss at a table of rewards, by coefficients."""
    normalize = options.pop("normalize", "sequence")
    e_states, e_actions, e_cu = mdp.packed(expert_rows)
    p_states, p_actions, p_cu = mdp.packed(policy_rows)
    log_weights = importance.log_importance_weights(
        table[p_states, p_actions], sampler[p_states, p_actions], p_cu, **options
    )
    weights = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
    c = importance.irl_coefficients(weights, log_weights, p_cu, e_cu, normalize=normalize)
    gradient = torch.zeros_like(table)
    gradient.index_put_((e_states, e_actions), c.expert, accumulate=True)
    return gradient.index_put_((p_states, p_actions), c.policy, accumulate=True)


def test_the_enumeration_is_complete() -> None:
    policy = mdp.random_table(0).log_softmax(-1)
    assert mdp.NUM_STATES == 85
    assert mdp.NUM_TRAJECTORIES == 341
    close(mdp.trajectory_sums(policy).logsumexp(0), torch.zeros((), dtype=torch.float64), 1e-12)


# 1. Importance sampling


@pytest.mark.parametrize("kind", ["trajectory", "per_decision"])
def test_importance_sampling_converges_at_the_monte_carlo_rate(kind: str) -> None:
    reward = mdp.random_table(1, 0.4)
    if kind == "per_decision":
        # What a prefix is worth ignores what follows it, which is right if exp r sums to 1 in every state.
        reward = reward.log_softmax(-1)
    sampler = mdp.random_table(2, 0.4).log_softmax(-1)
    total = mdp.trajectory_sums(reward)
    exact_log_z = total.logsumexp(0)
    exact_gradient = mdp.expected_counts(total.softmax(0))
    log_mu = mdp.trajectory_sums(sampler)
    generator = torch.Generator().manual_seed(0)
    sizes, repetitions = [64, 256, 1024], 200
    log_z_errors, gradient_errors = [], []
    for size in sizes:
        rows = torch.multinomial(log_mu.exp(), size * repetitions, replacement=True, generator=generator)
        groups = torch.arange(repetitions).repeat_interleave(size)
        states, actions, cu = mdp.packed(rows)
        log_weights = importance.log_importance_weights(
            reward[states, actions], sampler[states, actions], cu, group_ids=groups, kind=kind
        )
        weights = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
        c = repetitions * importance.irl_coefficients(weights, log_weights, cu, cu).policy
        gradient = torch.zeros(repetitions, mdp.NUM_STATES, mdp.V, dtype=torch.float64)
        owner = groups[packed.sequence_ids(cu)]
        gradient.index_put_((owner, states, actions), c, accumulate=True)
        gradient_errors.append(float((gradient - exact_gradient).flatten(1).norm(dim=1).square().mean().sqrt()))
        if kind == "trajectory":
            log_z = importance.log_partition(log_weights.log_weight, log_weights.bucket_ids)
            log_z_errors.append(float((log_z - exact_log_z).square().mean().sqrt()))
    assert -0.6 < slope(sizes, gradient_errors) < -0.4
    if kind == "trajectory":
        assert -0.6 < slope(sizes, log_z_errors) < -0.4
        assert log_z_errors[-1] < 0.1


def test_prm_training_reaches_the_maximum_entropy_solution() -> None:
    # Experts are a multiset in which every trajectory occurs, so the solution is their distribution itself.
    target = mdp.trajectory_sums(mdp.random_table(3)).softmax(0)
    counts = (target * 2000).ceil().long()
    experts = torch.arange(mdp.NUM_TRAJECTORIES).repeat_interleave(counts)
    expert_distribution = counts.double() / counts.sum()
    # Every trajectory once, from a sampler to which all are equally likely: log Z is exact.
    everything = torch.arange(mdp.NUM_TRAJECTORIES)
    e_states, e_actions, e_cu = mdp.packed(experts)
    p_states, p_actions, p_cu = mdp.packed(everything)
    length = mdp.LENGTHS.repeat_interleave(mdp.LENGTHS)
    sampler_logprob = -math.log(mdp.NUM_TRAJECTORIES) / length.double()
    table = torch.zeros(mdp.NUM_STATES, mdp.V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        expert, policy = table[e_states, e_actions], table[p_states, p_actions]
        with torch.no_grad():
            log_weights = importance.log_importance_weights(policy, sampler_logprob, p_cu)
            weights = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
            c = importance.irl_coefficients(weights, log_weights, p_cu, e_cu)
            value = losses.irl_loss(expert, e_cu, policy, sampler_logprob, p_cu)
        second_pass = losses.irl_token_loss(expert, c.expert).sum()
        (second_pass + losses.irl_token_loss(policy, c.policy).sum()).backward()
        return value

    optimizer.step(closure)
    learned = mdp.trajectory_sums(table.detach()).softmax(0)
    close(learned, expert_distribution, 1e-5)
    close(mdp.expected_counts(learned), mdp.expected_counts(expert_distribution), 1e-5)
    # At the optimum the loss is the experts' entropy: nothing is left to explain but their own spread.
    entropy = -(expert_distribution * expert_distribution.log()).sum()
    close(closure().detach(), entropy, 1e-6)


def test_a_reference_as_base_measure_tilts_the_solution() -> None:
    reward, reference = mdp.random_table(1, 0.5), mdp.random_table(2).log_softmax(-1)
    states, actions, cu = mdp.packed(torch.arange(mdp.NUM_TRAJECTORIES))
    length = mdp.LENGTHS.repeat_interleave(mdp.LENGTHS)
    log_weights = importance.log_importance_weights(
        reward[states, actions],
        -math.log(mdp.NUM_TRAJECTORIES) / length.double(),
        cu,
        base_logprob=reference[states, actions],
    )
    tilted = mdp.trajectory_sums(reward) + mdp.trajectory_sums(reference)
    close(importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids), tilted.softmax(0), 1e-12)
    log_z = importance.log_partition(log_weights.log_weight, log_weights.bucket_ids)
    close(log_z[0], tilted.logsumexp(0), 1e-12)


# 1b. Theorem 1


def exact_return(logits: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J = E_pi[sum_t r_t + beta H(pi(.|s_t))], differentiable in the logits."""
    logprob = logits.log_softmax(-1)
    entropy = -(logprob.exp() * logprob).sum(-1)
    probability = mdp.trajectory_sums(logprob).exp()
    bonus = beta * entropy[:, None].expand(-1, mdp.V)
    return (probability * mdp.trajectory_sums(reward + bonus)).sum()


def policy_gradient(logits: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The policy loss over all trajectories, weighted by their probability; its gradient is that of -J.

    What an action leads to includes the entropy of the states after it, so that belongs into the rewards; the
    entropy of its own state is the loss's bonus.
    """
    states, actions, cu = mdp.packed(torch.arange(mdp.NUM_TRAJECTORIES))
    table = logits.log_softmax(-1)
    logprob = table[states, actions]
    entropy = -(table.exp() * table).sum(-1)
    after = torch.cat([entropy, entropy.new_zeros(1)]).detach()[mdp.NEXT_STATE[states, actions]]
    advantage = packed.returns_to_go(reward[states, actions] + beta * after, cu)
    loss = losses.policy_loss(
        logprob, logprob.detach(), advantage, entropy=entropy[states], entropy_coefficient=beta
    ).loss
    probability = mdp.trajectory_sums(table.detach()).exp()
    return (probability[packed.sequence_ids(cu)] * loss).sum()


def test_the_policy_loss_has_the_gradient_of_the_soft_return() -> None:
    logits = mdp.random_table(4).requires_grad_()
    reward, beta = mdp.random_table(5), 0.7
    (expected,) = torch.autograd.grad(-exact_return(logits, reward, beta), logits)
    (actual,) = torch.autograd.grad(policy_gradient(logits, reward, beta), logits)
    close(actual, expected, 1e-12)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_policy_optimisation_reaches_the_soft_optimal_policy(beta: float) -> None:
    reward = mdp.random_table(6)
    q, value = mdp.soft_optimal(reward, beta)
    optimal = (q - value[:, None]) / beta
    logits = torch.zeros(mdp.NUM_STATES, mdp.V, dtype=torch.float64, requires_grad=True)
    for _ in range(10):
        # A natural-gradient step, which is soft policy iteration: rarely visited states learn as fast.
        (gradient,) = torch.autograd.grad(policy_gradient(logits, reward, beta), logits)
        policy = logits.detach().log_softmax(-1)
        visits = mdp.expected_counts(mdp.trajectory_sums(policy).exp())
        logits = (policy - gradient / visits / beta).requires_grad_()
    close(logits.detach().log_softmax(-1).exp(), optimal.exp(), 1e-9)
    close(exact_return(logits.detach(), reward, beta), value[0], 1e-9)
    # Ziebart 2008: with deterministic transitions that is the maximum-entropy distribution over trajectories.
    close(mdp.trajectory_sums(optimal), (mdp.trajectory_sums(reward) / beta).log_softmax(0), 1e-12)


# 2. Two passes


@pytest.mark.parametrize("group_by", GROUPS)
@pytest.mark.parametrize("normalize", importance.NORMALIZATIONS)
@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
def test_two_passes_equal_one_through_shared_parameters(kind: str, normalize: str, group_by: str) -> None:
    generator = torch.Generator().manual_seed(7)
    sampler = mdp.random_table(2).log_softmax(-1)
    expert_rows = torch.randint(mdp.NUM_TRAJECTORIES, (6,), generator=generator)
    policy_rows = torch.randint(mdp.NUM_TRAJECTORIES, (12,), generator=generator)
    options = {
        "kind": kind,
        "group_by": group_by,
        "group_ids": torch.tensor([5, 5, 5, 2, 2, 2, 2, 2, 5, 8, 8, 8]),
    }
    table = mdp.random_table(1).requires_grad_()
    e_states, e_actions, e_cu = mdp.packed(expert_rows)
    p_states, p_actions, p_cu = mdp.packed(policy_rows)
    loss = losses.irl_loss(
        table[e_states, e_actions],
        e_cu,
        table[p_states, p_actions],
        sampler[p_states, p_actions],
        p_cu,
        normalize=normalize,
        **options,
    )
    (expected,) = torch.autograd.grad(loss, table)
    actual = two_pass_gradient(table.detach(), expert_rows, policy_rows, sampler, normalize=normalize, **options)
    assert float(expected.norm()) > 0.1
    close(actual, expected, 1e-12)


# 3. A reward that is the policy's own log-probability


def fractional_policy() -> tuple[Tensor, Tensor]:
    """A policy of tenths, and a multiset of 10^4 trajectories in which each has exactly its probability."""
    generator = torch.Generator().manual_seed(11)
    tenths = torch.tensor([1, 1, 2, 3, 3])
    table = torch.stack([tenths[torch.randperm(mdp.V, generator=generator)] for _ in range(mdp.NUM_STATES)])
    logprob = (table.double() / 10).log()
    copies = (mdp.trajectory_sums(logprob).exp() * 10**mdp.LONGEST).round().long()
    return logprob, torch.arange(mdp.NUM_TRAJECTORIES).repeat_interleave(copies)


def gradient_in_logits(logprob: Tensor, expert_rows: Tensor, policy_rows: Tensor, kind: str) -> Tensor:
    logits = logprob.clone().requires_grad_()
    table = logits.log_softmax(-1)
    by_reward = two_pass_gradient(table.detach(), expert_rows, policy_rows, logprob, kind=kind)
    return torch.autograd.grad((table * by_reward).sum(), logits)[0]


@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
def test_the_policy_is_at_rest_among_its_own_experts(kind: str) -> None:
    logprob, rows = fractional_policy()
    assert len(rows) == 10**4
    states, actions, cu = mdp.packed(rows)
    reward = losses.token_rewards("logprob", logprob=logprob[states, actions])
    log_weights = importance.log_importance_weights(reward, logprob[states, actions], cu, kind=kind)
    weights = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
    counts = torch.bincount(log_weights.bucket_ids)[log_weights.bucket_ids]
    close(weights, 1 / counts.double(), 1e-12)
    close(gradient_in_logits(logprob, rows, rows, kind), torch.zeros_like(logprob), 1e-12)
    # Other experts do move it, and only through their own term.
    others = torch.arange(mdp.NUM_TRAJECTORIES)
    assert float(gradient_in_logits(logprob, others, rows, kind).norm()) > 0.1


def test_soft_q_sums_to_logprob_plus_the_first_value() -> None:
    logits = mdp.random_table(8)
    states, actions, cu = mdp.packed(torch.arange(mdp.NUM_TRAJECTORIES))
    reward = losses.token_rewards(
        "soft_q",
        target_logit=logits[states, actions],
        logsumexp=logits.logsumexp(-1)[states],
        cu_seqlens=cu,
    )
    expected = mdp.trajectory_sums(logits.log_softmax(-1)) + logits[0].logsumexp(0)
    close(packed.segment_sum(reward, cu), expected, 1e-12)


# 5. Advantages


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_ignore_a_constant_in_every_reward_of_a_group(gamma: float, whiten: bool) -> None:
    rows = torch.randint(mdp.NUM_TRAJECTORIES, (12,), generator=torch.Generator().manual_seed(1))
    states, actions, cu = mdp.packed(rows)
    reward = mdp.random_table(9)[states, actions]
    outcome = (rows % 2).double()
    groups = torch.tensor([0, 1, 0, 2, 2, 1, 0, 2, 1, 0, 1, 2])
    shift = torch.tensor([3.0, -7.0, 0.5], dtype=torch.float64)[groups]
    options = {"outcome_coefficient": 1.0, "process_coefficient": 0.1, "gamma": gamma, "whiten": whiten}
    before = rloo_advantages(outcome, reward, cu, groups, **options)
    shifted = reward + 2 * shift[packed.sequence_ids(cu)]
    after = rloo_advantages(outcome + shift, shifted, cu, groups, **options)
    close(after, before, 1e-10)
    # A constant on one rollout alone is no such constant.
    alone = rloo_advantages(outcome + shift * (torch.arange(12) == 0), reward, cu, groups, **options)
    assert not torch.allclose(alone, before, atol=1e-3)


# 6. Packing and micro-batches


def repack(order: Tensor, cu: Tensor) -> Tensor:
    """Positions of the tokens of the sequences in a new order."""
    return torch.cat([torch.arange(int(cu[i]), int(cu[i + 1])) for i in order.tolist()])


@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
@pytest.mark.parametrize("normalize", importance.NORMALIZATIONS)
def test_order_and_micro_batches_leave_the_irl_gradient(kind: str, normalize: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(mdp.NUM_TRAJECTORIES, (16,), generator=generator)
    experts = torch.randint(mdp.NUM_TRAJECTORIES, (5,), generator=generator)
    groups = torch.randint(3, (16,), generator=generator)
    table, sampler = mdp.random_table(1), mdp.random_table(2).log_softmax(-1)
    options = {"kind": kind, "normalize": normalize}
    expected = two_pass_gradient(table, experts, rows, sampler, group_ids=groups, **options)
    order = torch.randperm(16, generator=generator)
    actual = two_pass_gradient(table, experts.flip(0), rows[order], sampler, group_ids=groups[order], **options)
    close(actual, expected, 1e-13)

    # The second pass, three rollouts at a time, through parameters.
    states, actions, cu = mdp.packed(rows)
    log_weights = importance.log_importance_weights(
        table[states, actions], sampler[states, actions], cu, group_ids=groups, kind=kind
    )
    weights = importance.self_normalize(log_weights.log_weight, log_weights.bucket_ids)
    e_states, e_actions, e_cu = mdp.packed(experts)
    c = importance.irl_coefficients(weights, log_weights, cu, e_cu, normalize=normalize)
    parameters = table.clone().requires_grad_()
    losses.irl_token_loss(parameters[e_states, e_actions], c.expert).sum().backward()
    for part in order.split(3):
        tokens = repack(part, cu)
        rewards = parameters[states[tokens], actions[tokens]]
        losses.irl_token_loss(rewards, c.policy[tokens]).sum().backward()
    close(parameters.grad, expected, 1e-13)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_order_and_micro_batches_leave_the_policy_gradient(aggregation: str) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(mdp.NUM_TRAJECTORIES, (12,), generator=generator)
    groups = torch.arange(12) % 3
    states, actions, cu = mdp.packed(rows)
    reward = mdp.random_table(9)
    old, reference, start = (mdp.random_table(s, 0.5).log_softmax(-1) for s in (2, 3, 4))
    outcome = (rows % 2).double()

    def advantages(rows: Tensor, groups: Tensor, outcome: Tensor) -> Tensor:
        states, actions, cu = mdp.packed(rows)
        return rloo_advantages(
            outcome,
            reward[states, actions],
            cu,
            groups,
            outcome_coefficient=1.0,
            process_coefficient=0.1,
            gamma=0.9,
            whiten=True,
        )

    advantage = advantages(rows, groups, outcome)

    def gradient(parts: list[Tensor]) -> Tensor:
        logits = start.clone().requires_grad_()
        for part in parts:
            tokens = repack(part, cu)
            s, a = states[tokens], actions[tokens]
            table = logits.log_softmax(-1)
            part_cu = mdp.packed(rows[part])[2]
            weights = losses.aggregate_weights(
                part_cu, aggregation, constant_length=4, num_tokens=len(states), num_sequences=12
            )
            loss = losses.policy_loss(
                table[s, a],
                old[s, a],
                advantage[tokens],
                entropy=-(table.exp() * table).sum(-1)[s],
                sampler_logprob=old[s, a] - 0.3,
                ref_logprob=reference[s, a],
                sampler_ratio_cap=1.1,
                entropy_coefficient=0.01,
                kl_coefficient=0.1,
            ).loss
            (weights.double() * loss).sum().backward()
        return logits.grad

    whole = gradient([torch.arange(12)])
    order = torch.randperm(12, generator=generator)
    assert float(whole.norm()) > 0.01
    close(gradient([order]), whole, 1e-13)
    close(gradient(list(order.split(5))), whole, 1e-13)
    close(advantages(rows[order], groups[order], outcome[order]), advantage[repack(order, cu)], 1e-12)
