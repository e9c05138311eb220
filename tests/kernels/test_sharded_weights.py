"""The linear ops on sharded weights: FSDP2 with a fused head, tied embeddings, DTensors; 2 and 3 gloo ranks.

A small language model of 257 tokens, which neither 2 nor 3 divide, against the same model in one process without
fused ops, in float64. Ranks have unequal numbers of tokens, the third rank none.
"""

import pytest
import torch
import torch.distributed as dist
from kernel_checks import LinearCase, linear_case, plain_stats, run_linear
from rank_processes import rank_processes
from repirl_kernels import linear_token_loss, linear_token_stats
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

NUM_COLUMNS = 257
NUM_FEATURES = 16
NUM_TOKENS = 23
TOKENS_OF_RANK = {2: [14, 9], 3: [14, 9, 0]}
OPS = ["stats", "loss"]


class FusedHead(nn.Linear):
    """``lm_head`` that returns a loss, so that no logits exist; its weight is whole while this forward runs."""

    def forward(self, hidden: Tensor, targets: Tensor, coefficients: Tensor, op: str) -> Tensor:
        if op == "stats":
            stats = linear_token_stats(hidden, self.weight, targets)
            return (coefficients * torch.stack(list(stats))).sum()

        def loss_fn(stats, rows):
            return (coefficients[:, rows] * torch.stack(list(stats))).sum(dim=0)

        return linear_token_loss(hidden, self.weight, targets, loss_fn).loss


