"""PRIME: its loss and advantages against numbers of its published implementations."""

import pytest
import torch
from repirl_kernels import returns_to_go, rloo_advantages, segment_sum
from tiny import make_model, tiny_config

from repirl.batch import pack
from repirl.configfile import merge
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.objectives.prime import OutcomePRM, PrimePolicy, opposing_means
from repirl.prm import load_prm
from repirl.run import build, needs_reference

# PRIME-RL/PRIME 18ad596 (training/verl: core_algos.py, dp_prime.py; rewards by token, update after, batch_norm) and
# verl-project/verl-recipe 48ea0a7 (recipe/prime), on the same q = log pi_phi - log pi_ref of two groups of 4.
LOGRATIO = [
    [0.053, 0.038, 1.469],
    [0.481, 0.59, -0.645, -0.639, 0.614],
    [1.571, 0.359, 0.464, -0.839],
    [0.366, 1.355],
    [-0.08, -1.943, -0.122, -2.153, 1.394, -0.419],
    [-0.227, 0.362, -1.015, 1.028],
    [0.09, 0.128, 0.46, -0.453, 0.539],
    [0.582, 0.036, 0.512],
]
OUTCOME = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
BETA = 0.05
CROSS_ENTROPY = 0.684894
# Of each token of a response.
GRADIENT = [-0.003003, 0.003156, 0.003246, -0.002991, 0.002866, -0.003113, 0.003185, 0.003213]
DIVISOR = 3.323001
RETURNS = [
    [0.736047, 0.900301, 1.070574],
    [-1.433368, -1.440846, -1.49206, -1.047738, -0.605823],
    [-0.784813, -1.229647, -1.188173, -1.18883],
    [0.986167, 1.024832],
    [-1.67427, -1.640903, -0.860019, -0.8098, 0.055345, -0.502722],
    [1.054315, 1.146665, 1.002682, 1.411211],
    [-0.033119, -0.067964, -0.118056, -0.301361, -0.11833],
    [0.11627, -0.115986, -0.129164],
]
ADVANTAGES = [
    [1.007018, 1.178691, 1.356654],
    [-1.260377, -1.268193, -1.321719, -0.85733, -0.395456],
    [-0.58253, -1.047454, -1.004108, -1.004794],
    [1.268435, 1.308846],
    [-1.512158, -1.477285, -0.661133, -0.608646, 0.295573, -0.287698],
    [1.339661, 1.436182, 1.285696, 1.712676],
    [0.203113, 0.166695, 0.114341, -0.077243, 0.114054],
    [0.35925, 0.116504, 0.102731],
]
RECIPE_ADVANTAGES = [
    [0.887573, 0.974663, 1.07113],
    [-1.358392, -1.53887, -1.78749, -1.26404, -0.744341],
    [0.391617, -0.470283, -0.574491, -0.744341],
    [1.179714, 1.07113],
    [-1.560914, -1.581701, -0.437818, -0.432348, 0.842818, -0.099451],
    [1.378278, 1.44939, 1.152283, 1.71602],
    [0.324406, 0.197342, 0.046523, -0.311849, -0.099451],
    [0.428494, -0.006147, -0.099451],
]


def flat(rows):
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def batch():
    """The fixture's responses; the reference says 0 of every token, so that log pi is q."""
    zeros = [[0.0] * len(row) for row in LOGRATIO]
    packed = pack([([1], [2] * len(row)) for row in LOGRATIO], group_ids=GROUPS, outcome=OUTCOME)
    packed.write("prm_ref_logprob", flat(zeros))
    return packed


def objective(tmp_path, **prime):
    prm = {"reward": "implicit", "beta": BETA}
    return OutcomePRM(tiny_config(tmp_path, objective="prime", prm=prm, prime=prime))


