"""What the ops do for all backends: registrations, checks, shapes, the choice of a backend."""

import itertools
import warnings

import pytest
import torch
from kernel_checks import linear_case, run_linear
from repirl_kernels import TokenStats, backends, choose_backend, linear_token_stats, native, ops, token_stats
from repirl_kernels.operands import Options
from repirl_kernels.rows import RowStats

needs_native = pytest.mark.skipif(not native.is_available(), reason="not built")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


# Options for opcheck: few, most of them at once, and without entropy.
OPTIONS = {
    "plain": Options(0.7, None, -100, 28, 0.0, True, False, ""),
    "smoothed": Options(1.0, 3.0, -100, 28, 0.1, True, True, ""),
    "without entropy": Options(1.0, None, -100, 28, 0.1, False, True, ""),
}


def saved_statistics(outputs, options):
    """The statistics that a backward operator takes from the forward operator's outputs."""
    stats = RowStats(*(output.detach() for output in outputs))
    return stats.logsumexp, stats.entropy if options.with_entropy else None, stats.logsumexp_low


def upstream_gradients(upstream, options):
    return *upstream[:3], upstream[3] if options.with_entropy else None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_linear(backend, options):
    options, masked = options._replace(backend=backend), options.with_argmax
    case = linear_case(6, 30, 8, bias=masked)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    bias = case.bias.requires_grad_() if masked else None
    mask = torch.tensor([True, False, True, True, True, False]) if masked else None
    temperature = torch.linspace(0.5, 2, 6) if masked else None
    skip_negligible = masked and not options.label_smoothing
    forward = (hidden, weight, case.targets, bias, mask, temperature, skip_negligible, *options)
    case.targets.clamp_(max=27)
    torch.library.opcheck(ops._linear_token_stats, forward)
    saved = saved_statistics(ops._linear_token_stats(*forward), options)
    detached = [tensor if tensor is None else tensor.detach() for tensor in forward[:6]]
    for needs in itertools.product([False, True], repeat=3):
        backward = (*upstream_gradients(case.upstream, options), *saved, *needs, *detached, *forward[6:])
        # Double backward is refused, so there is no gradient of this one to check.
        torch.library.opcheck(ops._linear_token_stats_backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_logits(backend, dtype, options):
    options = options._replace(backend=backend)
    logits = torch.randn(6, 30).to(dtype).requires_grad_()
    targets = torch.tensor([1, 2, -100, 4, 5, 6])
    temperature = torch.linspace(0.5, 2, 6) if options.with_argmax else None
    forward = (logits, targets, None, temperature, *options)
    torch.library.opcheck(ops._token_stats, forward)
    saved = saved_statistics(ops._token_stats(*forward), options)
    backward = (*upstream_gradients(torch.randn(4, 6), options), logits.detach(), *forward[1:4], *saved, *options)
    torch.library.opcheck(ops._token_stats_backward, backward, test_utils=("test_schema", "test_faketensor"))


def test_outputs_have_the_shape_of_targets_and_float32():
    hidden, weight = torch.randn(2, 3, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    targets = torch.randint(20, (2, 3))
    for stats in (linear_token_stats(hidden, weight, targets), token_stats(hidden @ weight.T, targets)):
        assert isinstance(stats, TokenStats)
        assert all(output.shape == (2, 3) and output.dtype == torch.float32 for output in stats)
    one = linear_token_stats(hidden[0, 0], weight, targets[0, 0])
    assert one.logprob.shape == ()
    torch.testing.assert_close(one.logprob, linear_token_stats(hidden, weight, targets).logprob[0, 0])


def test_frozen_inputs_give_no_graph():
    case = linear_case(3, 20, 8)
    assert not linear_token_stats(case.hidden, case.weight, case.targets).logprob.requires_grad


def test_a_frozen_head_computes_no_weight_gradient(monkeypatch):
    seen = []
    backend = ops.backend_module(torch.zeros(1), "reference")
    original = backend.linear_backward
    monkeypatch.setattr(
        backend, "linear_backward", lambda *args, **skip: seen.append(args[6:9]) or original(*args, **skip)
    )
    case = linear_case(3, 20, 8)
    stats = linear_token_stats(case.hidden.requires_grad_(), case.weight, case.targets, backend="reference")
    stats.logprob.sum().backward()
    assert seen == [(True, False, False)]


def test_ignored_and_dead_rows_never_reach_the_backend(monkeypatch):
    seen = []
    backend = ops.backend_module(torch.zeros(1), "reference")
    for name, position in (("linear_forward", 0), ("linear_backward", 1)):
        original = getattr(backend, name)

        def spy(*args, original=original, position=position, **skip):
            seen.append(args[position].shape[0])
            return original(*args, **skip)

        monkeypatch.setattr(backend, name, spy)
    case = linear_case(10, 20, 8)
    case.targets[:2] = -100
    mask = torch.arange(10) != 9
    case.upstream[:, 5:7] = 0
    run_linear(linear_token_stats, case._replace(options={"row_mask": mask, "backend": "reference"}))
    assert seen == [7, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"softcap": -1.0}, "softcap must be a finite number > 0 or None, got -1.0"),
        ({"vocab_size": 0}, r"vocab_size must lie in \[1, 20\].* got 0"),
        ({"vocab_size": 21}, r"vocab_size must lie in \[1, 20\].* got 21"),
        ({"backend": "cuda"}, "backend='cuda' is unknown, expected one of reference, triton, native"),
        ({"row_mask": torch.ones(3, dtype=torch.bool)}, r"shape of targets, \(4,\), got \(3,\)"),
        ({"bias": torch.zeros(19)}, r"expected bias \[20\].*got \(19,\)"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"\(4,\), got \(5,\)"),
        ({"weight": torch.zeros(20, 7)}, r"got hidden \(4, 8\) and weight \(20, 7\)"),
        ({"hidden": torch.zeros(4, 0), "weight": torch.zeros(20, 0)}, "no features: D = 0"),
        ({"weight": torch.zeros(20, 8, device="meta")}, "weight is on the meta device and has no values"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(20, 8),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_token_stats(**(arguments | changes))


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="V = 0"):
        token_stats(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64))


