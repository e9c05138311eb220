"""The example in kernels/README.md is short, and runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_readme_example_runs_with_torch_alone():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    # Nothing but torch beside the package: none of these may be a dependency.
    check = example + (
        "\nassert stats.logprob[5] == 0 and hidden.grad[5].abs().sum() == 0"
        "\nassert hidden.grad.isfinite().all() and weight.grad.isfinite().all() and hidden.grad.norm() > 0"
        "\nimport sys"
        "\nassert not {'repirl', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "nan" not in result.stdout
