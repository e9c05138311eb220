"""The native backend directly: every instruction set, its slabs, and the shapes of real models."""

import functools

import pytest
import torch
from kernel_checks import check_linear, check_logits, linear_case, run_linear, run_logits
from repirl_kernels import choose_backend, linear_token_stats, native, token_stats

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the C++ module is not built")

linear_op = functools.partial(linear_token_stats, backend="native")
logits_op = functools.partial(token_stats, backend="native")


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16"])
def instruction_set(request):
    if request.param not in native.instruction_sets():
        pytest.skip(f"no {request.param} on this machine")
    before = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(before)


def test_is_the_default_on_a_cpu():
    assert choose_backend("cpu", torch.float32) == "native"
    assert choose_backend("cpu", torch.bfloat16) == "native"
    assert choose_backend("cpu", torch.float64) == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [1, 2, 15, 16, 17, 1023, 1025, 3001])
def test_instruction_sets(instruction_set, num_columns, dtype):
    options = {"temperature": 0.7, "softcap": 4.0}
    case = linear_case(5, num_columns, 24, dtype=dtype, bias=True, **options)
    check_linear(linear_op, case)
    logits = (torch.randn(5, num_columns) * 4).to(dtype)
    check_logits(logits_op, logits, case.targets, case.upstream, **options)
    check_logits(logits_op, logits, case.targets, case.upstream)


def test_instruction_sets_keep_infinities_and_nan_apart(instruction_set):
    logits = torch.randn(5, 2500)
    logits[0] = -torch.inf
    logits[1, 2499] = torch.nan
    logits[2, :2400] = -torch.inf
    logits[3, 7] = torch.inf
    targets = torch.full((5,), 2450)
    native_outcome, reference_outcome = (
        run_logits(functools.partial(token_stats, backend=name), logits, targets, torch.ones(4, 5))
        for name in ("native", "reference")
    )
    torch.testing.assert_close(native_outcome.stats, reference_outcome.stats, equal_nan=True)
    torch.testing.assert_close(native_outcome.dhidden, reference_outcome.dhidden, equal_nan=True)


def test_softcap_is_accurate_near_zero_and_when_saturated(instruction_set):
    logits = torch.cat([torch.logspace(-12, 3, 200), -torch.logspace(-12, 3, 200), torch.zeros(1)])
    capped = torch.stack(
        [logits_op(logits[None], torch.tensor([index]), softcap=2.0).target_logit for index in range(401)]
    )
    truth = 2.0 * torch.tanh(logits.double() / 2.0)
    relative = ((capped[:, 0].double() - truth) / truth)[:-1].abs().max()
    assert relative < 4e-7
    assert capped[-1, 0] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_features"),
    [(1024, 997, 64), (7, 32000, 64), (7, 50257, 64), (2, 151936, 64), (33, 2000, 576), (17, 1500, 1000)],
)
def test_shapes_of_real_models(num_rows, num_columns, num_features, dtype):
    case = linear_case(num_rows, num_columns, num_features, dtype=dtype)
    check_linear(linear_op, case)
    if num_rows * num_columns < 400_000:
        logits = (torch.randn(num_rows, num_columns) * 3).to(dtype)
        check_logits(logits_op, logits, case.targets, case.upstream)


def test_slabs_do_not_change_results(monkeypatch):
    monkeypatch.setattr(native, "has_products", lambda dtype: False)
    case = linear_case(9, 777, 16, bias=True, temperature=0.5, vocab_size=770)
    whole = run_linear(linear_op, case)
    monkeypatch.setattr(native, "_SLAB_ELEMENTS", 9 * 128)
    monkeypatch.setattr(native, "_MIN_SLAB_COLUMNS", 64)
    slabs = run_linear(linear_op, case)
    for left, right in zip(whole, slabs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_bfloat16_logits_are_never_rounded():
    # Rounded to bfloat16, logits around 24 would be up to 0.06 off.
    case = linear_case(16, 500, 64, dtype=torch.bfloat16, scale=24.0)
    stats = linear_op(case.hidden, case.weight, case.targets)
    truth = (case.hidden.double() @ case.weight.double().T).gather(1, case.targets[:, None]).squeeze(1)
    torch.testing.assert_close(stats.target_logit.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.fixture
def each_num_threads():
    def run(function):
        before = torch.get_num_threads()
        outcomes = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            outcomes.append(function())
        torch.set_num_threads(before)
        return outcomes

    return run


def test_number_of_threads_does_not_change_results(each_num_threads):
    case = linear_case(64, 3000, 16)
    logits = torch.randn(64, 3000)
    one, three = each_num_threads(lambda: run_logits(logits_op, logits, case.targets, case.upstream))
    assert torch.equal(one.stats, three.stats)
    assert torch.equal(one.dhidden, three.dhidden)


@pytest.mark.skipif("avx512bf16" not in native.instruction_sets(), reason="no AVX-512 with bfloat16 on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_products_do_not_depend_on_threads_or_on_other_rows(each_num_threads, dtype):
    # Large enough for three threads, several tasks of rows and of columns, and several slabs.
    case = linear_case(1100, 4000, 40, dtype=dtype, bias=True)
    one, three = each_num_threads(lambda: run_linear(linear_op, case))
    for left, right in zip(one, three, strict=True):
        assert torch.equal(left, right)
    alone = linear_op(case.hidden[1003:1004], case.weight, case.targets[1003:1004], bias=case.bias)
    assert torch.equal(torch.stack(list(alone))[:, 0], one.stats[:, 1003])


@pytest.mark.skipif("avx512bf16" not in native.instruction_sets(), reason="no AVX-512 with bfloat16 on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 49, 47), (2, 95, 97), (513, 1000, 49), (2100, 400, 130), (8, 48, 2)])
def test_own_products_of_any_shape(monkeypatch, shape, dtype):
    check_linear(linear_op, linear_case(*shape, dtype=dtype, bias=True))
    monkeypatch.setattr(native, "_WORKSPACE_BYTES", 0)  # the narrowest slabs
    check_linear(linear_op, linear_case(*shape, dtype=dtype))
