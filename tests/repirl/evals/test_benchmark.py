"""What a benchmark makes of a row, and which rows it refuses."""

import json
from dataclasses import replace

import pytest

from repirl.data.errors import DataError
from repirl.dataconfig import SourceConfig
from repirl.evals import BENCHMARKS, Benchmark, Problem, Sampling
from repirl.evals.benchmark import read_problems

PLAIN = Benchmark(
    name="plain",
    source="nobody/plain",
    columns={"problem": ("question", "problem"), "answer": ("answer",), "id": ("id",)},
    prompt="Q: {problem} {other}\nA:",
    grader="math",
    sampling=Sampling(samples=1),
    stop=("\nQ:", "\n\n"),
)


def read(path, rows, benchmark=PLAIN):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_problems(benchmark, SourceConfig(path=str(path))))


def test_a_row_becomes_a_problem(tmp_path):
    rows = [{"question": "{answer}?", "problem": "no", "answer": 3}, {"problem": "1+1", "answer": "#### 2", "id": 7}]
    assert read(tmp_path / "a.jsonl", rows) == [
        Problem("0", "Q: {answer}? {other}\nA:", "3", "{answer}?"),
        Problem("7", "Q: 1+1 {other}\nA:", "#### 2", "1+1"),
    ]
    by_function = replace(PLAIN, prompt=lambda fields, place: fields["problem"] * 2)
    assert read(tmp_path / "a.jsonl", rows[1:], by_function)[0].prompt == "1+11+1"


def test_a_response_ends_before_the_first_stop():
    assert PLAIN.until_stop("5\n\nQ: 2\nQ: 3") == ("5", True)
    assert PLAIN.until_stop("5") == ("5", False)
    assert BENCHMARKS["gsm8k"].until_stop("5\n\n6") == ("5\n\n6", False)


def test_rows_that_are_no_problems_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=r"line 1 has no column 'question' or 'problem', .*reads the format of nobody"):
        read(path, [{"answer": "1"}])
    with pytest.raises(DataError, match="line 1: 'problem' holds an empty text"):
        read(path, [{"problem": " ", "answer": "1"}])
    with pytest.raises(DataError, match="line 1: 'answer' is null"):
        read(path, [{"problem": "1", "answer": None}])
    with pytest.raises(DataError, match="line 2: its id '1' is that of line 1, too"):
        read(path, [{"problem": "1", "answer": "1", "id": i} for i in (1, "1")])
