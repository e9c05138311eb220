"""Losses and rewards against loops; the two-pass gradient against autograd of losses written out."""

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from packed_cases import EXPERT_LENGTHS, GROUPS, LENGTHS, cu_of, rollouts, split
from repirl_kernels import importance, losses, packed, pareto
from torch import Tensor


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


# Rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_token_rewards(gamma: float) -> None:
    target_logit, logsumexp, cu = rollouts(LENGTHS)
    logprob, ref_logprob, _ = rollouts(LENGTHS, seed=1)
    value = torch.randn_like(logprob)
    options = {
        "value": value,
        "logprob": logprob,
        "logsumexp": logsumexp,
        "target_logit": target_logit,
        "ref_logprob": ref_logprob,
        "cu_seqlens": cu,
        "gamma": gamma,
        "beta": 0.3,
    }
    assert torch.equal(losses.token_rewards("value", **options), value)
    assert torch.equal(losses.token_rewards("logit", **options), target_logit)
    assert torch.equal(losses.token_rewards("logprob", **options), logprob)
    close(losses.token_rewards("implicit", **options), 0.3 * (logprob - ref_logprob))
    expected = []
    for ell, big_l in zip(split(target_logit, cu), split(logsumexp, cu), strict=True):
        for t in range(len(ell)):
            following = float(big_l[t + 1]) if t + 1 < len(ell) else 0.0
            expected.append(float(ell[t]) - gamma * following)
    close(losses.token_rewards("soft_q", **options), torch.tensor(expected, dtype=torch.float64))


def test_soft_q_sums_to_logprob_plus_the_first_logsumexp() -> None:
    cu = cu_of(LENGTHS)
    logits = torch.randn(sum(LENGTHS), 11, dtype=torch.float64)
    targets = torch.randint(11, (sum(LENGTHS),))
    logsumexp = logits.logsumexp(-1)
    target_logit = logits.gather(1, targets[:, None])[:, 0]
    reward = losses.token_rewards("soft_q", target_logit=target_logit, logsumexp=logsumexp, cu_seqlens=cu)
    first = torch.stack([p[0] if len(p) else p.sum() for p in split(logsumexp, cu)])
    close(packed.segment_sum(reward, cu), packed.segment_sum(target_logit - logsumexp, cu) + first)


def test_soft_q_gradient_reaches_the_next_state_only_within_its_sequence() -> None:
    target_logit, logsumexp, cu = rollouts([2, 1, 2])
    target_logit.requires_grad_()
    logsumexp.requires_grad_()
    reward = losses.token_rewards("soft_q", target_logit=target_logit, logsumexp=logsumexp, cu_seqlens=cu, gamma=0.5)
    reward.sum().backward()
    assert target_logit.grad.tolist() == [1.0] * 5
    assert logsumexp.grad.tolist() == [0.0, -0.5, 0.0, 0.0, -0.5]


def test_reward_errors() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of 'value'.*got 'q'"):
        losses.token_rewards("q")
    for kind, name in [("value", "value"), ("logit", "target_logit"), ("implicit", "logprob")]:
        with pytest.raises(ValueError, match=f"rewards of kind '{kind}' need {name}, got None"):
            losses.token_rewards(kind)
    with pytest.raises(ValueError, match="gamma must lie in"):
        losses.token_rewards("soft_q", gamma=2.0)
    with pytest.raises(ValueError, match="beta must be finite, got inf"):
        losses.token_rewards("implicit", logprob=torch.zeros(1), ref_logprob=torch.zeros(1), beta=math.inf)


# Policy loss ------------------------------------------------------------------------------------------------


