"""DQO: the published numbers of DQO and OREO, the KL term, and exactness under any micro-batches."""

import pytest
import torch
from exact_mdp import V as VOCAB
from tiny import gradients, tiny_config

from repirl.batch import pack
from repirl.export import export_checkpoint
from repirl.learner import Learner
from repirl.loop import train
from repirl.models import load_model
from repirl.objectives.dqo import CriticDQO, PolicyDQO, lambda_returns
from repirl.options import OptimizerConfig
from repirl.report.log import read_metrics
from repirl.run import build

# jwhj/OREO 6f7403b, pcl_trainer.py (lambda 1; its single step is lambda 0), and DQO's definition (2410.09302).
LENS, BETA, OUTCOMES = [3, 5, 4], 0.03, [1.0, 0.0, 1.0]
LOGPROB = [-1.695, -2.434, -0.066, -2.736, -2.059, -2.767, -2.86, -2.519, -2.579, -2.21, -2.397, -1.823]
REF_LOGPROB = [-1.591, -1.902, -1.58, -1.575, -0.959, -1.033, -1.544, -0.86, -0.65, -0.909, -2.91, -0.967]
VALUES = [-0.206, 0.105, 0.452, -0.996, 0.589, 0.03, -0.36, 0.38, 0.108, 0.19, -0.186, 0.172]
WEIGHTS = [2.406083, 0.00094, 0.028072]
LOSSES = {0.0: 0.384032, 0.95: 0.658377, 1.0: 0.720486}
RETURNS = {
    0.0: [0.10812, 0.46796, 0.95458, 0.62383, 0.063, -0.30798, 0.41948, 0.04977, 0.24787, -0.14697, 0.15661, 1.02568],
    0.95: [
        *[0.90651, 0.945411, 0.95458, 0.218435, 0.162269, 0.134493, 0.105762, 0.04977],
        *[0.968878, 0.948956, 0.967606, 1.02568],
    ],
    1.0: [0.97366, 0.97054, 0.95458, 0.2091, 0.17427, 0.14127, 0.08925, 0.04977, 1.10719, 1.04932, 1.01029, 1.02568],
}
VALUE_GRADIENTS = {
    0.0: [
        *[-0.069804, -0.080658, -0.111684, -0.215977, 0.070133, 0.045064, -0.103931, 0.044031],
        *[-0.023312, 0.056162, -0.057102, -0.14228],
    ],
    0.95: [
        *[-0.247225, -0.186758, -0.111684, -0.161925, 0.056897, -0.013932, -0.062102, 0.044031],
        *[-0.14348, -0.126493, -0.192268, -0.14228],
    ],
    1.0: [
        *[-0.262147, -0.192342, -0.111684, -0.16068, 0.055297, -0.014836, -0.0599, 0.044031],
        *[-0.166532, -0.14322, -0.199382, -0.14228],
    ],
}
POLICY_GRADIENTS = {
    0.0: [
        *[-0.002094, -0.00242, -0.003351, -0.006479, 0.002104, 0.001352, -0.003118, 0.001321],
        *[-0.000699, 0.001685, -0.001713, -0.004268],
    ],
    0.95: [
        *[-0.007417, -0.005603, -0.003351, -0.004858, 0.001707, -0.000418, -0.001863, 0.001321],
        *[-0.004304, -0.003795, -0.005768, -0.004268],
    ],
    1.0: [
        *[-0.007864, -0.00577, -0.003351, -0.00482, 0.001659, -0.000445, -0.001797, 0.001321],
        *[-0.004996, -0.004297, -0.005981, -0.004268],
    ],
}


def configured(tmp_path, **options):
    return tiny_config(tmp_path, objective="dqo", dqo={"beta": BETA} | options)


def published():
    """The published inputs as a batch. The policy that sampled is the reference, as for the published weights."""
    batch = pack([([3], [4] * n) for n in LENS], outcome=OUTCOMES)
    streams = {"logprob": LOGPROB, "ref_logprob": REF_LOGPROB, "old_logprob": REF_LOGPROB, "state_value": VALUES}
    for name, values in streams.items():
        batch.write(name, torch.tensor(values))
    return batch


def loss_and_gradient(objective, batch):
    """Of the learner's own outputs."""
    objective.prepare(batch)
    name, stream = ("value", "state_value") if isinstance(objective, CriticDQO) else ("logprob", "logprob")
    outputs = batch.read(stream).requires_grad_()
    loss, figures = objective.loss({name: outputs}, batch)
    loss.backward()
    return float(loss), outputs.grad, figures


