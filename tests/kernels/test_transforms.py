"""``torch.func`` over the ops: values and gradients of plain PyTorch, and a refusal where there is no derivative."""

import functools

import pytest
import torch
from kernel_checks import linear_case, plain_linear, plain_stats
from repirl_kernels import linear_token_loss, linear_token_stats, native, token_stats
from torch.autograd import forward_ad

needs_native = pytest.mark.skipif(not native.is_available(), reason="not built")
NUM_COLUMNS = 40


@pytest.fixture(params=["reference", pytest.param("native", marks=needs_native)])
def backend(request):
    return request.param


def loss_of_stats(stats):
    return (stats.logprob * stats.entropy + 0.3 * stats.logsumexp - stats.target_logit.square() / 9).sum()


def by_stats(hidden, weight, targets, **options):
    return loss_of_stats(linear_token_stats(hidden, weight, targets, **options))


def by_logits(hidden, weight, targets, **options):
    return loss_of_stats(token_stats(hidden @ weight.T, targets, **options))


def by_loss(hidden, weight, targets, **options):
    def loss_fn(stats, rows):
        return stats.logprob * stats.entropy + 0.3 * stats.logsumexp - stats.target_logit.square() / 9

    return linear_token_loss(hidden, weight, targets, loss_fn, **options).loss


def plainly(hidden, weight, targets, **options):
    return loss_of_stats(plain_linear(hidden, weight, targets, **options))


@pytest.fixture(params=[by_stats, by_logits, by_loss])
def loss(request, backend):
    return functools.partial(request.param, backend=backend)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_grad_vjp_and_jacrev(loss):
    case = linear_case(5, NUM_COLUMNS, 8)
    operands = case.hidden, case.weight, case.targets
    expected = torch.func.grad_and_value(plainly, argnums=(0, 1))(*operands)
    close(torch.func.grad_and_value(loss, argnums=(0, 1))(*operands), expected)
    close(torch.func.grad(loss)(*operands), expected[0][0])
    value, pull_back = torch.func.vjp(lambda hidden, weight: loss(hidden, weight, case.targets), *operands[:2])
    close((pull_back(torch.tensor(1.0)), value), expected)
    close(torch.func.jacrev(loss)(*operands), expected[0][0])


def test_jacrev_of_every_row(backend):
    case = linear_case(5, NUM_COLUMNS, 8, bias=True, temperature=0.7)

    def rows(op, bias):
        return torch.stack(list(op(case.hidden, case.weight, case.targets, bias=bias, **case.options)))

    op = functools.partial(linear_token_stats, backend=backend)
    close(
        torch.func.jacrev(functools.partial(rows, op))(case.bias),
        torch.func.jacrev(functools.partial(rows, plain_linear))(case.bias),
    )


@pytest.mark.parametrize("in_dims", [(0, None, 0), (None, 0, None), (0, 0, 0), (1, None, 0)])
def test_vmap(loss, in_dims):
    hidden, weight = torch.randn(3, 5, 8), torch.randn(3, NUM_COLUMNS, 8)
    targets = torch.randint(NUM_COLUMNS, (3, 5))
    operands = [
        tensor if dim is not None else tensor[0] for tensor, dim in zip((hidden, weight, targets), in_dims, strict=True)
    ]
    if in_dims[0] == 1:
        operands[0] = hidden.movedim(0, 1)
    with torch.no_grad():
        close(torch.vmap(loss, in_dims)(*operands), torch.vmap(plainly, in_dims)(*operands))
    for argument in (0, 1):
        gradients = [
            torch.vmap(torch.func.grad(function, argument), in_dims)(*operands) for function in (loss, plainly)
        ]
        close(*gradients)
    leaf = operands[0].clone().requires_grad_()
    gradients = [
        torch.autograd.grad(torch.vmap(function, in_dims)(leaf, *operands[1:]).sum(), leaf)
        for function in (loss, plainly)
    ]
    close(*gradients)


