"""Packed-sequence ops against loops over sequences, in float64."""

import math
from collections import defaultdict

import pytest
import torch
from packed_cases import EXPERT_LENGTHS, GROUPS, LENGTHS, cu_of, rollouts, split
from repirl_kernels import segments
from torch import Tensor


def close(actual: Tensor, expected: Tensor | list[float], tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Segments ---------------------------------------------------------------------------------------------------


def test_segment_sums_means_and_ids() -> None:
    values, _, cu = rollouts(LENGTHS)
    pieces = split(values, cu)
    close(segments.segment_sum(values, cu), [float(p.sum()) for p in pieces])
    close(segments.segment_mean(values, cu), [float(p.mean()) if len(p) else 0.0 for p in pieces])
    expected = [i for i, n in enumerate(LENGTHS) for _ in range(n)]
    assert segments.sequence_ids(cu).tolist() == expected
    assert segments.sequence_ids(cu.int(), sum(LENGTHS)).tolist() == expected


def test_prefix_sums() -> None:
    values, _, cu = rollouts(LENGTHS)
    close(segments.prefix_sums(values, cu), torch.cat([p.cumsum(0) for p in split(values, cu)]))


def test_prefix_sums_do_not_cancel_across_sequences() -> None:
    huge = torch.tensor([1e9, 1e9, 1e-3, 1e-3], dtype=torch.float32)
    close(segments.prefix_sums(huge, cu_of([2, 2]))[2:], [1e-3, 2e-3], 1e-7)


@pytest.mark.parametrize("function", [segments.prefix_sums, segments.returns_to_go])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_sequence(function, bad: float) -> None:
    values, _, cu = rollouts(LENGTHS)
    expected = function(values, cu)
    broken = values.clone()
    broken[7] = bad
    owner = segments.sequence_ids(cu) == segments.sequence_ids(cu)[7]
    assert torch.equal(function(broken, cu)[~owner], expected[~owner])
    assert not function(broken, cu)[7].isfinite()


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3, 0.0])
def test_returns_to_go(gamma: float) -> None:
    reward, _, cu = rollouts([*LENGTHS, 37])
    expected = []
    for piece in split(reward, cu):
        following, returns = 0.0, []
        for r in reversed(piece.tolist()):
            following = r + gamma * following
            returns.append(following)
        expected += reversed(returns)
    close(segments.returns_to_go(reward, cu, gamma), expected)


def test_returns_and_prefix_sums_are_differentiable() -> None:
    reward, _, cu = rollouts([3, 0, 1, 4])
    reward.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: segments.returns_to_go(r, cu, 0.7), reward)
    assert torch.autograd.gradcheck(lambda r: segments.prefix_sums(r, cu), reward)
    assert torch.autograd.gradcheck(lambda r: segments.segment_mean(r, cu), reward)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_nothing_in_nothing_out(lengths: list[int]) -> None:
    reward, logprob, cu = rollouts(lengths)
    assert segments.returns_to_go(reward, cu, 0.5).shape == (0,)
    assert segments.prefix_sums(reward, cu).shape == (0,)
    assert segments.segment_sum(reward, cu).tolist() == [0.0] * len(lengths)
    groups = torch.zeros(len(lengths), dtype=torch.int64)
    for kind in segments.WEIGHT_KINDS:
        lw = segments.log_importance_weights(reward, logprob, cu, kind=kind, group_ids=groups)
        weights = segments.self_normalize(lw.log_weight, lw.bucket_ids)
        assert weights.shape == ((0,) if lw.per_token else (len(lengths),))
        smoothed, k_hat = segments.pareto_smooth(lw.log_weight, lw.bucket_ids)
        assert smoothed.shape == weights.shape
        assert k_hat.isnan().all()
        assert segments.importance_diagnostics(lw, weights, reward, cu)["reward_std"] == 0.0
    advantage = segments.rloo_advantages(
        None, reward, cu, groups, outcome_coefficient=0.0, process_coefficient=1.0, whiten=True
    )
    assert advantage.shape == (0,)


