"""DPO: the published numbers, the identity with implicit rewards, exactness under any micro-batches, and its pairs."""

import pytest
import torch
from repirl_kernels import segment_mean, segment_sum, token_rewards
from tiny import gradients, tiny_config

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.data import Data
from repirl.data.experts import Expert, Experts
from repirl.learner import Learner
from repirl.models import load_model
from repirl.objectives.dpo import DPO, OnlineDPO, preference_losses, verified_pairs
from repirl.options import DPOConfig, OptimizerConfig

# TRL f2cd577, dpo_trainer, loss_type sigmoid with beta 0.1: losses and their gradients on these sums of log-probs.
CHOSEN, REJECTED = [-12.3, -8.1, -20.4], [-11.0, -9.7, -25.2]
REF_CHOSEN, REF_REJECTED = [-13.0, -8.0, -21.0], [-10.5, -9.9, -23.0]
LOSSES, SMOOTHED = [0.634946, 0.70826, 0.562915], [0.646946, 0.70526, 0.590915]
MEAN, GRADIENT = 0.635374, [-0.015668, -0.016917, -0.014348]
CHOSEN_REWARDS, REJECTED_REWARDS = [0.07, -0.01, 0.06], [-0.05, 0.02, -0.22]
PAIRS = [([3, 4], [5, 6, 1], [7, 1]), ([9], [4, 1], [8, 8, 3, 1]), ([5, 5, 5], [6, 1], [3, 3, 1])]


def configured(tmp_path, **options):
    return tiny_config(tmp_path, objective="dpo", dpo=options)


def batch_of_pairs():
    sequences = [(p, a) for p, a, _ in PAIRS] + [(p, b) for p, _, b in PAIRS]
    return pack(sequences, group_ids=[0, 1, 2] * 2)


def spread(sums, lens):
    """Token values with these sums."""
    return torch.cat([torch.full((n,), s / n, dtype=torch.float64) for s, n in zip(sums, lens, strict=True)])


def scored_pairs(ref=True):
    """The published sums of log-probabilities, spread over tokens."""
    batch = batch_of_pairs()
    lens = batch.response_cu_seqlens.diff().tolist()
    batch.write("logprob", spread(CHOSEN + REJECTED, lens))
    if ref:
        batch.write("ref_logprob", spread(REF_CHOSEN + REF_REJECTED, lens))
    return batch


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, LOSSES), (0.1, SMOOTHED)])
def test_losses_are_the_published_ones(smoothing, expected):
    chosen, rejected = (torch.tensor(a) - torch.tensor(b) for a, b in [(CHOSEN, REF_CHOSEN), (REJECTED, REF_REJECTED)])
    losses = preference_losses(chosen, rejected, DPOConfig(label_smoothing=smoothing))
    torch.testing.assert_close(losses, torch.tensor(expected), atol=1e-5, rtol=0)


def test_loss_gradient_and_figures_are_the_published_ones(tmp_path):
    objective, batch = DPO(configured(tmp_path)), scored_pairs()
    figures = objective.prepare(batch)
    logprob = batch.read("logprob").requires_grad_()
    loss, _ = objective.loss({"logprob": logprob}, batch)
    loss.backward()
    assert float(loss) == pytest.approx(MEAN, abs=1e-5)
    # The same for every token of a response.
    cu_seqlens = batch.response_cu_seqlens
    firsts = logprob.grad[cu_seqlens[:-1]]
    torch.testing.assert_close(firsts, torch.tensor(GRADIENT + [-g for g in GRADIENT]), atol=1e-5, rtol=0)
    torch.testing.assert_close(logprob.grad, firsts.repeat_interleave(cu_seqlens.diff()))
    assert figures["chosen_reward"] == pytest.approx(sum(CHOSEN_REWARDS) / 3, abs=1e-5)
    assert figures["rejected_reward"] == pytest.approx(sum(REJECTED_REWARDS) / 3, abs=1e-5)
    assert figures["margin"] == pytest.approx(figures["chosen_reward"] - figures["rejected_reward"])
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["pairs"] == 3


def test_it_is_the_loss_of_implicit_rewards():
    """- log sigmoid(R(y+) - R(y-)) of a PRM with implicit rewards: the same value and gradient at every token."""
    batch = scored_pairs()
    cu_seqlens, reference = batch.response_cu_seqlens, batch.read("ref_logprob").double()
    results = []
    for kind in ("prm", "dpo"):
        logprob = batch.read("logprob").double().requires_grad_()
        if kind == "prm":
            reward = token_rewards(
                "implicit", logprob=logprob, ref_logprob=reference, cu_seqlens=cu_seqlens, gamma=1.0, beta=0.1
            )
            right, wrong = segment_sum(reward, cu_seqlens).chunk(2)
            loss = -torch.nn.functional.logsigmoid(right - wrong).mean()
        else:
            right, wrong = segment_sum(logprob - reference, cu_seqlens).chunk(2)
            loss = preference_losses(right, wrong, DPOConfig()).mean()
        results.append((loss.detach(), torch.autograd.grad(loss, logprob)[0]))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-12)


def test_ipo_and_sigmoid_norm_compare_means(tmp_path):
    lens = batch_of_pairs().response_cu_seqlens.diff().double()
    ratios = (torch.tensor(CHOSEN + REJECTED).double() - torch.tensor(REF_CHOSEN + REF_REJECTED).double()) / lens
    difference = ratios[:3] - ratios[3:]
    expected = {
        "ipo": ((difference - 5.0) ** 2).mean(),
        "sigmoid_norm": -torch.nn.functional.logsigmoid(0.1 * difference).mean(),
    }
    for kind, value in expected.items():
        objective, batch = DPO(configured(tmp_path, loss=kind)), scored_pairs()
        objective.prepare(batch)
        assert objective.value == pytest.approx(float(value), rel=1e-5)


