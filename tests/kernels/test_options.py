"""Options beyond a plain call: a temperature for each row, label smoothing, argmax, no entropy; and wrong values."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_checks import check_linear, check_logits, in_float64, linear_case, plain_stats, run_linear, stats_by_loss
from repirl_kernels import (
    TokenStats,
    TokenStatsWithArgmax,
    linear_token_loss,
    linear_token_stats,
    native,
    token_stats,
)
from torch.distributed.device_mesh import init_device_mesh

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_native = pytest.mark.skipif(not native.is_available(), reason="not built")


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request):
    return request.param


def linear_ops(backend, columns):
    """``linear_token_stats``, and ``linear_token_loss`` in one chunk and in several."""
    by_loss = functools.partial(stats_by_loss, backend=backend)
    return [
        functools.partial(linear_token_stats, backend=backend),
        by_loss,
        functools.partial(by_loss, chunk_bytes=3 * 4 * columns),
    ]


def temperatures(num_rows):
    return torch.linspace(0.3, 3.0, num_rows)


OPTIONS = {
    "temperatures": {"temperature": temperatures(8)},
    "temperatures, softcap": {"temperature": temperatures(8), "softcap": 4.0},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed, all": {"label_smoothing": 0.3, "softcap": 4.0, "temperature": 0.7, "vocab_size": 1080},
    "argmax": {"with_argmax": True, "temperature": 0.7},
    "argmax, temperatures": {"with_argmax": True, "temperature": temperatures(8), "label_smoothing": 0.1},
    "no entropy": {"with_entropy": False},
    "no entropy, all": {"with_entropy": False, "label_smoothing": 0.1, "with_argmax": True, "softcap": 9.0},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_plain_pytorch(backend, dtype, options):
    case = linear_case(8, 1100, 24, dtype=dtype, bias=True, **options)  # more than one block of columns
    if options.get("with_entropy") is False:
        case.upstream[3] = 0
    for op in linear_ops(backend, 1100):
        check_linear(op, case)
    logits = (torch.randn(8, 1100) * 3).to(dtype)
    check_logits(functools.partial(token_stats, backend=backend), logits, case.targets, case.upstream, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_own_products(monkeypatch, options):
    if not native.is_available():
        pytest.skip("not built")
    monkeypatch.setattr(native, "has_products", lambda dtype: False)
    monkeypatch.setattr(native, "_SLAB_ELEMENTS", 8 * 128)
    monkeypatch.setattr(native, "_MIN_SLAB_COLUMNS", 64)
    case = linear_case(8, 1100, 24, bias=True, **options)
    case.upstream[3] *= options.get("with_entropy", True)
    for op in linear_ops("native", 1100):
        check_linear(op, case)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float64(options):
    case = in_float64(linear_case(8, 1100, 24, bias=True, **options))
    case.upstream[3] *= options.get("with_entropy", True)
    for op in linear_ops(None, 1100):
        check_linear(op, case)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_instruction_set(options):
    if not native.is_available():
        pytest.skip("not built")
    before = native.instruction_set()
    case = linear_case(8, 1100, 24, dtype=torch.bfloat16, bias=True, **options)
    case.upstream[3] *= options.get("with_entropy", True)
    try:
        for name in native.instruction_sets():
            native.use_instruction_set(name)
            for op in linear_ops("native", 1100)[:2]:
                check_linear(op, case)
    finally:
        native.use_instruction_set(before)


# A temperature for each row.


def test_equal_temperatures_are_one_temperature(backend):
    case = linear_case(8, 60, 8, bias=True, temperature=0.7)
    expected = run_linear(functools.partial(linear_token_stats, backend=backend), case)
    for tensor in (torch.full((8,), 0.7), torch.tensor(0.7), torch.tensor(0.7, dtype=torch.float64)):
        for op in linear_ops(backend, 60):
            outcome = run_linear(op, case._replace(options={"temperature": tensor}))
            for left, right in zip(outcome, expected, strict=True):
                torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6)


def test_temperatures_of_masked_rows_may_be_anything(backend):
    case = linear_case(6, 60, 8, bias=True)
    keep = torch.tensor([True, False, True, False, True, True])
    temperature = temperatures(6)
    some = case._replace(
        hidden=case.hidden[keep],
        targets=case.targets[keep],
        upstream=case.upstream[:, keep],
        options={"temperature": temperature[keep]},
    )
    temperature[1], temperature[3] = torch.nan, 0.0
    masked = case._replace(options={"temperature": temperature, "row_mask": keep})
    for op in linear_ops(backend, 60):
        outcome, expected = run_linear(op, masked), run_linear(op, some)
        torch.testing.assert_close(outcome.stats[:, keep], expected.stats)
        assert not outcome.stats[:, ~keep].any()
        assert not outcome.dhidden[~keep].any()
        for name in ("dweight", "dbias"):
            torch.testing.assert_close(getattr(outcome, name), getattr(expected, name))
    stats = token_stats(torch.zeros(6, 5), torch.tensor([0, -100, 0, -100, 0, 0]), temperature=temperature)
    assert stats.logprob.isfinite().all()


def test_temperatures_have_the_shape_of_targets(backend):
    hidden, weight, targets = torch.randn(2, 3, 8), torch.randn(20, 8), torch.randint(20, (2, 3))
    temperature = torch.rand(2, 3) + 0.5
    stats = linear_token_stats(hidden, weight, targets, temperature=temperature, backend=backend)
    truth = plain_stats((hidden @ weight.T).flatten(0, 1), targets.flatten(), temperature.flatten())
    torch.testing.assert_close(stats.entropy, truth.entropy.view(2, 3))
    strided = linear_token_stats(hidden, weight, targets, temperature=temperature.T.contiguous().T, backend=backend)
    assert torch.equal(strided.entropy, stats.entropy)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
def test_a_wrong_temperature_names_its_row(backend, value):
    temperature = torch.ones(6)
    temperature[4] = value
    operands = torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(6, dtype=torch.int64)
    message = r"temperature .* in row 4 is outside \["
    for call in (
        lambda: linear_token_stats(*operands, temperature=temperature, backend=backend),
        lambda: token_stats(operands[0], operands[2], temperature=temperature, backend=backend),
        lambda: linear_token_loss(*operands, lambda stats, rows: stats.logprob, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_temperatures_that_only_float64_holds():
    temperature = torch.tensor([1e-300, 1.0, 1e300], dtype=torch.float64)
    logits = torch.randn(3, 9, dtype=torch.float64) * temperature[:, None]
    stats = token_stats(logits, torch.zeros(3, dtype=torch.int64), temperature=temperature)
    truth = torch.log_softmax(logits / temperature[:, None], -1)[:, 0]
    torch.testing.assert_close(stats.logprob, truth)
    for number in (1e-300, 1e300):
        scaled = logits / temperature[:, None] * number
        one = token_stats(scaled, torch.zeros(3, dtype=torch.int64), temperature=number)
        torch.testing.assert_close(one.logprob, truth)
    with pytest.raises(ValueError, match="in row 0 is outside"):
        token_stats(logits.float(), torch.zeros(3, dtype=torch.int64), temperature=temperature)
    temperature[1] = 0
    with pytest.raises(ValueError, match=r"temperature 0.0 in row 1"):
        token_stats(logits, torch.zeros(3, dtype=torch.int64), temperature=temperature)


# The largest logit.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_argmax_is_the_first_of_several(backend, dtype):
    if dtype == torch.float64:
        backend = None
    logits = torch.zeros(7, 2200, dtype=dtype)
    for row, columns in enumerate([[5, 6], [0, 2199], [1023, 1024], [3], [2, 2, 900], [], [700, 2150]]):
        logits[row, columns] = 3.0
    logits[6, 2160] = 5.0  # padding
    logits[3, 4] = torch.nan
    logits[2, 7] = -torch.inf
    targets = torch.tensor([0, 1, 2, 3, -100, 5, 6])
    options = {"with_argmax": True, "vocab_size": 2155, "backend": backend}
    stats = token_stats(logits, targets, **options)
    assert isinstance(stats, TokenStatsWithArgmax)
    assert stats.argmax.tolist() == [5, 0, 1023, -1, -1, 0, 700]
    assert stats.max_logit[[0, 1, 2, 4, 5, 6]].tolist() == [3.0, 3.0, 3.0, 0.0, 0.0, 3.0]
    assert stats.max_logit[3].isnan()
    assert not stats.max_logit.requires_grad
    # The same by products with the unit matrix.
    logits[3, 4] = 0.0
    eye = torch.eye(7, dtype=dtype)
    weight = logits.nan_to_num(neginf=-10.0).T.contiguous()
    by_loss = linear_token_loss(eye, weight, targets, lambda stats, rows: stats.logprob, **options, chunk_bytes=20000)
    for product in (linear_token_stats(eye, weight, targets, **options), by_loss.stats):
        assert product.argmax.tolist() == [5, 0, 1023, 3, -1, 0, 700]


def test_argmax_with_softcap_and_banned_tokens(backend):
    case = linear_case(9, 70, 8, bias=True)
    case.bias[:60] = -torch.inf
    case = case._replace(targets=case.targets % 10 + 60)
    options = {"with_argmax": True, "backend": backend}
    stats = linear_token_stats(case.hidden, case.weight, case.targets, bias=case.bias, **options)
    z = case.hidden @ case.weight.T + case.bias
    assert torch.equal(stats.argmax, z.argmax(dim=-1))
    capped = linear_token_stats(
        case.hidden, case.weight, case.targets, bias=case.bias, softcap=9.0, temperature=0.5, **options
    )
    assert torch.equal(capped.argmax, z.argmax(dim=-1))
    torch.testing.assert_close(capped.max_logit, 9 * torch.tanh(z.amax(dim=-1) / 9) / 0.5)
    saturated = token_stats(torch.full((1, 50), 1e6), torch.tensor([3]), softcap=1.0, **options)
    assert saturated.argmax.tolist() == [0]
    nothing = token_stats(torch.full((1, 50), -torch.inf), torch.tensor([3]), **options)
    assert nothing.argmax.tolist() == [-1]


def test_a_loss_function_gets_what_was_asked_for(backend):
    case = linear_case(9, 70, 8)
    hidden = case.hidden.requires_grad_()
    seen = []

    def loss_fn(stats, rows):
        seen.append(stats)
        return -stats.logprob * (stats.argmax == case.targets[rows])

    options = {"with_argmax": True, "with_entropy": False, "label_smoothing": 0.2, "backend": backend}
    result = linear_token_loss(hidden, case.weight, case.targets, loss_fn, **options, chunk_bytes=1000)
    assert len(seen) > 2
    assert all(isinstance(stats, TokenStatsWithArgmax) and stats.entropy is None for stats in [*seen, result.stats])
    stats = linear_token_stats(hidden, case.weight, case.targets, **options)
    expected = loss_fn(stats, slice(None)).sum()
    torch.testing.assert_close(result.loss, expected)
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in (result.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


# Label smoothing, no entropy.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_label_smoothing_is_that_of_cross_entropy(backend, dtype, smoothing):
    logits = (torch.randn(9, 1500) * 3).to(dtype).requires_grad_()
    targets = torch.randint(1500, (9,))
    targets[4] = -100
    expected = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    stats = token_stats(logits, targets, label_smoothing=smoothing, backend=backend)
    torch.testing.assert_close(-stats.logprob, expected)
    torch.testing.assert_close(torch.autograd.grad(-stats.logprob.sum(), logits)[0], gradient, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_label_smoothing_at_an_offset(backend, offset):
    case = linear_case(7, 1100, 16, label_smoothing=0.1)
    check_logits(
        functools.partial(token_stats, backend=backend),
        torch.randn(7, 1100) * 3 + offset,
        case.targets,
        case.upstream,
        label_smoothing=0.1,
    )
    for op in linear_ops(backend, 1100):
        check_linear(op, case._replace(bias=torch.full((1100,), offset)))


def test_label_smoothing_with_a_banned_token_is_that_of_cross_entropy(backend):
    logits = torch.randn(2, 1100)
    logits[0, 1050] = -torch.inf
    expected = F.cross_entropy(logits, torch.tensor([3, 4]), reduction="none", label_smoothing=0.1)
    stats = token_stats(logits, torch.tensor([3, 4]), label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(-stats.logprob, expected)
    assert expected[0] == torch.inf
    assert stats.entropy.isfinite().all()


def test_leaving_the_entropy_out_changes_nothing_else(backend):
    case = linear_case(8, 1100, 24, bias=True, temperature=0.7)
    case.upstream[3] = 0
    for op in linear_ops(backend, 1100):
        expected, outcome = (
            run_linear(op, case),
            run_linear(op, case._replace(options={**case.options, "with_entropy": False})),
        )
        assert torch.equal(outcome.stats[:3], expected.stats[:3])
        for left, right in zip(outcome[1:], expected[1:], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)
    stats = linear_token_stats(case.hidden, case.weight, case.targets, with_entropy=False, backend=backend)
    assert isinstance(stats, TokenStats)
    assert stats.entropy is None


# Rows with a probability of 1, whose gradient is what that lacks.


@pytest.mark.parametrize("how", ["reference", "native", "torch's products"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_columns", "num_features"), [(100, 16), (333, 577), (600, 1024)])
def test_saturated_rows_keep_an_exact_zero(monkeypatch, how, dtype, num_columns, num_features):
    if how != "reference" and not native.is_available():
        pytest.skip("not built")
    if how == "torch's products":
        monkeypatch.setattr(native, "has_products", lambda dtype: False)
    weight = F.normalize(linear_case(1, num_columns, num_features).weight).to(dtype)
    targets = torch.arange(64) % num_columns
    hidden = (weight[targets].float() * 320).to(dtype)  # final logits of 3200
    backend = "reference" if how == "reference" else "native"
    case = linear_case(64, num_columns, num_features, dtype=dtype, temperature=0.1)
    case = case._replace(hidden=hidden, weight=weight, targets=targets)
    for num_live in (1, 2, 3, 9):
        upstream = torch.zeros(4, 64)
        upstream[[0, 3], :num_live] = 1.0
        for op in (linear_token_stats, stats_by_loss):
            outcome = run_linear(functools.partial(op, backend=backend), case._replace(upstream=upstream))
            assert not outcome.dhidden.any()
            assert not outcome.dweight.any()
        # Nearly saturated, beside a common offset.
        near = case._replace(
            hidden=(hidden.float() / 400).to(dtype),
            bias=torch.full((num_columns,), 300.0, dtype=dtype),
            upstream=upstream,
        )
        check_linear(functools.partial(linear_token_stats, backend=backend), near)


# What is refused.

OPERANDS = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(20, 8), "targets": torch.zeros(4, dtype=torch.int64)}


class Zero3Parameter(torch.nn.Parameter):
    ds_id = 0


def calls(changes):
    """All three ops with the arguments that they have."""
    arguments = OPERANDS | changes
    yield lambda: linear_token_stats(**arguments)
    if "skip_negligible" not in changes:
        yield lambda: linear_token_loss(**arguments, loss_fn=lambda stats, rows: stats.logprob)
    if not {"hidden", "weight", "bias", "skip_negligible"} & set(changes):
        options = {name: value for name, value in arguments.items() if name not in ("hidden", "weight")}
        yield lambda: token_stats(arguments["hidden"], **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore_index": None}, "ignore_index must be an integer, got None of type NoneType"),
        ({"ignore_index": -100.0}, "ignore_index must be an integer, got -100.0 of type float"),
        ({"ignore_index": True}, "ignore_index must be an integer, got True of type bool"),
        ({"vocab_size": 7.0}, "vocab_size must be an integer, got 7.0 of type float"),
        ({"vocab_size": True}, "vocab_size must be an integer, got True"),
        ({"vocab_size": np.float64(7)}, "vocab_size must be an integer, got"),
        ({"temperature": "1.0"}, "temperature must be a number, got '1.0' of type str"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": np.True_}, "temperature must be a number, got True"),
        ({"temperature": np.ones(4)}, "temperature must be a number"),
        ({"temperature": torch.ones(4, dtype=torch.int64)}, "temperature has dtype int64"),
        ({"softcap": "30"}, "softcap must be a number, got '30'"),
        ({"softcap": torch.tensor(30.0)}, "softcap must be a number, got tensor"),
        ({"label_smoothing": None}, "label_smoothing must be a number, got None"),
        ({"label_smoothing": True}, "label_smoothing must be a number, got True"),
        ({"with_entropy": 1}, "with_entropy must be True or False, got 1"),
        ({"with_argmax": None}, "with_argmax must be True or False, got None"),
        ({"skip_negligible": 1}, "skip_negligible must be True or False, got 1"),
        ({"targets": [0, 1, 2, 3]}, "targets must be a torch.Tensor, got list"),
        ({"targets": torch.zeros(4, dtype=torch.bool)}, "targets has dtype bool"),
    ],
)
def test_options_of_a_wrong_type(changes, message):
    for call in calls(changes):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1e-39}, r"temperature must lie in \[1.18e-38, 8.51e\+37\]"),
        ({"temperature": 1e300}, "temperature must lie in"),
        ({"softcap": 1e-45}, "softcap must lie in"),
        ({"softcap": 1e39}, "softcap must lie in"),
        ({"softcap": float("inf")}, "softcap must be a finite number > 0 or None, got inf"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 1\), got -0.1"),
        ({"label_smoothing": float("nan")}, r"label_smoothing must lie in \[0, 1\), got nan"),
        ({"skip_negligible": True, "label_smoothing": 0.1}, "skip_negligible would leave out .* label_smoothing"),
        ({"temperature": torch.ones(3)}, r"shape of targets, \(4,\), got \(3,\)"),
        ({"temperature": torch.ones(4, 1)}, r"shape of targets, \(4,\), got \(4, 1\)"),
        ({"temperature": torch.ones(4, requires_grad=True)}, "temperature requires a gradient.*detach it"),
        *(
            ({name: tensor.to("meta")}, f"{name} is on the meta device and has no values")
            for name, tensor in (
                *OPERANDS.items(),
                ("bias", torch.zeros(20)),
                ("row_mask", torch.ones(4, dtype=torch.bool)),
                ("temperature", torch.ones(4)),
            )
        ),
        ({"weight": Zero3Parameter(torch.zeros(0))}, "weight is a DeepSpeed ZeRO-3 parameter that is not gathered"),
    ],
)
def test_wrong_values(changes, message):
    for call in calls(changes):
        with pytest.raises(ValueError, match=message):
            call()


def test_logits_on_the_meta_device():
    with pytest.raises(ValueError, match="logits is on the meta device"):
        token_stats(torch.zeros(4, 8, device="meta"), OPERANDS["targets"])


def test_a_dtensor_is_no_main_grad(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        main_grad = torch.distributed.tensor.distribute_tensor(torch.zeros(20, 8), mesh)
        with pytest.raises(TypeError, match=r"main_grad is a DTensor.*main_grad.full_tensor"):
            linear_token_loss(**OPERANDS, loss_fn=lambda stats, rows: stats.logprob, main_grad=main_grad)
    finally:
        torch.distributed.destroy_process_group()


def test_numbers_of_numpy(backend):
    case = linear_case(5, 40, 8)
    expected = linear_token_stats(
        case.hidden, case.weight, case.targets % 37, temperature=0.5, softcap=3.0, vocab_size=37
    )
    options = {
        "temperature": np.float32(0.5),
        "softcap": np.float64(3),
        "vocab_size": np.int64(37),
        "ignore_index": np.int32(-100),
        "label_smoothing": np.float32(0),
        "backend": backend,
    }
    actual = linear_token_stats(case.hidden, case.weight, case.targets % 37, **options)
    torch.testing.assert_close(actual.logprob, expected.logprob)
    assert token_stats(case.hidden, case.targets % 7, temperature=np.array(2.0), softcap=3).logprob.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16])
@pytest.mark.parametrize("ignore_index", [-100, 3, 100_000])
def test_targets_of_every_integer_dtype(backend, dtype, ignore_index):
    case = linear_case(5, 40, 8)
    targets = torch.tensor([0, 39, 3, 7, 2])
    options = {"ignore_index": ignore_index, "backend": backend}
    small = linear_token_stats(case.hidden, case.weight, targets.to(dtype), **options)
    expected = linear_token_stats(case.hidden, case.weight, targets, **options)
    assert torch.equal(small.logprob, expected.logprob)
    by_loss = linear_token_loss(
        case.hidden, case.weight, targets.to(dtype), lambda stats, rows: stats.logprob, **options
    )
    assert torch.equal(by_loss.token_loss, expected.logprob)
    logits = case.hidden @ case.weight.T
    torch.testing.assert_close(token_stats(logits, targets.to(dtype), **options).logprob, expected.logprob)


def test_another_default_device(backend):
    case = linear_case(5, 40, 8, bias=True)
    expected = run_linear(functools.partial(linear_token_stats, backend=backend), case)
    with torch.device("meta"):
        actual = run_linear(functools.partial(linear_token_stats, backend=backend), case)
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)
