"""Each benchmark of answers: a row of each public format, and what its grader says."""

import json

import pytest

from repirl.data.errors import DataError
from repirl.dataconfig import SourceConfig
from repirl.evals import BENCHMARKS
from repirl.evals.benchmark import read_problems
from repirl.evals.minerva import grade as minerva_grade
from repirl.evals.olympiadbench import grade as olympiad_grade
from repirl.evals.tolerance import is_close

BOXED = "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}."


def read(path, name, row):
    path.write_text(json.dumps(row) + "\n")
    [problem] = read_problems(BENCHMARKS[name], SourceConfig(path=str(path)))
    return problem


@pytest.mark.parametrize(
    ("name", "row", "answer", "given"),
    [
        ("gsm8k", {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, "1+1=<<1+1=2>>2\n#### 2", "0"),
        ("math500", {"problem": "1+1?", "solution": "\\boxed{2}", "answer": "2", "unique_id": "a/1"}, "2", "a/1"),
        ("math500", {"problem": "1+1?", "solution": "it is \\boxed{2}"}, "it is \\boxed{2}", "0"),
        ("aime", {"ID": "2024-I-1", "Problem": "1+1?", "Solution": "", "Answer": 2}, "2", "2024-I-1"),
        ("aime", {"id": 60, "problem": "1+1?", "solution": "", "answer": "002"}, "002", "60"),
        ("amc", {"id": 0, "problem": "1+1?", "answer": 2.0}, "2.0", "0"),
        ("minerva", {"idx": 4, "problem": "1+1?", "solution": "\\boxed{2}", "type": "x"}, "\\boxed{2}", "4"),
        ("minerva", {"question": "1+1?", "answer": "2"}, "2", "0"),
    ],
)
def test_rows_of_public_formats_are_read(tmp_path, name, row, answer, given):
    problem = read(tmp_path / "a.jsonl", name, row)
    assert (problem.id, problem.prompt, problem.answer) == (given, BOXED, answer)


def test_olympiadbench_says_how_to_write_the_answer(tmp_path):
    row = {"id": 1606, "question": "Solve $x^2=4$.", "final_answer": ["$2,-2$"], "is_multiple_answer": True}
    row |= {"context": None, "unit": None, "error": None, "answer_type": "Numerical"}
    problem = read(tmp_path / "a.jsonl", "olympiadbench", row)
    assert (problem.id, problem.answer) == ("1606", "$2,-2$")
    assert problem.prompt == (
        "Solve $x^2=4$.\nPlease reason step by step, and end your solution with "
        '"So the final answer is \\boxed{multiple answers connected with commas}.", in LaTeX.'
    )
    row |= {"context": "A ball falls.", "unit": "m", "error": "1e-1", "is_multiple_answer": False}
    problem = read(tmp_path / "a.jsonl", "olympiadbench", row | {"final_answer": ["2.5"]})
    assert problem.prompt.startswith("A ball falls.\nSolve")
    assert problem.prompt.endswith('\\boxed{answer}.", in LaTeX. Leave the unit out of \\boxed{}.')
    assert problem.answer == "2.5 +- 1e-1"
    with pytest.raises(DataError, match="'error' is 'little', expected a number"):
        read(tmp_path / "a.jsonl", "olympiadbench", row | {"error": "little"})


def test_olympiadbench_allows_for_the_error_of_the_data():
    assert olympiad_grade("\\boxed{2.58}", "2.5 +- 1e-1") == 1.0
    assert olympiad_grade("\\boxed{2.61}", "2.5 +- 1e-1") == 0.0
    assert olympiad_grade("\\boxed{2.58}", "2.5") == 0.0
    assert olympiad_grade("\\boxed{-2, 2}", "$2,-2$") == 1.0
    # An error for each of two answers, whose order does not matter.
    assert olympiad_grade("\\boxed{3.05, 10.5}", "$10,3$ +- 1,0.1") == 1.0
    assert olympiad_grade("\\boxed{3.5, 10.05}", "$10,3$ +- 1,0.1") == 0.0
    assert olympiad_grade("\\boxed{x+1}", "$1+x$ +- 1") == 1.0
    assert olympiad_grade("\\boxed{}", "2.5 +- 1e-1") == 0.0


def test_minerva_allows_for_rounding():
    assert minerva_grade("\\boxed{3.0833}", "3.08333") == 1.0
    assert minerva_grade("\\boxed{3.08}", "3.08333") == 0.0
    assert minerva_grade("\\boxed{2.19001 \\times 10^6}", "so \\boxed{2.19e6}") == 1.0
    assert minerva_grade("\\boxed{\\frac{1}{3}}", "0.33333") == 1.0
    assert minerva_grade("\\boxed{x^2+1}", "1+x^2") == 1.0
    assert minerva_grade("no answer", "3") == 0.0


def test_numbers_near_each_other_are_as_many():
    assert is_close("\\boxed{1,000}", "1000", absolute="0")
    assert not is_close("\\boxed{1, 2}", "1", absolute="1")
    assert not is_close("\\boxed{a}", "1", absolute="1")
    assert not is_close("\\boxed{" + "1" * 600 + "}", "1", absolute="1")
