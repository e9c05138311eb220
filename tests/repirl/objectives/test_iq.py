"""Inverse soft-Q learning on a process whose trajectories can be listed."""

import exact_mdp as mdp
import pytest
import torch
from tiny import tiny_config

from repirl.batch import EXPERT, pack
from repirl.objectives.iq import IQLearn


def experts(rows):
    """These trajectories as a batch, and their (state, action) of each token."""
    states, actions, cu_seqlens = mdp.packed(rows)
    responses = [tokens.tolist() for tokens in actions.split(cu_seqlens.diff().tolist())]
    return pack([([1], response) for response in responses], source=EXPERT), states, actions


def outputs(table, states, actions):
    logsumexp, target_logit = table.logsumexp(-1)[states], table[states, actions]
    return {"logprob": target_logit - logsumexp, "logsumexp": logsumexp, "target_logit": target_logit}


def loss_of(tmp_path, table, rows, **options):
    batch, states, actions = experts(rows)
    objective = IQLearn(tiny_config(tmp_path, objective="iq-learn", iq=options))
    objective.prepare(batch)
    return objective.loss(outputs(table, states, actions), batch)


ROWS = torch.randint(mdp.NUM_TRAJECTORIES, (40,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("alpha", [0.5, 3.0, None])
def test_it_is_the_published_objective(tmp_path, alpha, gamma):
    """- f(Q - gamma V') + (V - gamma V'), with f(x) = x - x^2 / (4 alpha), and without the square behaviour cloning."""
    table = mdp.random_table(1).requires_grad_()
    loss, figures = loss_of(tmp_path, table, ROWS, alpha=alpha, gamma=gamma)
    _, states, actions = experts(ROWS)
    value = torch.cat([table.logsumexp(-1), torch.zeros(1, dtype=torch.float64)])
    following = gamma * value[mdp.NEXT_STATE[states, actions]]
    reward = table[states, actions] - following
    f = reward if alpha is None else reward - reward.square() / (4 * alpha)
    expected = (-f + value[states] - following).mean()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    (actual,), (wanted,) = torch.autograd.grad(loss, table), torch.autograd.grad(expected, table)
    torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)
    means = {name: float(total) / count for name, (total, count) in figures.items()}
    cloning = -table.log_softmax(-1)[states, actions].mean()
    assert means["negative_logprob"] == pytest.approx(float(cloning.detach()))
    assert means["reward_square"] == pytest.approx(float(reward.detach().square().mean()))
    if alpha is None:
        torch.testing.assert_close(loss, cloning, atol=1e-12, rtol=1e-12)
        (cloned,) = torch.autograd.grad(cloning, table)
        torch.testing.assert_close(actual, cloned, atol=1e-12, rtol=1e-12)


def test_at_its_optimum_rewards_tell_by_how_much_experts_visit_more_often(tmp_path):
    """Garg et al. 2021: f'(r) of the best r is the ratio of the policy's visits to the experts' (there, section 3)."""
    alpha = 2.0
    shares = mdp.trajectory_sums(mdp.random_table(3, 0.3)).softmax(0)
    counts = (shares * 3000).ceil().long()
    rows = torch.arange(mdp.NUM_TRAJECTORIES).repeat_interleave(counts)
    batch, states, actions = experts(rows)
    objective = IQLearn(tiny_config(tmp_path, objective="iq-learn", iq={"alpha": alpha}))
    objective.prepare(batch)
    table = torch.zeros(mdp.NUM_STATES, mdp.V, dtype=torch.float64, requires_grad=True)
    exact = {"tolerance_grad": 1e-11, "tolerance_change": 0.0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([table], max_iter=500, **exact)

    def closure():
        optimizer.zero_grad()
        loss, _ = objective.loss(outputs(table, states, actions), batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = table.detach()
    value = torch.cat([best.logsumexp(-1), torch.zeros(1, dtype=torch.float64)])
    reward = best - value[mdp.NEXT_STATE]

    of_experts = mdp.expected_counts(counts.double() / counts.sum())
    of_policy = mdp.expected_counts(mdp.trajectory_sums(best.log_softmax(-1)).exp())
    torch.testing.assert_close((1 - reward / (2 * alpha)) * of_experts, of_policy, atol=1e-7, rtol=1e-5)
    # It is not behaviour cloning, which would match the visits.
    assert (of_experts - of_policy).abs().max() > 1e-3