def test_the_loss_and_its_gradient_are_the_published_ones(tmp_path):
    rollouts, prime = batch(), objective(tmp_path)
    logprob = flat(LOGRATIO).requires_grad_()
    prime.prepare(rollouts)
    loss, figures = prime.loss({"logprob": logprob}, rollouts)
    close(loss, torch.tensor(CROSS_ENTROPY, dtype=torch.float64))
    loss.backward()
    lengths = torch.tensor([len(row) for row in LOGRATIO])
    close(logprob.grad, torch.tensor(GRADIENT, dtype=torch.float64).repeat_interleave(lengths))
    signs = [float(sum(row) > 0) for row in LOGRATIO]
    assert figures["accuracy"] == (sum(s == o for s, o in zip(signs, OUTCOME, strict=True)), 8)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    for loss in ("cross_entropy", "dpo"):
        rollouts, prime = batch(), objective(tmp_path, loss=loss)
        rollouts.write("reward", BETA * flat(LOGRATIO))
        prime.prepare(rollouts)
        whole, _ = prime.loss({"logprob": flat(LOGRATIO)}, rollouts)
        parts = torch.zeros((), dtype=torch.float64)
        for chosen in ([3, 0, 6], [1], [2, 7, 4, 5]):
            logprob = flat([LOGRATIO[i] for i in chosen])
            parts += prime.loss({"logprob": logprob}, rollouts.select(chosen))[0]
        torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("logit", [5.0, 20.0, 40.0, 100.0, 800.0])
def test_a_confident_error_keeps_its_gradient(tmp_path, logit):
    """In float32 the published form, cross-entropy of a sigmoid, has loss 100 and gradient 0 from about 17 on."""
    prime, wrong = objective(tmp_path), pack([([1], [2, 2])], outcome=[0.0])
    wrong.write("prm_ref_logprob", torch.zeros(2))
    prime.prepare(wrong)
    logprob = torch.full((2,), logit / BETA / 2).requires_grad_()
    loss, _ = prime.loss({"logprob": logprob}, wrong)
    loss.backward()
    expected = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
    close(loss.double(), torch.nn.functional.softplus(torch.tensor(logit, dtype=torch.float64)))
    close(logprob.grad.double(), BETA * expected.expand(2))


def test_the_paired_loss_compares_with_the_mean_of_the_other_outcome(tmp_path):
    rollouts, prime = batch(), objective(tmp_path, loss="dpo")
    assert prime.reads_rewards
    rollouts.write("reward", BETA * flat(LOGRATIO))
    total = segment_sum(BETA * flat(LOGRATIO), rollouts.response_cu_seqlens)
    right, wrong = {0: [0, 3], 1: [5]}, {0: [1, 2], 1: [4, 6, 7]}
    expected = torch.zeros((), dtype=torch.float64)
    for i, (outcome, group) in enumerate(zip(OUTCOME, GROUPS, strict=True)):
        others = (wrong if outcome else right)[group]
        margin = total[i] - total[others].mean()
        expected -= torch.nn.functional.logsigmoid(margin if outcome else -margin) / 8
    prime.prepare(rollouts)
    logprob = flat(LOGRATIO).requires_grad_()
    loss, _ = prime.loss({"logprob": logprob}, rollouts)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    # Where all have one outcome there is nothing to compare with: the loss is the cross-entropy.
    same = rollouts.select([0, 3])
    assert opposing_means(same).tolist() == [0.0, 0.0]


def advantages(reward, **options):
    """As the preset `prime` has them."""
    rollouts = batch()
    return rloo_advantages(
        torch.tensor(OUTCOME, dtype=torch.float64),
        reward,
        rollouts.response_cu_seqlens,
        rollouts.group_ids,
        outcome_coefficient=1.0,
        process_coefficient=1.0,
        leave_one_out=False,
        process_norm="return",
        **options,
    )


def test_advantages_are_the_published_ones():
    """Its K/(K-1) (r - mean of all K responses' means) is a leave-one-out baseline with the response's own deviation;
    with a mean over all K the factor alone is left, and whitening takes it away."""
    cu_seqlens = batch().response_cu_seqlens
    largest = returns_to_go(flat(LOGRATIO), cu_seqlens).abs().max() + 1e-6
    close(largest, torch.tensor(DIVISOR, dtype=torch.float64))
    close(4 / 3 * advantages(flat(LOGRATIO)), flat(RETURNS))
    close(advantages(flat(LOGRATIO), whiten=True), flat(ADVANTAGES))
    # Scaled by beta as here, the rewards give the same but for the 1e-6 in their divisor.
    close(advantages(BETA * flat(LOGRATIO), whiten=True), flat(ADVANTAGES))