def test_vmap_over_everything(backend):
    hidden, weight, bias = torch.randn(3, 5, 8), torch.randn(NUM_COLUMNS, 8), torch.randn(3, NUM_COLUMNS)
    targets, temperature = torch.randint(NUM_COLUMNS, (3, 5)), torch.rand(3, 5) + 0.5
    mask = torch.rand(3, 5) > 0.3

    def run(hidden, targets, bias, temperature, mask, op, **options):
        return torch.stack(list(op(hidden, weight, targets, bias=bias, temperature=temperature, **options))[:4]) * mask

    def fused(*operands):
        options = {"row_mask": operands[4], "with_argmax": True, "backend": backend}
        return run(*operands, linear_token_stats, **options)

    operands = hidden, targets, bias, temperature, mask
    close(torch.vmap(fused)(*operands), torch.vmap(lambda *operands: run(*operands, plain_linear))(*operands))


def test_argmax_under_vmap(backend):
    logits, targets = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.int64)
    stats = torch.vmap(
        lambda *operands: token_stats(*operands, with_argmax=True, with_entropy=False, backend=backend)[4:]
    )
    argmax, max_logit = stats(logits, targets)
    assert torch.equal(argmax, logits.argmax(dim=-1))
    close(max_logit, logits.amax(dim=-1))


def test_a_transform_inside_torch_compile(loss):
    torch._dynamo.reset()
    case = linear_case(5, NUM_COLUMNS, 8)
    compiled = torch.compile(torch.func.grad(loss), backend="aot_eager")
    close(
        compiled(case.hidden, case.weight, case.targets),
        torch.func.grad(plainly)(case.hidden, case.weight, case.targets),
    )


REFUSED = r"no forward-mode derivatives"


def test_forward_mode_is_refused(loss):
    case = linear_case(5, NUM_COLUMNS, 8)

    def of_hidden(hidden):
        return loss(hidden, case.weight, case.targets)

    def of_weight(weight):
        return loss(case.hidden, weight, case.targets)

    for function, tensor in ((of_hidden, case.hidden), (of_weight, case.weight)):
        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),))
        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.func.jacfwd(function)(tensor)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REFUSED):
            function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REFUSED):
            function(forward_ad.make_dual(tensor.clone().requires_grad_(), torch.ones_like(tensor)))
        with pytest.raises((NotImplementedError, RuntimeError), match=f"{REFUSED}|first gradients only"):
            torch.func.hessian(function)(tensor)
        with pytest.raises(RuntimeError, match="first gradients only"):
            torch.func.grad(lambda x, function=function: torch.func.grad(function)(x).sum())(tensor)
        with pytest.raises(RuntimeError, match="first gradients only"):
            torch.func.jacrev(torch.func.jacrev(function))(tensor)


@pytest.mark.parametrize("name", ["bias", "temperature"])
def test_forward_mode_of_other_arguments_is_refused(backend, name):
    case = linear_case(5, NUM_COLUMNS, 8)
    tensor = torch.ones(NUM_COLUMNS if name == "bias" else 5)
    for function in (by_stats, by_loss):

        def of(value, function=function):
            return function(case.hidden, case.weight, case.targets, **{name: value}, backend=backend)

        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.func.jvp(of, (tensor,), (tensor,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REFUSED):
            of(forward_ad.make_dual(tensor, tensor))


def test_a_tangent_inside_the_loss_function(backend):
    case = linear_case(5, NUM_COLUMNS, 8)
    advantage = torch.ones(5)

    def of(advantage):
        return linear_token_loss(
            case.hidden, case.weight, case.targets, lambda stats, rows: advantage[rows] * stats.logprob, backend=backend
        ).loss

    # It reaches the loss by a way of its own, or is refused; it is not lost.
    _, tangent = torch.func.jvp(of, (advantage,), (advantage,))
    close(tangent, plain_stats(case.hidden @ case.weight.T, case.targets).logprob.sum())
    for hidden in (case.hidden, case.hidden.requires_grad_()):
        case = case._replace(hidden=hidden)
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="loss_fn"):
            of(forward_ad.make_dual(advantage, advantage))


def test_no_tangent_no_refusal(loss):
    case = linear_case(5, NUM_COLUMNS, 8)
    with forward_ad.dual_level():
        close(loss(case.hidden, case.weight, case.targets), plainly(case.hidden, case.weight, case.targets))


def test_main_grad_under_a_transform_is_refused():
    case = linear_case(5, NUM_COLUMNS, 8)
    loss = functools.partial(by_loss, main_grad=torch.zeros(NUM_COLUMNS, 8))
    with pytest.raises(ValueError, match="main_grad gets the weight's gradient in the forward pass"):
        torch.func.grad(loss)(case.hidden, case.weight, case.targets)