def policy_inputs(count: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    base = -3 * torch.rand(count, generator=generator, dtype=torch.float64)

    def near(scale: float) -> Tensor:
        return base + scale * torch.randn(count, generator=generator, dtype=torch.float64)

    return {
        "logprob": base.clone(),
        "old_logprob": near(0.3),
        "advantage": near(2.0),
        "entropy": near(0.1).abs(),
        "sampler_logprob": near(0.8),
        "ref_logprob": near(0.4),
    }


@pytest.mark.parametrize("estimator", losses.KL_ESTIMATORS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_policy_loss_token_by_token(estimator: str, cap: float | None) -> None:
    inputs = policy_inputs()
    out = losses.policy_loss(
        **inputs,
        clip_low=0.2,
        clip_high=0.3,
        sampler_ratio_cap=cap,
        entropy_coefficient=0.01,
        kl_coefficient=0.1,
        kl_estimator=estimator,
    )
    counts = defaultdict(int)
    for t in range(60):
        lp, old, a, h, mu, ref = (float(v[t]) for v in inputs.values())
        ratio = math.exp(lp - old)
        bounded = min(max(ratio, 0.8), 1.3)
        mismatch = math.exp(old - mu)
        correction = 1.0 if cap is None else min(mismatch, cap)
        d = lp - ref
        kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
        expected = -min(ratio * a, bounded * a) * correction - 0.01 * h + 0.1 * kl
        clipped = bounded * a < ratio * a
        truncated = cap is not None and mismatch > cap
        counts["clipped"] += clipped
        counts["truncated"] += truncated
        assert float(out.loss[t]) == pytest.approx(expected, rel=1e-12)
        assert float(out.ratio[t]) == pytest.approx(ratio)
        assert float(out.kl[t]) == pytest.approx(kl)
        assert float(out.sampler_ratio[t]) == pytest.approx(correction)
        assert bool(out.clipped[t]) == clipped
        assert bool(out.truncated[t]) == truncated
    assert 0 < counts["clipped"] < 60
    assert cap is None or 0 < counts["truncated"] < 60


def test_policy_gradient_at_the_old_policy_and_where_clipped() -> None:
    inputs = policy_inputs()
    inputs = {name: inputs[name] for name in ("logprob", "old_logprob", "advantage")}
    for name in inputs:
        inputs[name].requires_grad_()
    out = losses.policy_loss(**inputs)
    out.loss.sum().backward()
    gradient = inputs["logprob"].grad
    close(gradient, torch.where(out.clipped, 0.0, -(out.ratio * inputs["advantage"]).detach()))
    assert inputs["old_logprob"].grad is None
    assert inputs["advantage"].grad is None
    on_policy = inputs["logprob"].detach().requires_grad_()
    losses.policy_loss(on_policy, on_policy.detach(), inputs["advantage"]).loss.sum().backward()
    close(on_policy.grad, -inputs["advantage"].detach())


@pytest.mark.parametrize("estimator", losses.KL_ESTIMATORS)
def test_kl_gradients_in_expectation(estimator: str) -> None:
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(6, dtype=torch.float64).log_softmax(0)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum()

    logprob = logits.log_softmax(0)
    exact = kl(ref, logprob) if estimator == "k3" else kl(logprob, ref)
    (expected,) = torch.autograd.grad(exact, logits, retain_graph=True)
    zero = torch.zeros(6, dtype=torch.float64)
    loss = losses.policy_loss(
        logprob, logprob.detach(), zero, ref_logprob=ref, kl_coefficient=1.0, kl_estimator=estimator
    ).loss
    (actual,) = torch.autograd.grad((logprob.detach().exp() * loss).sum(), logits)
    close(actual, expected)
    if estimator != "k2":
        close((logprob.exp() * loss).sum().detach(), kl(logprob, ref).detach())


def test_policy_loss_survives_a_policy_far_away() -> None:
    far = torch.tensor([0.0, -200.0]).requires_grad_()
    out = losses.policy_loss(
        far, torch.tensor([-200.0, 0.0]), torch.tensor([-1.0, -1.0]), ref_logprob=torch.tensor([-200.0, 0.0])
    )
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert far.grad.isfinite().all()


BEFOREHAND = ("old_logprob", "advantage", "sampler_logprob", "ref_logprob")
ALL_TERMS = {"sampler_ratio_cap": 2.0, "entropy_coefficient": 0.01, "kl_coefficient": 0.1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BEFOREHAND)
def test_what_is_known_beforehand_has_to_be_finite(name: str, value: float) -> None:
    inputs = policy_inputs()
    inputs[name][[7, 30]] = value
    expected = rf"^{name} must be finite; 2 values are not, first {value} at index 7$"
    with pytest.raises(ValueError, match=expected):
        losses.policy_loss(**inputs, **ALL_TERMS)
    matrix = {key: values.view(6, 10) for key, values in inputs.items()}
    with pytest.raises(ValueError, match=r"at index \(0, 7\)"):
        losses.policy_loss(**matrix, **ALL_TERMS)


def test_a_token_of_probability_zero_is_refused_by_name() -> None:
    inputs = policy_inputs()
    inputs["logprob"][3] = inputs["old_logprob"][3] = -math.inf
    with pytest.raises(ValueError, match="old_logprob must be finite; 1 values are not, first -inf at index 3"):
        losses.policy_loss(**inputs)


def test_a_sampler_that_is_not_asked_may_report_anything() -> None:
    inputs = policy_inputs()
    expected = losses.policy_loss(**inputs).loss
    inputs["sampler_logprob"][:] = math.nan
    close(losses.policy_loss(**inputs).loss, expected)


@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_what_is_trained_makes_the_loss_nan_and_is_not_refused(name: str) -> None:
    """Learner.step, and a gradient scaler, skip such an update."""
    inputs = policy_inputs()
    inputs[name][3] = math.nan
    loss = losses.policy_loss(**inputs, **ALL_TERMS).loss
    assert loss.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("estimator", losses.KL_ESTIMATORS)
def test_rows_that_do_not_count_may_hold_anything(estimator: str) -> None:
    inputs = policy_inputs()
    counts = torch.arange(60) % 3 > 0
    leaves = [inputs[name].requires_grad_() for name in ("logprob", "entropy")]
    out = losses.policy_loss(**inputs, **ALL_TERMS, kl_estimator=estimator)
    expected = torch.autograd.grad(out.loss[counts].sum(), leaves)
    with torch.no_grad():
        for i, values in enumerate(inputs.values()):
            values[~counts] = (math.nan, math.inf, -math.inf)[i % 3]
    masked = losses.policy_loss(**inputs, **ALL_TERMS, kl_estimator=estimator, row_mask=counts)
    for actual, other in zip(torch.autograd.grad(masked.loss.sum(), leaves), expected, strict=True):
        close(actual, other)
    for column, other in zip(masked, out, strict=True):
        close(column[counts].double(), other[counts].double())
    for column, nothing in zip(masked, (0.0, 1.0, 0.0, 0.0, 1.0, 0.0), strict=True):
        assert (column[~counts].double() == nothing).all()


VERL = json.loads((Path(__file__).parent / "verl_losses.json").read_text())
# Its names for our aggregations, with the factor by which its weights are larger.
VERL_AGGREGATIONS = {
    "token-mean": ("token_mean", 1),
    "seq-mean-token-mean": ("sequence_mean", 1),
    "seq-mean-token-sum": ("constant_length", 6),
    # This one is not divided by the number of sequences.
    "seq-mean-token-sum-norm": ("constant_length", 8),
}
VERL_FORMS = {"vanilla": {"clip_dual": 3.0}, "gspo": {"ratio": "sequence"}, "cispo": {"form": "cispo"}}


@pytest.mark.parametrize("case", VERL["losses"], ids=lambda case: f"{case['form']}-{case['aggregation']}")
def test_policy_losses_of_verl(case: dict) -> None:
    logprob, old, advantage = (torch.tensor(VERL[n]).double() for n in ("logprob", "old_logprob", "advantage"))
    cu = cu_of(VERL["lengths"])
    out = losses.policy_loss(
        logprob.requires_grad_(),
        old,
        advantage,
        clip_low=VERL["clip_low"],
        clip_high=VERL["clip_high"],
        cu_seqlens=cu,
        **VERL_FORMS[case["form"]],
    )
    aggregation, factor = VERL_AGGREGATIONS[case["aggregation"]]
    weights = factor * losses.aggregate_weights(cu, aggregation, constant_length=6)
    loss = (weights * out.loss).sum()
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=1e-5)
    loss.backward()
    close(logprob.grad, torch.tensor(case["gradient"]), 1e-5)
    assert float(out.clipped.double().mean()) == case["clip_fraction"]


def test_the_dual_clip_bounds_the_loss_of_bad_tokens() -> None:
    """The fixture above has no ratio beyond 3; here are some, on both sides of every bound."""
    ratio = torch.tensor([0.5, 1.0, 1.5, 2.9, 3.1, 9.0], dtype=torch.float64).repeat(2)
    advantage = torch.tensor([2.0, -2.0], dtype=torch.float64).repeat_interleave(6)
    logprob = ratio.log().requires_grad_()
    out = losses.policy_loss(logprob, torch.zeros(12).double(), advantage, clip_high=0.28, clip_dual=3.0)
    gain = [0.5, 1.0, 1.28, 1.28, 1.28, 1.28, -0.8, -1.0, -1.5, -2.9, -3.0, -3.0]
    close(out.loss, -2 * torch.tensor(gain, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), logprob)
    kept = torch.tensor([1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(out.clipped, ~kept)
    close(gradient, torch.where(kept, -ratio * advantage, 0.0))


def test_a_ratio_of_sequences_counts_only_the_rows_that_count() -> None:
    """As if the others were not there; and in the form cispo."""
    inputs, cu = policy_inputs(), cu_of([20, 0, 25, 15])
    counts = torch.arange(60) % 3 > 0
    shorter = cu_of([int(counts[a:b].sum()) for a, b in pairwise(cu.tolist())])
    for form in losses.FORMS:
        options = {"ratio": "sequence", "form": form, "clip_low": 0.02, "clip_high": 0.05}
        only = losses.policy_loss(**{name: x[counts] for name, x in inputs.items()}, cu_seqlens=shorter, **options)
        masked = losses.policy_loss(**inputs, cu_seqlens=cu, row_mask=counts, **options)
        close(masked.loss[counts], only.loss)
        assert (masked.loss[~counts] == 0).all()
        assert only.clipped.any()
        for i, (a, b) in enumerate(pairwise(shorter.tolist())):
            difference = (inputs["logprob"] - inputs["old_logprob"])[counts][a:b]
            expected = difference.mean().exp() if i != 1 else difference
            close(only.ratio[a:b], expected.expand(b - a))


@pytest.mark.parametrize("options", [{"form": "cispo"}, {"clip_dual": 3.0}, {"ratio": "sequence"}])
def test_other_policy_losses_are_one_graph(options: dict) -> None:
    inputs = policy_inputs()
    leaf = inputs["logprob"].requires_grad_()
    options = options | {"cu_seqlens": cu_of([20, 0, 25, 15])}
    compiled = torch.compile(losses.policy_loss, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(function(**inputs, **options).loss.sum(), leaf)[0]
        for function in (losses.policy_loss, compiled)
    ]
    close(*gradients)


@pytest.mark.parametrize("masked", [False, True])
def test_policy_loss_is_one_graph(masked: bool) -> None:
    """Where it is traced no value can be read: it does not ask, whatever the coefficients of a call are."""
    inputs = policy_inputs()
    leaf = inputs["logprob"].requires_grad_()
    options = {"row_mask": torch.arange(60) % 3 > 0} if masked else {}
    compiled = torch.compile(losses.policy_loss, fullgraph=True, backend="aot_eager")
    for coefficient in (0.1, 0.2, 0.3):
        terms = ALL_TERMS | {"kl_coefficient": coefficient}
        gradients = [
            torch.autograd.grad(function(**inputs, **options, **terms).loss.sum(), leaf)[0]
            for function in (losses.policy_loss, compiled)
        ]
        close(*gradients)


def test_policy_loss_under_transforms() -> None:
    inputs = policy_inputs()
    logprob = inputs.pop("logprob")

    def loss(logprob: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return losses.policy_loss(logprob, **inputs, **ALL_TERMS).loss.sum()

    leaf = logprob.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, inputs), leaf)
    close(torch.func.grad(loss)(logprob, inputs), expected)
    rows = {name: values.view(6, 10) for name, values in inputs.items()}
    close(torch.func.vmap(torch.func.grad(loss))(logprob.view(6, 10), rows).flatten(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator must be one of 'k1', 'k2', 'k3'; got 'k4'"),
        ({"clip_low": 1.2}, "clip_low must lie in"),
        ({"clip_high": -0.1}, "clip_high must be at least 0, got -0.1"),
        ({"sampler_ratio_cap": 0.0}, "sampler_ratio_cap must be positive"),
        ({"sampler_ratio_cap": 2.0}, "sampler_logprob is None"),
        ({"entropy_coefficient": 0.1}, "entropy is None"),
        ({"kl_coefficient": 0.1}, "ref_logprob is None"),
        ({"entropy": torch.zeros(3)}, r"entropy must have logprob's shape \(2,\), got \(3,\)"),
        ({"row_mask": torch.ones(3) > 0}, r"row_mask must have logprob's shape \(2,\), got \(3,\)"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient must be finite, got nan"),
        ({"kl_coefficient": math.inf}, "kl_coefficient must be finite, got inf"),
        ({"form": "ppo"}, "form must be one of 'clip', 'cispo'; got 'ppo'"),
        ({"ratio": "batch"}, "ratio must be one of 'token', 'sequence'; got 'batch'"),
        ({"ratio": "sequence"}, "ratio 'sequence' needs cu_seqlens, got None"),
        ({"ratio": "sequence", "cu_seqlens": torch.tensor([0, 3])}, r"logprob must have shape \[T\] = \(3,\)"),
        ({"clip_dual": 1.0}, "clip_dual must be larger than 1 and finite"),
        ({"clip_dual": 3.0, "form": "cispo"}, "clip_dual is 3.0, but the form 'cispo'"),
    ],
)
def test_policy_loss_errors(options: dict, message: str) -> None:
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        losses.policy_loss(zero, zero, zero, **options)


def test_policy_loss_refuses_a_mask_of_numbers() -> None:
    zero = torch.zeros(2)
    with pytest.raises(TypeError, match=r"row_mask must be bool, got torch.float32"):
        losses.policy_loss(zero, zero, zero, row_mask=zero)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_aggregation(aggregation: str) -> None:
    values, _, cu = rollouts(LENGTHS)
    weights = losses.aggregate_weights(cu, aggregation, constant_length=10)
    pieces = split(values, cu)
    expected = {
        "token_mean": values.mean(),
        "sequence_mean": sum(p.mean() for p in pieces if len(p)) / len(pieces),
        "constant_length": values.sum() / (10 * len(pieces)),
    }[aggregation]
    close((weights.double() * values).sum(), expected, 1e-6)
    # A part of the batch with the whole batch's counts has the same weights.
    part = losses.aggregate_weights(
        cu_of(LENGTHS[:4]),
        aggregation,
        constant_length=10,
        num_tokens=sum(LENGTHS),
        num_sequences=len(LENGTHS),
    )
    assert torch.equal(part, weights[: sum(LENGTHS[:4])])


def test_aggregation_errors() -> None:
    cu = cu_of([2, 3])
    with pytest.raises(ValueError, match="aggregation must be one of"):
        losses.aggregate_weights(cu, "mean")
    with pytest.raises(ValueError, match="constant_length >= 1, got None"):
        losses.aggregate_weights(cu, "constant_length")
    with pytest.raises(ValueError, match="got 4 and 2"):
        losses.aggregate_weights(cu, num_tokens=4)
    assert losses.aggregate_weights(cu_of([])).shape == (0,)


# Inverse RL -------------------------------------------------------------------------------------------------


def written_out(
    kind: str,
    normalize: str,
    groups: list[int],
    expert: list[Tensor],
    policy: list[Tensor],
    mu: list[Tensor],
) -> Tensor:
    """The loss as one would write it on paper, with `detach` where the method's weights are constants."""
    expert_term = -torch.stack([e.sum() for e in expert]).mean()
    if normalize == "token":
        expert_term = -torch.cat(expert).mean()
    terms, sizes = [], []
    for group in sorted(set(groups)):
        rows = [i for i, g in enumerate(groups) if g == group]
        r = [policy[i] for i in rows]
        x = [policy[i] - mu[i] for i in rows]
        count = len(rows)
        if kind == "trajectory":
            log_w = torch.stack([v.sum() for v in x])
            terms.append(log_w.logsumexp(0) - math.log(count))
            sizes.append((log_w.softmax(0) * torch.tensor([float(len(v)) for v in r])).sum().detach())
        elif kind in ("length_normalized", "uniform"):
            log_w = torch.stack([v.sum() / max(len(v), 1) for v in x]).detach()
            w = log_w.softmax(0) if kind == "length_normalized" else torch.full_like(log_w, 1 / count)
            terms.append(sum(w[j] * r[j].sum() for j in range(count)))
            sizes.append(sum(w[j] * len(r[j]) for j in range(count)))
        elif kind == "token":
            everything = torch.cat(x)
            per_sequence = len(everything) / count
            terms.append(per_sequence * (everything.logsumexp(0) - math.log(len(everything))))
            sizes.append(torch.tensor(per_sequence, dtype=torch.float64))
        else:
            # Sequences that have ended stay, with reward 0 and their last weight.
            total, size = torch.zeros(2, dtype=torch.float64)
            for t in range(max(len(v) for v in r)):
                prefix = torch.stack([v[: t + 1].sum() for v in x]).detach()
                w = prefix.softmax(0)
                for j in range(count):
                    if t < len(r[j]):
                        total = total + w[j] * r[j][t]
                        size = size + w[j]
            terms.append(total)
            sizes.append(size)
    policy_term = torch.stack(terms).mean()
    if normalize == "token":
        policy_term = policy_term / torch.stack(sizes).mean()
    return expert_term + policy_term


@pytest.mark.parametrize("group_by", packed.GROUPINGS)
@pytest.mark.parametrize("normalize", importance.NORMALIZATIONS)
@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
def test_two_passes_have_the_gradient_of_the_written_loss(kind: str, normalize: str, group_by: str) -> None:
    policy, mu, cu = rollouts(LENGTHS)
    expert, _, expert_cu = rollouts(EXPERT_LENGTHS, seed=4)
    policy.requires_grad_()
    expert.requires_grad_()
    groups = GROUPS if group_by == "prompt" else [0] * len(GROUPS)
    explicit = written_out(kind, normalize, groups, split(expert, expert_cu), split(policy, cu), split(mu, cu))
    expected = torch.autograd.grad(explicit, [expert, policy])

    options = {"group_ids": torch.tensor(GROUPS), "kind": kind, "group_by": group_by}
    one_pass = losses.irl_loss(expert, expert_cu, policy, mu, cu, normalize=normalize, **options)
    close(one_pass.detach(), explicit.detach())
    for actual, wanted in zip(torch.autograd.grad(one_pass, [expert, policy]), expected, strict=True):
        close(actual, wanted)

    with torch.no_grad():
        lw = importance.log_importance_weights(policy, mu, cu, **options)
        weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
        c = importance.irl_coefficients(weights, lw, cu, expert_cu, normalize=normalize)
    two_pass = losses.irl_token_loss(expert, c.expert).sum() + losses.irl_token_loss(policy, c.policy).sum()
    for actual, wanted in zip(torch.autograd.grad(two_pass, [expert, policy]), expected, strict=True):
        close(actual, wanted)
    if normalize == "token":
        close(sum(g.sum() for g in expected), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("shaping", [{"temper": 0.4}, {"target_ess": 0.95}, {"truncate": 1.5}, {"smooth": "psis"}])
@pytest.mark.parametrize("normalize", importance.NORMALIZATIONS)
@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
def test_one_pass_equals_two_with_shaped_weights(kind: str, normalize: str, shaping: dict) -> None:
    lengths = LENGTHS * 5
    policy, mu, cu = rollouts(lengths)
    expert, _, expert_cu = rollouts(EXPERT_LENGTHS, seed=4)
    base = rollouts(lengths, seed=8)[1]
    policy.requires_grad_()
    expert.requires_grad_()
    options = {"group_ids": torch.tensor([0] * 30 + [1] * 5), "kind": kind, "base_logprob": base}
    weighting = {k: v for k, v in shaping.items() if k in ("temper", "target_ess")}
    loss = losses.irl_loss(expert, expert_cu, policy, mu, cu, normalize=normalize, reward_l2=0.1, **options, **shaping)
    with torch.no_grad():
        lw = importance.log_importance_weights(policy, mu, cu, **options, **weighting)
        log_weight = lw.log_weight
        if "smooth" in shaping:
            log_weight, _ = pareto.pareto_smooth(log_weight, lw.bucket_ids)
        weights = importance.self_normalize(log_weight, lw.bucket_ids, truncate=shaping.get("truncate"))
        plain = importance.log_importance_weights(policy, mu, cu, **options)
        unshaped = importance.self_normalize(plain.log_weight, plain.bucket_ids)
        assert (kind == "uniform") == torch.allclose(weights, unshaped)
        c = importance.irl_coefficients(weights, lw, cu, expert_cu, normalize=normalize)
    count = len(policy) + len(expert)
    two_pass = sum(
        losses.irl_token_loss(r, k, reward_l2=0.1, num_tokens=count).sum()
        for r, k in [(expert, c.expert), (policy, c.policy)]
    )
    one = torch.autograd.grad(loss, [expert, policy])
    two = torch.autograd.grad(two_pass, [expert, policy])
    for actual, wanted in zip(two, one, strict=True):
        close(actual, wanted, 1e-10)


def test_irl_loss_keeps_float32() -> None:
    policy, mu, cu = rollouts(LENGTHS)
    expert, _, expert_cu = rollouts(EXPERT_LENGTHS)
    exact = losses.irl_loss(expert, expert_cu, policy, mu, cu)
    single = losses.irl_loss(expert.float(), expert_cu.int(), policy.float(), mu.float(), cu.int())
    assert single.dtype == torch.float32
    close(single.double(), exact, 1e-6)


def test_irl_token_loss_errors() -> None:
    with pytest.raises(ValueError, match=r"coefficient must have reward's shape \(2,\), got \(3,\)"):
        losses.irl_token_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="coefficient must be finite; 1 values are not, first nan at index 1"):
        losses.irl_token_loss(torch.zeros(2), torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="reward_l2 must be finite, got nan"):
        losses.irl_token_loss(torch.zeros(2), torch.zeros(2), reward_l2=math.nan, num_tokens=2)
    with pytest.raises(ValueError, match="reward_l2 needs num_tokens >= 1"):
        losses.irl_token_loss(torch.zeros(2), torch.zeros(2), reward_l2=0.1)
    with pytest.raises(ValueError, match="smooth must be one of"):
        losses.irl_loss(*rollouts([2])[::2], *rollouts([2]), smooth="pareto")
