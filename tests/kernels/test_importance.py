"""Importance weights and coefficients against loops over sequences, in float64."""

import math
from collections import defaultdict

import pytest
import torch
from packed_cases import EXPERT_LENGTHS, GROUPS, LENGTHS, cu_of, rollouts, split
from repirl_kernels import importance, packed
from torch import Tensor


def close(actual: Tensor, expected: Tensor | list[float], tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def elements(kind: str, x: list[Tensor], groups: list[int]) -> tuple[list[float], list[tuple], dict[tuple, float]]:
    """Log weights, bucket names and bucket masses, from loops. The definition, written out."""
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    log_weight, bucket, mass = [], [], {}
    for i, (piece, group) in enumerate(zip(x, groups, strict=True)):
        if kind in ("trajectory", "length_normalized", "uniform"):
            total = float(piece.sum())
            divided = total / max(len(piece), 1)
            log_weight.append({"trajectory": total, "length_normalized": divided, "uniform": 0.0}[kind])
            bucket.append((group,))
            mass[(group,)] = 1.0 / len(members)
        for t in range(len(piece)):
            if kind == "token":
                log_weight.append(float(piece[t]))
                bucket.append((group,))
                num_tokens = sum(len(x[j]) for j in members[group])
                mass[(group,)] = num_tokens / len(members[group]) / len(members)
            elif kind == "per_decision":
                log_weight.append(float(x[i][: t + 1].sum()))
                bucket.append((group, t))
                alive = sum(math.exp(x[j][: t + 1].sum()) for j in members[group] if len(x[j]) > t)
                every = sum(math.exp(x[j][: t + 1].sum()) for j in members[group])
                mass[(group, t)] = alive / every / len(members)
    return log_weight, bucket, mass


def normalized(log_weight: list[float], bucket: list[tuple]) -> list[float]:
    total: dict[tuple, float] = defaultdict(float)
    for value, b in zip(log_weight, bucket, strict=True):
        total[b] += math.exp(value)
    return [math.exp(value) / total[b] for value, b in zip(log_weight, bucket, strict=True)]


@pytest.mark.parametrize("group_by", packed.GROUPINGS)
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
def test_weights_of_every_kind(kind: str, based: bool, group_by: str) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    base = rollouts(LENGTHS, seed=5)[1] if based else None
    x = reward - logprob + (base if based else 0.0)
    lw = importance.log_importance_weights(
        reward,
        logprob,
        cu,
        group_ids=torch.tensor(GROUPS),
        kind=kind,
        base_logprob=base,
        group_by=group_by,
    )
    groups = GROUPS if group_by == "prompt" else [0] * len(GROUPS)
    log_weight, bucket, mass = elements(kind, split(x, cu), groups)
    close(lw.log_weight, log_weight)
    names = dict(zip(lw.bucket_ids.tolist(), bucket, strict=True))
    assert [names[b] for b in lw.bucket_ids.tolist()] == bucket
    assert sorted(names) == list(range(len(set(bucket))))
    close(lw.mass, [mass[names[b]] for b in range(len(names))])
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    close(weights, normalized(log_weight, bucket))


@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
def test_equal_log_ratios_give_every_kind_the_same_coefficients(kind: str) -> None:
    # With mu = p every kind estimates the same expectation, the plain mean over rollouts.
    _, logprob, cu = rollouts(LENGTHS)
    lw = importance.log_importance_weights(logprob, logprob, cu, group_ids=torch.tensor(GROUPS), kind=kind)
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    c = importance.irl_coefficients(weights, lw, cu, cu_of(EXPERT_LENGTHS))
    sizes = [1 / 2 / GROUPS.count(g) for g in GROUPS]
    close(c.policy, [size for size, n in zip(sizes, LENGTHS, strict=True) for _ in range(n)])


def test_weights_are_shift_safe_and_differentiable() -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    reward.requires_grad_()

    def weights(r: Tensor) -> Tensor:
        lw = importance.log_importance_weights(r, logprob, cu, kind="trajectory", group_ids=torch.tensor(GROUPS))
        return importance.self_normalize(lw.log_weight, lw.bucket_ids)

    assert torch.autograd.gradcheck(weights, reward)
    for offset in (1e4, -1e4):
        shifted = importance.self_normalize(torch.tensor([1.0, 2.0]) + offset, torch.tensor([0, 0]))
        close(shifted, [1 / (1 + math.e), math.e / (1 + math.e)], 1e-6)


def test_temper_multiplies() -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    plain = importance.log_importance_weights(reward, logprob, cu)
    tempered = importance.log_importance_weights(reward, logprob, cu, temper=0.3)
    close(tempered.log_weight, 0.3 * plain.log_weight)
    assert tempered.alpha.tolist() == [0.3]


@pytest.mark.parametrize("kind", ["trajectory", "token", "per_decision", "length_normalized"])
@pytest.mark.parametrize("fraction", [0.3, 0.7, 0.95])
def test_target_ess_takes_the_largest_exponent(kind: str, fraction: float) -> None:
    reward, logprob, cu = rollouts(LENGTHS * 3, scale=3.0)
    groups = torch.tensor(GROUPS * 3)
    options = {"group_ids": groups, "kind": kind}
    plain = importance.log_importance_weights(reward, logprob, cu, **options)
    lw = importance.log_importance_weights(reward, logprob, cu, target_ess=fraction, **options)
    reached = {True: 0, False: 0}
    for b, alpha in enumerate(lw.alpha.tolist()):
        values = plain.log_weight[lw.bucket_ids == b]

        def ess(a: float, values: Tensor = values) -> float:
            w = (a * values).softmax(0)
            return float(1 / (w**2).sum())

        target = fraction * len(values)
        assert ess(alpha) >= target - 1e-6
        reached[alpha == 1.0] += 1
        if alpha < 1.0:
            assert ess(alpha + 1e-6) < target
        close(lw.log_weight[lw.bucket_ids == b], alpha * values)
    assert reached[False] > 0


def test_target_ess_is_monotone_and_spares_groups_that_need_nothing() -> None:
    reward, logprob, cu = rollouts([5] * 16, scale=2.0)
    reward[40:] = logprob[40:]  # the second group's weights are equal
    groups = torch.tensor([0] * 8 + [1] * 8)
    alphas = [
        importance.log_importance_weights(reward, logprob, cu, group_ids=groups, target_ess=f).alpha.tolist()
        for f in (0.2, 0.5, 0.8, 1.0)
    ]
    first = [a for a, _ in alphas]
    assert first == sorted(first, reverse=True)
    assert len(set(first)) == 4
    assert [b for _, b in alphas] == [1.0] * 4


def test_truncation_bounds_raw_weights_by_a_multiple_of_the_mean() -> None:
    log_weight = torch.tensor([3.0, 0.0, -1.0, 0.5, 0.0, 0.1], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    expected = []
    for b in (0, 1):
        raw = log_weight[ids == b].exp()
        cut = raw.clamp(max=1.5 * float(raw.mean()))
        expected.append(cut / cut.sum())
    close(importance.self_normalize(log_weight, ids, truncate=1.5), torch.cat(expected))
    close(importance.self_normalize(log_weight, ids, truncate=1.0)[4:], expected[1] * 0 + 0.5, 0.05)


def test_zero_weights_and_hopeless_buckets() -> None:
    log_weight = torch.tensor([0.0, -math.inf, -math.inf])
    close(importance.self_normalize(log_weight, torch.tensor([0, 0, 0])), [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="bucket 1 cannot be normalised"):
        importance.self_normalize(log_weight, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="bucket 0 cannot be normalised"):
        importance.self_normalize(torch.tensor([0.0, math.nan]), torch.tensor([0, 0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rewards_are_named(bad: float) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    reward[6] = bad
    with pytest.raises(ValueError, match="first at token 6: reward"):
        importance.log_importance_weights(reward, logprob, cu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "trajectories"}, "kind must be one of 'trajectory'.*got 'trajectories'"),
        ({"group_by": "x"}, "group_by must be one of 'prompt', 'batch'; got 'x'"),
        ({"temper": 0.0}, "temper must lie in"),
        ({"temper": 2.0}, "temper must lie in"),
        ({"target_ess": 0.0}, "target_ess must lie in"),
        ({"target_ess": 0.5, "temper": 0.5}, "not both"),
        ({"group_ids": torch.zeros(2)}, r"group_ids must have shape \[S\]"),
    ],
)
def test_bad_weight_options_are_named(options: dict, message: str) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    with pytest.raises(ValueError, match=message):
        importance.log_importance_weights(reward, logprob, cu, **options)
    with pytest.raises(ValueError, match="truncate must be at least 1"):
        importance.self_normalize(torch.zeros(2), torch.zeros(2, dtype=torch.int64), truncate=0.5)


def test_effective_sample_size_and_log_partition() -> None:
    weights = torch.tensor([0.7, 0.3, 1.0, 5.0, 5.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 2, 2])
    close(importance.effective_sample_size(weights, ids), [1 / (0.49 + 0.09), 1.0, 2.0])
    close(importance.log_partition(weights.log(), ids), [math.log(0.5), 0.0, math.log(5.0)])


# Coefficients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", importance.WEIGHT_KINDS)
@pytest.mark.parametrize("normalize", importance.NORMALIZATIONS)
def test_coefficients(kind: str, normalize: str) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    expert_cu = cu_of(EXPERT_LENGTHS)
    lw = importance.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor(GROUPS), kind=kind)
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    c = importance.irl_coefficients(weights, lw, cu, expert_cu, normalize=normalize)
    log_weight, bucket, mass = elements(kind, split(reward - logprob, cu), GROUPS)
    own = [w * mass[b] for w, b in zip(normalized(log_weight, bucket), bucket, strict=True)]
    if not lw.per_token:
        own = [w for w, n in zip(own, LENGTHS, strict=True) for _ in range(n)]
    if normalize == "token":
        own = [w / sum(own) for w in own]
    close(c.policy, own)
    expected = 1 / 3 if normalize == "sequence" else 1 / 9
    close(c.expert, [-expected] * 9)


def test_coefficients_need_both_sides() -> None:
    reward, logprob, cu = rollouts([2, 1])
    lw = importance.log_importance_weights(reward, logprob, cu)
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    with pytest.raises(ValueError, match="got 0 and 3"):
        importance.irl_coefficients(weights, lw, cu, cu_of([]))
    with pytest.raises(ValueError, match="normalize must be one of"):
        importance.irl_coefficients(weights, lw, cu, cu, normalize="tokens")
    with pytest.raises(ValueError, match=r"weights must have shape \[E\]"):
        importance.irl_coefficients(weights[:1], lw, cu, cu)
    with pytest.raises(ValueError, match="weights must be finite; 1 values are not, first inf at index 0"):
        importance.irl_coefficients(torch.cat([torch.tensor([math.inf]), weights[1:]]), lw, cu, cu)


def test_diagnostics() -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    expert_reward, _, expert_cu = rollouts(EXPERT_LENGTHS, seed=9)
    lw = importance.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor(GROUPS))
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    report = importance.importance_diagnostics(
        lw, weights, reward, cu, expert_reward=expert_reward, expert_cu_seqlens=expert_cu
    )
    w = [weights[lw.bucket_ids == b] for b in (0, 1)]
    z = [math.log(float(lw.log_weight[lw.bucket_ids == b].exp().mean())) for b in (0, 1)]
    ess = [float(1 / (v**2).sum()) for v in w]
    sums = [float(p.sum()) for p in split(reward, cu) + split(expert_reward, expert_cu)]
    correlation = torch.corrcoef(torch.tensor([sums, [float(n) for n in LENGTHS + EXPERT_LENGTHS]]))[0, 1]
    expected = {
        "ess": sum(ess) / 2,
        "ess_fraction": (ess[0] / 4 + ess[1] / 3) / 2,
        "max_weight": float(weights.max()),
        "pareto_k": math.nan,
        "log_z": sum(z) / 2,
        "alpha": 1.0,
        "reward_mean": float(reward.mean()),
        "reward_std": float(reward.std(correction=0)),
        "reward_gap": float(expert_reward.mean() - reward.mean()),
        "reward_length_correlation": float(correlation),
    }
    assert report == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_experts_of_groups_weigh_one_over_groups_times_experts(normalize: str) -> None:
    reward, logprob, cu = rollouts([2, 1, 3], seed=1)
    expert_cu = cu_of([2, 1, 1, 3])
    lw = importance.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor([4, 4, 2]))
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    c = importance.irl_coefficients(
        weights, lw, cu, expert_cu, normalize=normalize, expert_groups=torch.tensor([4, 2, 4, 2])
    )
    # Two groups of two experts: all have -1/4 for each token.
    expected = torch.full((7,), -0.25 if normalize == "sequence" else -1 / 7, dtype=torch.float64)
    close(c.expert, expected)
    c = importance.irl_coefficients(
        weights, lw, cu, expert_cu, normalize=normalize, expert_groups=torch.tensor([4, 4, 4, 2])
    )
    expected = torch.tensor([-1 / 6] * 4 + [-1 / 2] * 3, dtype=torch.float64)
    close(c.expert, expected if normalize == "sequence" else expected / -expected.sum())
    with pytest.raises(ValueError, match="expert_groups must have one id for each of the 4 experts"):
        importance.irl_coefficients(weights, lw, cu, expert_cu, expert_groups=torch.tensor([1]))


def test_the_effective_sample_size_of_contested_groups_leaves_lone_ones_out() -> None:
    reward, logprob, cu = rollouts([2, 1, 3], seed=1)
    lw = importance.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor([0, 0, 1]))
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    ess = float(1 / (weights[:2] ** 2).sum())
    report = importance.importance_diagnostics(lw, weights, reward, cu, contested=True)
    assert (report["ess"], report["ess_fraction"], report["lone"]) == pytest.approx((ess, ess / 2, 0.5))
    everything = importance.importance_diagnostics(lw, weights, reward, cu)
    assert everything["ess"] == pytest.approx((ess + 1) / 2)
    assert "lone" not in everything
    lw = importance.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor([0, 1, 2]))
    weights = importance.self_normalize(lw.log_weight, lw.bucket_ids)
    report = importance.importance_diagnostics(lw, weights, reward, cu, contested=True)
    assert math.isnan(report["ess"])
    assert math.isnan(report["ess_fraction"])
    assert report["lone"] == 1.0
