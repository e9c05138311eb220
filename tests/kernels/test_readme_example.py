"""The examples in kernels/README.md are short; those of the package alone run here, others in tests/integrations."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from kernel_checks import linear_case
from repirl_kernels import linear_token_stats

README = Path(__file__).parents[2] / "kernels" / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_examples_are_short():
    lengths = [len([line for line in block.splitlines() if line.strip()]) for block in python_blocks()]
    assert len(lengths) > 1
    assert max(lengths) <= 15


def test_readme_example_runs_with_torch_alone():
    # Nothing but torch beside the package: none of these may be a dependency.
    check = python_blocks()[0] + (
        "\nassert stats.logprob[5] == 0 and hidden.grad[5].abs().sum() == 0"
        "\nassert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and hidden.grad.norm() > 0"
        "\nimport sys"
        "\nassert not {'repirl', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout


def test_linear_token_loss_example_equals_linear_token_stats():
    (block,) = [block for block in python_blocks() if "def policy_step" in block]
    namespace: dict = {}
    exec(block, namespace)
    case = linear_case(12, 90, 8)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    case.targets[3] = -100
    old_logprob, advantage = torch.randn(12) - 4.5, torch.randn(12)
    token_loss, stats = namespace["policy_step"](hidden, weight, case.targets, old_logprob, advantage, 11)
    expected = linear_token_stats(hidden, weight, case.targets)
    losses = -(torch.exp(expected.logprob - old_logprob) * advantage + 0.01 * expected.entropy) / 11
    losses = losses * (case.targets != -100)
    torch.testing.assert_close(token_loss, losses)
    torch.testing.assert_close(stats.entropy, expected.entropy)
    gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    torch.testing.assert_close(hidden.grad, gradients[0])
    torch.testing.assert_close(weight.grad, gradients[1])