class Model(nn.Module):
    """Embedding, two layers, head; its forward is the loss ``sum(coefficients [4, N] * statistics)``."""

    def __init__(self, tied: bool, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(NUM_COLUMNS, NUM_FEATURES)
        self.layers = nn.ModuleList(nn.Linear(NUM_FEATURES, NUM_FEATURES) for _ in range(2))
        self.lm_head = FusedHead(NUM_FEATURES, NUM_COLUMNS, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight
        self.tied = tied
        self.checkpointed = checkpointed

    def body(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden

    def forward(self, tokens: Tensor, targets: Tensor, coefficients: Tensor, op: str) -> Tensor:
        hidden = self.body(tokens)
        if self.checkpointed:
            return checkpoint(self.lm_head, hidden, targets, coefficients, op, use_reentrant=False)
        return self.lm_head(hidden, targets, coefficients, op)


def tokens_and_coefficients() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(NUM_COLUMNS, (NUM_TOKENS,), generator=generator)
    targets = torch.randint(NUM_COLUMNS, (NUM_TOKENS,), generator=generator)
    return tokens, targets, torch.randn(4, NUM_TOKENS, generator=generator)


def one_process(tied: bool, num_steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Without fused ops, in float64: the first step's gradients, and the parameters after all steps."""
    model = Model(tied).double()
    tokens, targets, coefficients = tokens_and_coefficients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    gradients: dict[str, Tensor] = {}
    for step in range(num_steps):
        logits = model.body(tokens) @ model.lm_head.weight.T
        loss = (coefficients * torch.stack(list(plain_stats(logits, targets)))).sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
    return gradients, {name: parameter.detach() for name, parameter in model.named_parameters()}


def fsdp_steps(
    group: dist.ProcessGroup, tied: bool, op: str, checkpointed: bool, reshard: bool, bfloat16: bool, num_steps: int
):
    """On a rank: what :func:`one_process` returns, from shards put together."""
    mesh = DeviceMesh.from_group(group, "cpu")
    model = Model(tied, checkpointed)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bfloat16 else None
    options = {"mesh": mesh, "reshard_after_forward": reshard} | ({"mp_policy": policy} if policy else {})
    for layer in model.layers:
        fully_shard(layer, **options)
    if not tied:  # tied weights belong to one unit, the root's
        fully_shard(model.lm_head, **options)
    fully_shard(model, **options)
    sizes = TOKENS_OF_RANK[group.size()]
    tokens, targets, coefficients = (tensor.split(sizes, dim=-1)[group.rank()] for tensor in tokens_and_coefficients())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    gradients: dict[str, Tensor] = {}
    for step in range(num_steps):
        # Gradients are averaged over ranks, the loss is a sum.
        loss = model(tokens, targets, coefficients, op) * group.size()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                assert isinstance(parameter.grad, DTensor)
                assert parameter.grad.to_local().shape[0] < parameter.shape[0]
                gradients[name] = parameter.grad.full_tensor()
        optimizer.step()
    return gradients, {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def ranks():
    with rank_processes() as processes:
        yield processes


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("reshard", [False, True], ids=["", "resharded"])
def test_fsdp_steps_equal_one_process(ranks, num_ranks, op, tied, checkpointed, reshard):
    expected = one_process(tied, 3)
    for actual in ranks.run(num_ranks, fsdp_steps, tied, op, checkpointed, reshard, False, 3):
        for values, truths in zip(actual, expected, strict=True):
            assert values.keys() == truths.keys()
            for name, truth in truths.items():
                error = (values[name].double() - truth).abs().max() / truth.abs().max()
                assert error < 3e-6, f"{name}: {error:.2g}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_fsdp_in_bfloat16(ranks, op, tied):
    gradients, _ = one_process(tied, 1)
    for actual, _ in ranks.run(3, fsdp_steps, tied, op, False, True, True, 1):
        for name, truth in gradients.items():
            assert actual[name].dtype == torch.float32
            error = (actual[name].double() - truth).norm() / truth.norm()
            assert error < 2e-2, f"{name}: {error:.2g}"


def dtensor_gradients(group: dist.ProcessGroup, case: LinearCase, how: str):
    """On a rank: statistics and dH with a weight ``Shard(0)``, and the DTensor gradient of that, whole."""
    mesh = DeviceMesh.from_group(group, "cpu")
    hidden = case.hidden.clone().requires_grad_()
    weight = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    if how == "gathered":
        stats = linear_token_stats(hidden, weight.full_tensor(), case.targets)
    else:
        stats = linear_token_stats(hidden, weight.to_local(), case.targets, tp_group=mesh.get_group())
    stats = torch.stack(list(stats))
    stats.backward(case.upstream)
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements
    return stats.detach(), hidden.grad, weight.grad.full_tensor()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("how", ["gathered", "vocabulary-parallel"])
@pytest.mark.parametrize("num_columns", [NUM_COLUMNS, 4, 1])  # 4 columns on 3 ranks: 2, 2 and none
def test_dtensor_weights(ranks, num_ranks, how, num_columns):
    case = linear_case(9, num_columns, NUM_FEATURES)
    expected = run_linear(linear_token_stats, case)
    for stats, dhidden, dweight in ranks.run(num_ranks, dtensor_gradients, case, how):
        torch.testing.assert_close(stats, expected.stats, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dhidden, expected.dhidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dweight, expected.dweight, rtol=1e-5, atol=1e-5)


def data_parallel_gradient(group: dist.ProcessGroup, case: LinearCase):
    """On a rank: the gradient of a gathered DTensor weight where each rank has rows of its own."""
    weight = distribute_tensor(case.weight, DeviceMesh.from_group(group, "cpu"), [Shard(0)]).requires_grad_()
    mine = torch.arange(group.rank(), case.targets.shape[0], group.size())
    # Without Partial() torch takes the ranks' gradients for copies of one, and sums nothing.
    whole = weight.full_tensor(grad_placements=[Partial()])
    stats = torch.stack(list(linear_token_stats(case.hidden[mine], whole, case.targets[mine])))
    stats.backward(case.upstream[:, mine])
    return weight.grad.full_tensor()


def test_a_gathered_dtensor_with_rows_of_each_ranks_own(ranks):
    case = linear_case(10, NUM_COLUMNS, NUM_FEATURES)
    expected = run_linear(linear_token_stats, case)
    for dweight in ranks.run(3, data_parallel_gradient, case):
        torch.testing.assert_close(dweight, expected.dweight, rtol=1e-5, atol=1e-5)


def refusal(group: dist.ProcessGroup, case: LinearCase):
    """On a rank: both ops' words about a DTensor."""
    weight = distribute_tensor(case.weight, DeviceMesh.from_group(group, "cpu"), [Shard(0)])
    messages = []
    for call in (
        lambda: linear_token_stats(case.hidden, weight, case.targets),
        lambda: linear_token_stats(case.hidden, weight, case.targets, tp_group=group),
        lambda: linear_token_loss(case.hidden, weight, case.targets, lambda stats, rows: -stats.logprob),
    ):
        with pytest.raises(TypeError) as raised:
            call()
        messages.append(str(raised.value))
    return messages


def test_a_dtensor_is_refused_with_what_to_do(ranks):
    for messages in ranks.run(2, refusal, linear_case(9, NUM_COLUMNS, NUM_FEATURES)):
        for message in messages:
            assert "weight is a DTensor" in message
            assert "weight.full_tensor()" in message
