"""The examples in kernels/README.md are short, and the first runs as it stands; tests/integrations runs the others."""

import re
import subprocess
import sys
from pathlib import Path

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