def test_the_recipe_loses_the_last_tokens_reward():
    """verl's recipe cuts each response's rewards one token early. With these left out, too, the numbers are its own."""
    cut = [[*row[:-1], 0.0] for row in LOGRATIO]
    close(advantages(BETA * flat(cut), whiten=True), flat(RECIPE_ADVANTAGES))
    assert (advantages(BETA * flat(LOGRATIO), whiten=True) - flat(RECIPE_ADVANTAGES)).abs().max() > 0.5


JUDGE = {"kind": "custom", "function": "judges:even_length"}


def policys_first_batch(tmp_path, monkeypatch, **changes):
    """The batch of the policy's first update, after `prepare`, and the run's configuration."""
    batches, prepare = [], PrimePolicy.prepare

    def keep(self, batch):
        batches.append(batch)
        return prepare(self, batch)

    monkeypatch.setattr(PrimePolicy, "prepare", keep)
    prm = {"reward": "implicit", "beta": BETA}
    config = tiny_config(tmp_path, **merge({"objective": "prime", "steps": 1, "verifier": JUDGE, "prm": prm}, changes))
    train(config)
    monkeypatch.setattr(PrimePolicy, "prepare", prepare)
    return batches[0], config


def test_update_after_pays_the_policy_by_the_prm_before_its_update(tmp_path, monkeypatch):
    """At the start the PRM is its own reference: its rewards are 0, and after its first update they are not."""
    after, _ = policys_first_batch(tmp_path, monkeypatch, order="policy_first", output_dir=str(tmp_path / "after"))
    assert after.read("reward").abs().max() < 1e-6
    assert after.read("advantage").abs().max() > 0.1
    before, _ = policys_first_batch(tmp_path, monkeypatch, order="prm_first", output_dir=str(tmp_path / "before"))
    assert before.read("reward").abs().max() > 1e-5


def test_the_reference_may_be_the_policy_that_sampled(tmp_path, monkeypatch):
    other = make_model(tmp_path / "other", tied=False)
    prm = {"reference": "policy", "model": str(other)}
    rollouts, config = policys_first_batch(tmp_path, monkeypatch, prm=prm, order="policy_first")
    assert not needs_reference(config)
    assert "prm_ref_logprob" not in rollouts.streams
    logprob = build(config.model_copy(update={"output_dir": str(tmp_path / "new")})).learners["prm"].score(rollouts)
    expected = BETA * (logprob["logprob"] - rollouts.read("old_logprob"))
    torch.testing.assert_close(rollouts.read("reward"), expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 1e-2
    # Exported, they are relative to the policy beside it.
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    prm = load_prm(tmp_path / "out" / "prm", device="cpu")
    assert prm.description.reference.model == str(tmp_path / "out" / "policy")
    assert prm.reference is not None


def test_whole_rewards_stand_at_the_last_token(tmp_path):
    rollouts = batch()
    rollouts.write("reward", flat(LOGRATIO))
    config = tiny_config(tmp_path, objective="prime", prm={"reward": "implicit"}, prime={"reward": "whole"})
    for _ in range(2):  # A second update of the turn reads the same rewards.
        PrimePolicy(config).prepare(rollouts)
        expected = [[0.0] * (len(row) - 1) + [sum(row)] for row in LOGRATIO]
        close(rollouts.read("reward").double(), flat(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prm": {"reward": "value"}}, "prm.reward is 'value', but objective 'prime' is defined for implicit"),
        ({"data": {"answer_column": None, "eval": None}}, "objective 'prime' learns from outcomes"),
        ({"prm": {"reference": "policy"}, "rollout": {"temperature": 0.7}}, "set rollout.temperature: 1"),
        ({"objective": "repirl", "prm": {"reference": "policy"}}, "a PRM scores experts"),
        ({"objective": "rloo", "prime": {"loss": "dpo"}}, "options of 'prime' are set, but objective 'rloo'"),
        ({"irl": {"gate": 2.0}}, "irl.gate is set"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **merge({"objective": "prime", "prm": {"reward": "implicit"}}, changes))
