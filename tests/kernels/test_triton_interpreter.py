"""Runs ``triton_interpreter_cases.py`` in a process whose Triton interprets its kernels on CPU tensors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import needs_interpreter

CASES = Path(__file__).with_name("triton_interpreter_cases.py")


@needs_interpreter
@pytest.mark.timeout(900)
def test_triton_kernels_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # A path given by name is collected although its name does not start with test_.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", os.fspath(CASES)]
    result = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    counts = dict(re.findall(r"(\d+) (passed|failed|skipped|error|xfailed)", output.splitlines()[-1])[::-1])
    passed = {word: int(number) for number, word in counts.items()}
    print(f"under the interpreter: {passed}")
    assert set(passed) == {"passed"}, output
