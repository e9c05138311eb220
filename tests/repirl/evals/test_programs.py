"""Benchmarks of programs: rows of each public format, what is asked, and what the tests say of right and wrong ones."""

import gzip
import json
from contextlib import closing

import pytest
from tiny import make_model

from repirl.apps.judge import verifier_config
from repirl.cli import main
from repirl.dataconfig import SourceConfig
from repirl.evals import BENCHMARKS
from repirl.evals.benchmark import read_problems
from repirl.verify.choose import make_verifier

HEAD = (
    'from typing import List\n\ndef double(xs: List[int]) -> List[int]:\n    """ Each number twice as large.\n    """\n'
)
CHECK = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": HEAD, "entry_point": "double", "test": CHECK, "canonical_solution": ""}
MBPP = {
    "task_id": 2,
    "text": "Write a function to double each number.",
    "test_list": ["assert double([1, 2]) == [2, 4]", "assert double([]) == []"],
    "test_setup_code": "",
}
LIVE = {
    "question_id": "abc_1",
    "question_content": "Double each number.",
    "starter_code": "class Solution:\n    def double(self, xs: List[int]) -> List[int]:\n        ",
    "public_test_cases": json.dumps([{"input": "[1, 2]", "output": "[2, 4]", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "[]", "output": "[]", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "double"}),
}
RIGHT = "def double(xs):\n    return [2 * x for x in xs]\n"


def read(path, name, row):
    path.write_text(json.dumps(row) + "\n")
    [problem] = read_problems(BENCHMARKS[name], SourceConfig(path=str(path)))
    return problem


@pytest.mark.parametrize(
    ("name", "row", "asked", "given"),
    [
        ("humaneval", HUMANEVAL, f"```python\n{HEAD}\n```", "HumanEval/0"),
        ("humaneval-base", HUMANEVAL, HEAD, "HumanEval/0"),
        ("mbpp", MBPP, "assert double([]) == []", "2"),
        (
            "mbpp",
            {"prompt": "Double.", "test_list": MBPP["test_list"], "test_imports": ["import math"]},
            "Double.",
            "0",
        ),
        ("livecodebench", LIVE, "def double(self, xs", "abc_1"),
    ],
)
def test_rows_of_public_formats_are_asked_and_judged(tmp_path, name, row, asked, given):
    benchmark, problem = BENCHMARKS[name], read(tmp_path / "a.jsonl", name, row)
    assert problem.id == given
    assert asked in problem.prompt
    solution = RIGHT
    if name == "livecodebench":
        solution = "class Solution:\n    def double(self, xs):\n        return [2 * x for x in xs]\n"
    responses = [f"It is:\n```python\n{solution}```\nDone.", f"```python\n{solution.replace('2', '3')}```", "No."]
    with closing(make_verifier(verifier_config(benchmark.grader))) as verifier:
        assert verifier.judge([(response, problem.answer) for response in responses]) == [1, 0, 0]
        kinds = [verifier.reasons[i].partition(":")[0] for i in range(3)]
    assert kinds == ["passed", "wrong answer", "no code found"]
    assert kinds[2:] == [*benchmark.unreadable]


def test_a_base_model_goes_on_from_the_head_until_something_else_begins(tmp_path):
    benchmark, problem = BENCHMARKS["humaneval-base"], read(tmp_path / "a.jsonl", "humaneval-base", HUMANEVAL)
    text, ended = benchmark.until_stop("    return [2 * x for x in xs]\n\nprint(double(1 / 0))\n")
    assert (text, ended) == ("    return [2 * x for x in xs]\n", True)
    with closing(make_verifier(verifier_config("code"))) as verifier:
        assert verifier.judge([(text, problem.answer)]) == [1]


def test_a_model_is_asked_on_the_command_line(tmp_path, capsys):
    model = make_model(tmp_path / "policy")
    rows = [HUMANEVAL | {"prompt": f'def f(x):\n """{i}"""\n', "entry_point": "f", "task_id": str(i)} for i in range(2)]
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--data", str(tmp_path / "HumanEval.jsonl.gz"), "--model", str(model), "--prompt", "{problem}"]
    arguments += ["--samples", "2", "--max-response-tokens", "4", "--timeout", "60"]
    assert main(["eval", "--benchmark", "humaneval", *arguments, "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["figures"]) == ["greedy pass@1", "avg@2", "pass@2"]
    assert result["sampled"]["unreadable"] == 4
    assert "humaneval: 2 problems" in capsys.readouterr().out
