"""Data sets of our own in public formats: they are read as these, repeat, and have the errors that they name."""

import json

import pytest

from repirl.config import ConfigError
from repirl.data.tasks.arithmetic import expert_solution, problems
from repirl.dataconfig import SourceConfig
from repirl.evals import BENCHMARKS
from repirl.evals.benchmark import read_problems
from repirl.evals.own import main, write_gsm8k, write_prmbench, write_processbench
from repirl.evals.prmbench import read_prmbench
from repirl.evals.processbench import read_processbench
from repirl.verify.math import plain_reward


def holds(step):
    """Whether an equation of the task holds; the line with the answer says nothing of it."""
    left, _, right = step.partition("=")
    return step.startswith("####") or eval(left) == int(right)


def test_problems_are_those_of_gsm8ks_format(tmp_path):
    write_gsm8k(tmp_path / "a.jsonl", 1, 5)
    read = list(read_problems(BENCHMARKS["gsm8k"], SourceConfig(path=str(tmp_path / "a.jsonl"))))
    drawn = [problem for problem, _ in zip(problems(1, (4, 5)), range(5), strict=False)]
    assert [problem.text for problem in read] == [problem.prompt for problem in drawn]
    for mine, problem in zip(read, drawn, strict=True):
        assert plain_reward(expert_solution(problem).text, mine.answer) == 1.0


def test_planted_errors_are_where_the_label_says(tmp_path):
    for name in "ab":
        write_processbench(tmp_path / f"{name}.jsonl", 3, 40)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    cases = read_processbench(SourceConfig(path=str(tmp_path / "a.jsonl")))
    assert len(cases) == 40
    assert sum(bool(case.wrong) for case in cases) == 20
    for case in cases:
        # Lines after a planted error go on from the wrong number.
        assert [i for i, step in enumerate(case.steps) if not holds(step)] == [*case.wrong]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(row["final_answer_correct"] == (row["label"] == -1) for row in rows)


def test_steps_that_are_said_twice_are_redundant(tmp_path):
    write_prmbench(tmp_path / "a.jsonl", 3, 40)
    cases = read_prmbench(SourceConfig(path=str(tmp_path / "a.jsonl")))
    kinds = [case.classification for case in cases]
    assert {kind: kinds.count(kind) for kind in kinds} == {"redundency": 20, "correct": 20, "counterfactual": 20}
    for case in cases:
        wrong = [i for i, step in enumerate(case.steps) if not holds(step)]
        twice = [i for i in range(1, len(case.steps)) if case.steps[i] == case.steps[i - 1]]
        assert [*case.wrong] == (twice if case.classification == "redundency" else wrong)


def test_the_command_writes_and_refuses(tmp_path, capsys):
    path = str(tmp_path / "new" / "a.jsonl")
    assert main(["processbench", path, "--num", "4", "--seed", "1"]) == 0
    assert "4 rows in the format of processbench" in capsys.readouterr().out
    assert main(["processbench", path]) == 2
    assert "exists already: choose another file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--num is 0, expected at least 1"):
        write_gsm8k(tmp_path / "b.jsonl", num=0)