@pytest.mark.parametrize("td_lambda", [0.0, 0.95, 1.0])
def test_losses_and_gradients_are_the_published_ones(tmp_path, td_lambda):
    config = configured(tmp_path, td_lambda=td_lambda)
    for kind, expected in ((CriticDQO, VALUE_GRADIENTS), (PolicyDQO, POLICY_GRADIENTS)):
        loss, gradient, _ = loss_and_gradient(kind(config), published())
        assert loss == pytest.approx(LOSSES[td_lambda], abs=1e-5)
        torch.testing.assert_close(gradient, torch.tensor(expected[td_lambda]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("td_lambda", [0.0, 0.95, 1.0])
def test_returns_are_the_published_ones(td_lambda):
    batch = published()
    gain = -BETA * (batch.read("logprob") - batch.read("ref_logprob"))
    gain[batch.response_cu_seqlens[1:] - 1] += batch.outcome
    actual = lambda_returns(gain, batch.read("state_value"), batch.response_cu_seqlens, td_lambda)
    torch.testing.assert_close(actual, torch.tensor(RETURNS[td_lambda]), atol=1e-5, rtol=0)


def test_importance_weights_are_the_published_ones(tmp_path):
    """A response's share of loss and gradient is multiplied by its weight."""
    plain, weighted = configured(tmp_path), configured(tmp_path, importance_weights=True)
    for kind in (CriticDQO, PolicyDQO):
        loss, gradient, _ = loss_and_gradient(kind(plain), published())
        weighted_loss, weighted_gradient, _ = loss_and_gradient(kind(weighted), published())
        weights = torch.tensor(WEIGHTS).repeat_interleave(torch.tensor(LENS))
        torch.testing.assert_close(weighted_gradient, gradient * weights, atol=1e-6, rtol=1e-3)
        assert weighted_loss != pytest.approx(loss)


def test_the_kl_term_is_unbiased(tmp_path):
    """Over all tokens of a small vocabulary, weighted by mu: the KL divergence, and its gradient in the logits."""
    generator = torch.Generator().manual_seed(0)
    logits, ref, mu = (torch.randn(VOCAB, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_pi, log_ref, log_mu = logits.log_softmax(0), ref.log_softmax(0), mu.log_softmax(0)
    batch = pack([([3], [i]) for i in range(VOCAB)], outcome=[0.0] * VOCAB)
    batch.write("ref_logprob", log_ref)
    batch.write("old_logprob", log_mu)
    estimate = (log_mu.exp() * PolicyDQO(configured(tmp_path))._kl(log_pi, batch)).sum()
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()
    torch.testing.assert_close(estimate, exact, atol=1e-6, rtol=1e-6)
    [actual] = torch.autograd.grad(estimate, logits, retain_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(exact, logits)[0], atol=1e-6, rtol=1e-6)


def test_the_kl_term_is_added_and_reported(tmp_path):
    without, _, _ = loss_and_gradient(PolicyDQO(configured(tmp_path)), published())
    total, _, figures = loss_and_gradient(PolicyDQO(configured(tmp_path, kl_coefficient=0.5)), published())
    assert total > without
    assert float(figures["kl_reference"][0]) > 0


@pytest.mark.parametrize(("kind", "reads_states"), [("causal", False), ("value", True)])
def test_micro_batches_do_not_change_the_gradient(tmp_path, kind, reads_states):
    config = configured(tmp_path, importance_weights=True, kl_coefficient=0.1)
    model = load_model(config.policy.model, kind=kind, dtype=torch.float32, device=torch.device("cpu"))
    if kind == "value":
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    objective = (CriticDQO if kind == "value" else PolicyDQO)(config)
    actual = []
    for budget in (1, 1000):
        learner = Learner(model, OptimizerConfig(max_grad_norm=1e9), tokens_per_microbatch=budget)
        learner.reads_states = reads_states
        batch = published()
        objective.prepare(batch)
        actual.append(gradients(learner, batch, lambda outputs, micro: objective.loss(outputs, micro)[0]))
    assert max(float(gradient.abs().max()) for gradient in actual[0].values()) > 1e-3
    for name, gradient in actual[0].items():
        torch.testing.assert_close(gradient, actual[1][name], atol=1e-5, rtol=1e-4)


def test_a_critic_reads_the_state_before_each_token(tmp_path):
    """Its value of a token does not depend on that token, and is the value read at the token before."""
    config = configured(tmp_path)
    model = load_model(config.policy.model, kind="value", dtype=torch.float32, device=torch.device("cpu"))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    critic = Learner(model, None, tokens_per_microbatch=100)
    critic.reads_states = True
    first = critic.score(pack([([3, 5], [4, 6])]))["value"]
    other = critic.score(pack([([3, 5], [4, 9])]))["value"]
    assert torch.equal(first, other)
    critic.reads_states = False
    at_tokens = critic.score(pack([([3], [5, 4, 6])]))["value"]
    torch.testing.assert_close(first, at_tokens[:2])


def test_with_adapters_critic_and_policy_share_a_base(tmp_path):
    """The base is the reference; the first losses are those of whole models, as adapters start as nothing."""
    losses = {}
    for adapters in (None, {"rank": 4}):
        folder = tmp_path / str(adapters is None)
        config = tiny_config(tmp_path, objective="dqo", steps=2, adapters=adapters, output_dir=str(folder))
        train(config)
        losses[adapters is None] = [line["critic/loss"] for line in read_metrics(folder / "metrics.jsonl")[1:]]
    assert losses[False][0] == pytest.approx(losses[True][0], rel=1e-5)
    run = build(config)
    assert run.learners["critic"].model is run.learners["policy"].model
    assert run.learners["critic"].reads_values
    assert not run.learners["policy"].reads_values
    # The critic is not exported.
    assert [path.name for path in export_checkpoint(config.output_dir, tmp_path / "out")] == ["policy"]