def test_choose_backend():
    assert choose_backend("cpu", torch.float32, "reference") == "reference"
    assert choose_backend("meta", torch.float32) == "reference"
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        choose_backend("cpu", torch.float32, "cuda")
    with pytest.raises(TypeError, match="does not run in float64"):
        choose_backend("cpu", torch.float64, "native")
    with pytest.raises(ValueError, match="runs on the CPU, got tensors on cuda"):
        choose_backend("cuda", torch.float32, "native")


def test_triton_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_triton_installed", lambda: True)
    with pytest.raises(ValueError, match="runs on a GPU, got tensors on cpu"):
        token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), backend="triton")
    assert choose_backend("cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "_triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        choose_backend("cuda", torch.float32, "triton")
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert choose_backend("cuda", torch.float32) == "reference"


def test_without_the_native_module_one_warning_and_the_same_results(monkeypatch):
    case = linear_case(6, 30, 8)
    expected = run_linear(linear_token_stats, case)
    monkeypatch.setattr(native, "_native", None)
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="native CPU backend is not built") as caught:
        actual = run_linear(linear_token_stats, case)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_linear(linear_token_stats, case)
    torch.testing.assert_close(actual.stats, expected.stats)
    torch.testing.assert_close(actual.dweight, expected.dweight)
    with pytest.raises(RuntimeError, match="backend='native' is not built"):
        choose_backend("cpu", torch.float32, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_products", [True, False])
def test_skip_negligible_leaves_out_what_is_below_the_resolution(monkeypatch, dtype, own_products):
    if not native.is_available():
        pytest.skip("not built")
    if not own_products:
        monkeypatch.setattr(native, "has_products", lambda dtype: False)
    monkeypatch.setattr(native, "_SLAB_ELEMENTS", 40 * 1024)
    # All probability is on the first 60 columns, in every fifth row also on the target 8990. Elsewhere it is
    # negligible.
    case = linear_case(40, 9000, 24, dtype=dtype, bias=True, scale=1.0)
    case.bias[60:] -= 40.0
    case = case._replace(targets=case.targets % 60)
    case.targets[::5] = 8990
    exact = run_linear(linear_token_stats, case)
    skipped = run_linear(linear_token_stats, case._replace(options={"skip_negligible": True}))
    assert torch.equal(skipped.stats, exact.stats)
    assert torch.equal(skipped.dbias, exact.dbias)
    for name in ("dhidden", "dweight"):
        actual, expected = getattr(skipped, name), getattr(exact, name)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    # Columns that are likely in no row get no gradient; without the option they get a tiny one.
    assert not skipped.dweight[3000:8000].any()
    if dtype != torch.float16:
        assert exact.dweight[3000:8000].any()
    assert skipped.dweight[8990].any()


def test_skip_negligible_keeps_nan_and_rows_that_count(monkeypatch):
    case = linear_case(20, 500, 24, scale=0.1)  # nearly uniform: nothing is below float32's resolution
    exact = run_linear(linear_token_stats, case)
    skipped = run_linear(linear_token_stats, case._replace(options={"skip_negligible": True}))
    for left, right in zip(exact, skipped, strict=True):
        assert left is right or torch.equal(left, right)
    case.hidden[3, 0] = torch.nan
    assert run_linear(linear_token_stats, case._replace(options={"skip_negligible": True})).dhidden[3].isnan().all()