@pytest.mark.parametrize(
    ("cu", "error", "message"),
    [
        (torch.tensor([0.0, 2.0]), TypeError, "int32 or int64"),
        (torch.tensor([1, 2]), ValueError, "start at 0"),
        (torch.tensor([0, 3, 2]), ValueError, "never decrease"),
        (torch.tensor([0, 3]), ValueError, r"got \(2,\)"),
        (torch.tensor([[0, 2]]), ValueError, r"\[S\+1\]"),
    ],
)
def test_malformed_packing_is_named(cu: Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        segments.segment_sum(torch.zeros(2), cu)


def test_integer_values_are_refused() -> None:
    with pytest.raises(TypeError, match="values must be a floating-point tensor"):
        segments.segment_sum(torch.zeros(2, dtype=torch.int64), cu_of([2]))


# Importance weights -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("group_by", segments.GROUPINGS)
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("kind", segments.WEIGHT_KINDS)
def test_weights_of_every_kind(kind: str, based: bool, group_by: str) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    base = rollouts(LENGTHS, seed=5)[1] if based else None
    x = reward - logprob + (base if based else 0.0)
    lw = segments.log_importance_weights(
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
    weights = segments.self_normalize(lw.log_weight, lw.bucket_ids)
    close(weights, normalized(log_weight, bucket))


@pytest.mark.parametrize("kind", segments.WEIGHT_KINDS)
def test_equal_log_ratios_give_every_kind_the_same_coefficients(kind: str) -> None:
    # With mu = p every kind estimates the same expectation, the plain mean over rollouts.
    _, logprob, cu = rollouts(LENGTHS)
    lw = segments.log_importance_weights(logprob, logprob, cu, group_ids=torch.tensor(GROUPS), kind=kind)
    weights = segments.self_normalize(lw.log_weight, lw.bucket_ids)
    c = segments.irl_coefficients(weights, lw, cu, cu_of(EXPERT_LENGTHS))
    sizes = [1 / 2 / GROUPS.count(g) for g in GROUPS]
    close(c.policy, [size for size, n in zip(sizes, LENGTHS, strict=True) for _ in range(n)])


def test_weights_are_shift_safe_and_differentiable() -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    reward.requires_grad_()

    def weights(r: Tensor) -> Tensor:
        lw = segments.log_importance_weights(r, logprob, cu, kind="trajectory", group_ids=torch.tensor(GROUPS))
        return segments.self_normalize(lw.log_weight, lw.bucket_ids)

    assert torch.autograd.gradcheck(weights, reward)
    for offset in (1e4, -1e4):
        shifted = segments.self_normalize(torch.tensor([1.0, 2.0]) + offset, torch.tensor([0, 0]))
        close(shifted, [1 / (1 + math.e), math.e / (1 + math.e)], 1e-6)


def test_temper_multiplies() -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    plain = segments.log_importance_weights(reward, logprob, cu)
    tempered = segments.log_importance_weights(reward, logprob, cu, temper=0.3)
    close(tempered.log_weight, 0.3 * plain.log_weight)
    assert tempered.alpha.tolist() == [0.3]


@pytest.mark.parametrize("kind", ["trajectory", "token", "per_decision", "length_normalized"])
@pytest.mark.parametrize("fraction", [0.3, 0.7, 0.95])
def test_target_ess_takes_the_largest_exponent(kind: str, fraction: float) -> None:
    reward, logprob, cu = rollouts(LENGTHS * 3, scale=3.0)
    groups = torch.tensor(GROUPS * 3)
    options = {"group_ids": groups, "kind": kind}
    plain = segments.log_importance_weights(reward, logprob, cu, **options)
    lw = segments.log_importance_weights(reward, logprob, cu, target_ess=fraction, **options)
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
        segments.log_importance_weights(reward, logprob, cu, group_ids=groups, target_ess=f).alpha.tolist()
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
    close(segments.self_normalize(log_weight, ids, truncate=1.5), torch.cat(expected))
    close(segments.self_normalize(log_weight, ids, truncate=1.0)[4:], expected[1] * 0 + 0.5, 0.05)


def test_zero_weights_and_hopeless_buckets() -> None:
    log_weight = torch.tensor([0.0, -math.inf, -math.inf])
    close(segments.self_normalize(log_weight, torch.tensor([0, 0, 0])), [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="bucket 1 cannot be normalised"):
        segments.self_normalize(log_weight, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="bucket 0 cannot be normalised"):
        segments.self_normalize(torch.tensor([0.0, math.nan]), torch.tensor([0, 0]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rewards_are_named(bad: float) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    reward[6] = bad
    with pytest.raises(ValueError, match="first at token 6: reward"):
        segments.log_importance_weights(reward, logprob, cu)


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
        segments.log_importance_weights(reward, logprob, cu, **options)
    with pytest.raises(ValueError, match="truncate must be at least 1"):
        segments.self_normalize(torch.zeros(2), torch.zeros(2, dtype=torch.int64), truncate=0.5)


def test_effective_sample_size_and_log_partition() -> None:
    weights = torch.tensor([0.7, 0.3, 1.0, 5.0, 5.0], dtype=torch.float64)
    ids = torch.tensor([0, 0, 1, 2, 2])
    close(segments.effective_sample_size(weights, ids), [1 / (0.49 + 0.09), 1.0, 2.0])
    close(segments.log_partition(weights.log(), ids), [math.log(0.5), 0.0, math.log(5.0)])


# Pareto smoothing -------------------------------------------------------------------------------------------


def slow_psis(log_weight: list[float]) -> tuple[list[float], float]:
    """Vehtari et al. 2024 with the fit of Zhang and Stephens 2009, one bucket, plain numbers."""
    count = len(log_weight)
    size = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    largest = max(log_weight)
    order = sorted(range(count), key=lambda i: log_weight[i])
    tail = order[-size:]
    cutoff = math.exp(log_weight[order[-size - 1]] - largest)
    x = [math.exp(log_weight[i] - largest) - cutoff for i in tail]
    num_grid = 30 + math.floor(math.sqrt(size))
    quartile = x[math.floor(size / 4 + 0.5) - 1]
    thetas = [1 / x[-1] + (1 - math.sqrt(num_grid / (j - 0.5))) / (3 * quartile) for j in range(1, num_grid + 1)]
    profile = []
    for theta in thetas:
        k = sum(math.log1p(-theta * v) for v in x) / size
        profile.append(size * (math.log(-theta / k) - k - 1))
    theta = sum(
        theta / sum(math.exp(other - own) for other in profile) for theta, own in zip(thetas, profile, strict=True)
    )
    k = sum(math.log1p(-theta * v) for v in x) / size
    sigma = -k / theta
    k = (k * size + 5) / (size + 10)
    smoothed = list(log_weight)
    for rank, i in enumerate(tail):
        value = cutoff + sigma / k * ((1 - (rank + 0.5) / size) ** -k - 1)
        smoothed[i] = math.log(min(value, 1.0)) + largest
    return smoothed, k


def test_pareto_smoothing_matches_the_slow_one_in_every_bucket() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [200, 12, 31, 1000]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=generator)]
    log_weight = 1.5 * torch.randn(len(ids), generator=generator, dtype=torch.float64) + 100 * ids
    smoothed, k_hat = segments.pareto_smooth(log_weight, ids)
    for b in range(4):
        if sizes[b] == 12:  # a tail of 3
            assert torch.equal(smoothed[ids == b], log_weight[ids == b])
            assert k_hat[b].isnan()
        else:
            expected, k = slow_psis(log_weight[ids == b].tolist())
            close(smoothed[ids == b], expected, 1e-9)
            close(k_hat[b : b + 1], [k], 1e-9)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_recovers_the_shape_of_a_pareto_tail(shape: float) -> None:
    # The fit's standard error is (1 + k) / sqrt(tail size), so over 32 buckets of 10,000 about 0.02.
    uniform = torch.rand(320_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k_hat = segments.pareto_smooth(-shape * uniform.log(), torch.arange(32).repeat(10_000))[1]
    assert abs(float(k_hat.mean()) - shape) < 0.06


def test_pareto_smoothing_keeps_order_and_never_exceeds_the_largest() -> None:
    log_weight = 3 * torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smoothed, _ = segments.pareto_smooth(log_weight)
    assert torch.equal(smoothed.argsort(), log_weight.argsort())
    assert smoothed.max() <= log_weight.max()
    assert not torch.equal(smoothed, log_weight)


def test_equal_weights_have_no_tail_to_fit() -> None:
    smoothed, k_hat = segments.pareto_smooth(torch.zeros(100, dtype=torch.float64))
    assert torch.equal(smoothed, torch.zeros(100, dtype=torch.float64))
    assert k_hat.isnan().all()
    with pytest.raises(ValueError, match="NaN"):
        segments.pareto_smooth(torch.tensor([math.nan]))


# Coefficients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", segments.WEIGHT_KINDS)
@pytest.mark.parametrize("normalize", segments.NORMALIZATIONS)
def test_coefficients(kind: str, normalize: str) -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    expert_cu = cu_of(EXPERT_LENGTHS)
    lw = segments.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor(GROUPS), kind=kind)
    weights = segments.self_normalize(lw.log_weight, lw.bucket_ids)
    c = segments.irl_coefficients(weights, lw, cu, expert_cu, normalize=normalize)
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
    lw = segments.log_importance_weights(reward, logprob, cu)
    weights = segments.self_normalize(lw.log_weight, lw.bucket_ids)
    with pytest.raises(ValueError, match="got 0 and 3"):
        segments.irl_coefficients(weights, lw, cu, cu_of([]))
    with pytest.raises(ValueError, match="normalize must be one of"):
        segments.irl_coefficients(weights, lw, cu, cu, normalize="tokens")
    with pytest.raises(ValueError, match=r"weights must have shape \[E\]"):
        segments.irl_coefficients(weights[:1], lw, cu, cu)
    with pytest.raises(ValueError, match="weights must be finite; 1 values are not, first inf at index 0"):
        segments.irl_coefficients(torch.cat([torch.tensor([math.inf]), weights[1:]]), lw, cu, cu)


def test_diagnostics() -> None:
    reward, logprob, cu = rollouts(LENGTHS)
    expert_reward, _, expert_cu = rollouts(EXPERT_LENGTHS, seed=9)
    lw = segments.log_importance_weights(reward, logprob, cu, group_ids=torch.tensor(GROUPS))
    weights = segments.self_normalize(lw.log_weight, lw.bucket_ids)
    report = segments.importance_diagnostics(
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


# Advantages -------------------------------------------------------------------------------------------------


def slow_rloo(outcome, reward, cu, groups, c_o: float, c_p: float, gamma: float) -> list[float]:
    pieces = split(reward, cu)
    result = []
    for i, piece in enumerate(pieces):
        others = [j for j in range(len(pieces)) if j != i and groups[j] == groups[i]]
        a_o = float(outcome[i]) - sum(float(outcome[j]) for j in others) / len(others)
        means = [float(pieces[j].mean()) for j in others if len(pieces[j])]
        for t in range(len(piece)):
            a_p = sum(gamma ** (u - t) * (float(piece[u]) - sum(means) / len(means)) for u in range(t, len(piece)))
            result.append(c_o * a_o + c_p * a_p)
    return result


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize(("c_o", "c_p"), [(1.0, 0.0), (0.0, 1.0), (1.0, 0.05)])
def test_rloo_advantages(c_o: float, c_p: float, gamma: float) -> None:
    reward, _, cu = rollouts(LENGTHS)
    outcome = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.0, 0.0, 1.0], dtype=torch.float64)
    options = {"outcome_coefficient": c_o, "process_coefficient": c_p, "gamma": gamma}
    groups = torch.tensor(GROUPS)
    actual = segments.rloo_advantages(outcome, reward, cu, groups, **options)
    expected = torch.tensor(slow_rloo(outcome, reward, cu, GROUPS, c_o, c_p, gamma), dtype=torch.float64)
    close(actual, expected)
    whitened = segments.rloo_advantages(outcome, reward, cu, groups, whiten=True, **options)
    close(whitened, (expected - expected.mean()) / expected.std(correction=0), 1e-6)
    assert segments.rloo_advantages(outcome.float(), reward.float(), cu, groups, **options).dtype == torch.float32


def test_rloo_refuses_what_it_cannot_compare() -> None:
    reward, _, cu = rollouts([2, 1, 3])
    outcome = torch.tensor([1.0, 0.0, 1.0])
    both = {"outcome_coefficient": 1.0, "process_coefficient": 1.0}
    with pytest.raises(ValueError, match=r"1 sequences are alone in their group .first: sequence 2, group 8"):
        segments.rloo_advantages(outcome, reward, cu, torch.tensor([4, 4, 8]), **both)
    groups = torch.tensor([4, 4, 4])
    with pytest.raises(ValueError, match=r"outcome must be finite; 1 values are not, first nan at index 1"):
        segments.rloo_advantages(torch.tensor([1.0, math.nan, 0.0]), reward, cu, groups, **both)
    for name in both:
        with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
            segments.rloo_advantages(outcome, reward, cu, groups, **(both | {name: math.nan}))
    with pytest.raises(ValueError, match="outcome is None"):
        segments.rloo_advantages(None, reward, cu, groups, **both)
    with pytest.raises(ValueError, match="reward is None"):
        segments.rloo_advantages(outcome, None, cu, groups, **both)
    with pytest.raises(ValueError, match="gamma must lie in"):
        segments.rloo_advantages(outcome, reward, cu, groups, gamma=1.5, **both)
    # An empty sequence has no mean reward, so the only other one is alone with its process rewards.
    with pytest.raises(ValueError, match="alone"):
        segments.rloo_advantages(
            None, reward[:2], cu_of([2, 0]), groups[:2], outcome_coefficient=0.0, process_coefficient=1.0
        )