def test_sft_term_and_no_reference(tmp_path):
    objective, batch = DPO(configured(tmp_path, reference_free=True, sft_coefficient=0.5)), scored_pairs(ref=False)
    figures = objective.prepare(batch)
    lens = batch.response_cu_seqlens.diff()[:3]
    nll = -(torch.tensor(CHOSEN) / lens).mean()
    plain = preference_losses(torch.tensor(CHOSEN), torch.tensor(REJECTED), DPOConfig()).mean()
    assert objective.value == pytest.approx(float(plain + 0.5 * nll), rel=1e-5)
    assert figures["chosen_logprob"] == pytest.approx(-float(nll), rel=1e-5)
    assert not DPO.needs_reference(objective.config)
    assert not objective.reads_reference


def test_smoothing_is_refused_where_there_are_no_labels(tmp_path):
    with pytest.raises(ConfigError, match=r"dpo.label_smoothing is 0.1, but dpo.loss 'ipo'"):
        configured(tmp_path, loss="ipo", label_smoothing=0.1)


@pytest.mark.parametrize("options", [{}, {"loss": "ipo", "sft_coefficient": 0.3}])
def test_micro_batches_do_not_change_the_gradient(tmp_path, options):
    """Pairs are torn apart by a budget of one sequence; the truth is autograd through the whole loss."""
    config = configured(tmp_path, **options)
    model = load_model(config.policy.model, kind="causal", dtype=torch.float32, device=torch.device("cpu"))
    learner, batch = Learner(model, OptimizerConfig(max_grad_norm=1e9), tokens_per_microbatch=1000), batch_of_pairs()
    reference, cu_seqlens = torch.linspace(-5, -1, batch.num_response_tokens), batch.response_cu_seqlens
    logprob = learner._outputs(batch)["logprob"]
    over_tokens = segment_sum if config.dpo.loss == "sigmoid" else segment_mean
    chosen, rejected = over_tokens(logprob - reference, cu_seqlens).chunk(2)
    likelihood = segment_mean(logprob, cu_seqlens)[:3].mean()
    loss = preference_losses(chosen, rejected, config.dpo).mean() - config.dpo.sft_coefficient * likelihood
    loss.backward()
    expected = {name: p.grad.clone() for name, p in learner.trained.items() if p.grad is not None}
    learner.optimizer.zero_grad()
    for budget in (1, 1000):
        learner.tokens_per_microbatch = budget
        batch, objective = batch_of_pairs(), DPO(config)
        batch.write("ref_logprob", reference)
        batch.write("logprob", learner.score(batch)["logprob"])
        objective.prepare(batch)
        assert objective.value == pytest.approx(float(loss.detach()), rel=1e-5)
        actual = gradients(learner, batch, lambda outputs, micro, rules=objective: rules.loss(outputs, micro)[0])
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4)


def rollouts():
    """Prompt 0: wrong, right, right; 1: all wrong; 2: all right; 3: all wrong."""
    prompts = [[3, 4], [5], [6], [7, 8]]
    outcomes = [[0, 1, 1], [0, 0], [1, 1], [0, 0]]
    sequences = [(p, [9, i + 2, 1]) for p, group in zip(prompts, outcomes, strict=True) for i in range(len(group))]
    groups = [g for g, group in enumerate(outcomes) for _ in group]
    batch = pack(sequences, group_ids=groups, outcome=[float(o) for group in outcomes for o in group])
    batch.write("ref_logprob", torch.full((batch.num_response_tokens,), -1.0))
    return batch


def described(pairs):
    """[(chosen prompt and response, rejected ones)], by pair."""
    sequences = [tuple(part.tolist()) for part in pairs.token_ids.split(pairs.lengths.tolist())]
    half = len(sequences) // 2
    return list(zip(sequences[:half], sequences[half:], strict=True))


def test_pairs_are_a_right_and_a_wrong_rollout_of_one_prompt():
    pairs = verified_pairs(rollouts(), Data())
    assert described(pairs) == [((3, 4, 9, 3, 1), (3, 4, 9, 2, 1))]
    assert pairs.group_ids.tolist() == [0, 0]
    assert pairs.outcome.tolist() == [1, 0]


def test_an_experts_solution_stands_in_where_no_rollout_is_right():
    experts = Experts([Expert((7, 8), (4, 4, 1)), Expert((3, 4), (2, 1)), Expert((6,), (2, 1))], seed=0, per_turn=1)
    pairs = verified_pairs(rollouts(), Data(experts=experts))
    assert described(pairs) == [((3, 4, 9, 3, 1), (3, 4, 9, 2, 1)), ((7, 8, 4, 4, 1), (7, 8, 9, 2, 1))]
    # What the reference says of the expert is still to be computed.
    reference = pairs.read("ref_logprob")
    assert reference.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 6


def test_prompts_without_a_pair_are_counted_and_no_pair_skips_the_turn(tmp_path):
    objective = OnlineDPO(tiny_config(tmp_path, objective="online-dpo"))
    batch = objective.select(rollouts(), Data())
    batch.write("logprob", torch.full((batch.num_response_tokens,), -2.0))
    figures = objective.prepare(batch)
    assert (figures["pairs"], figures["prompts_without_pair"]) == (1, 3)
    wrong = rollouts()
    wrong.outcome.fill_(0.0)
    assert objective.select(wrong, Data()) is None
    # Equal rewards, as the log-probabilities are.
    assert figures["accuracy"] == 0.5
