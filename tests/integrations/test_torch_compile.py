"""kernels/README.md, "A plain loop under `torch.compile`": the parameters that plain PyTorch arrives at."""

import copy
import shutil

import pytest
import torch
from readme_sections import run_section
from torch import nn

HEADING = "A plain loop under `torch.compile`"
NUM_TOKENS, VOCABULARY, WIDTH = 12, 499, 32


def make_model() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    return model, nn.Linear(WIDTH, VOCABULARY, bias=False)


def plain_loss(model, head, tokens, advantage, old_logprob):
    logprobs = torch.log_softmax(head(model(tokens[:, :-1])) / 0.8, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    ratio = torch.exp(logprobs.gather(-1, tokens[:, 1:, None])[..., 0] - old_logprob)
    return -(ratio * advantage[:, None] + 0.01 * entropy).mean()


@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)
def test_compiled_loop_equals_plain_pytorch():
    section = run_section(HEADING)
    model, head = make_model()
    plain_model, plain_head = copy.deepcopy(model), copy.deepcopy(head)
    start = copy.deepcopy(head.weight.detach())
    batches = [
        (torch.randint(0, VOCABULARY, (size, NUM_TOKENS)), torch.randn(size), torch.full((size, NUM_TOKENS - 1), -6.2))
        for size in (4, 7, 5)
    ]

    section.train(model, head, torch.optim.SGD([*model.parameters(), *head.parameters()], lr=1.0), batches)
    optimizer = torch.optim.SGD([*plain_model.parameters(), *plain_head.parameters()], lr=1.0)
    for batch in batches:
        plain_loss(plain_model, plain_head, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert (head.weight - start).abs().max() > 1e-2
    parameters = zip([*model.parameters(), head.weight], [*plain_model.parameters(), plain_head.weight], strict=True)
    for parameter, expected in parameters:
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
