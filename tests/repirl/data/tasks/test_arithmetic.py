"""The demo's task: an expert that never errs, errors that stand where they are said to stand."""

import random
import re
from itertools import islice

from repirl.data.tasks.arithmetic import (
    LARGEST,
    build_tokenizer,
    expert_solution,
    planted_error,
    problems,
    sloppy_solution,
)
from repirl.verify.math import math_reward


def steps_of(solution):
    """[(left, operator, right, result)] as written."""
    return [
        (int(a), op, int(b), int(c))
        for a, op, b, c in re.findall(r"(\d+)([+-])(\d+)=(\d+); ", "".join(solution.lines[:-1]))
    ]


def is_right(a, op, b, result):
    return result == (a + b if op == "+" else a - b)


def test_problems_are_distinct_repeatable_and_in_range():
    first, again = (list(islice(problems(3, (2, 4)), 300)) for _ in range(2))
    assert first == again
    assert len(set(first)) == 300
    assert {len(p.steps) for p in first} == {2, 3, 4}
    assert first[:50] != list(islice(problems(4, (2, 4)), 50))
    for problem in first:
        assert all(0 <= c <= LARGEST for *_, c in steps_of(expert_solution(problem)))


def test_the_expert_is_right_in_every_step():
    for problem in islice(problems(0, (3, 5)), 200):
        solution = expert_solution(problem)
        steps = steps_of(solution)
        assert len(steps) == len(problem.steps)
        assert all(is_right(*step) for step in steps)
        assert [a for a, *_ in steps] == [problem.start, *(c for *_, c in steps[:-1])]
        assert math_reward(solution.text, problem.answer) == 1.0
        # Python's own reading of the prompt is the answer.
        assert str(eval(problem.prompt[:-1])) == problem.answer


def test_a_planted_error_is_the_first_and_only_wrong_step():
    rng = random.Random(0)
    for problem in islice(problems(0, (3, 5)), 200):
        solution = planted_error(problem, rng)
        right = [is_right(*step) for step in steps_of(solution)]
        assert right.count(False) == 1
        assert right.index(False) == solution.error_step
        assert math_reward(solution.text, problem.answer) == 0.0


def test_a_sloppy_student_slips_only_where_a_ten_is_carried():
    rng, slips, crossings = random.Random(0), 0, 0
    for problem in islice(problems(0, (3, 5)), 400):
        solution = sloppy_solution(problem, rng, 0.5)
        right = [is_right(*step) for step in steps_of(solution)]
        assert solution.error_step == (right.index(False) if False in right else None)
        for (a, op, b, result), fine in zip(steps_of(solution), right, strict=True):
            true = a + b if op == "+" else a - b
            crossings += true // 10 != a // 10
            if not fine:
                slips += 1
                assert true // 10 != a // 10
                assert result == (true - 10 if op == "+" else true + 10)
    assert 0.25 < slips / crossings < 0.5
    neat = [sloppy_solution(p, rng, 0.0) for p in islice(problems(0, (3, 5)), 50)]
    assert all(s.error_step is None and s.text == expert_solution(s.problem).text for s in neat)


def test_tokenizer_round_trips():
    tokenizer = build_tokenizer()
    for problem in islice(problems(0, (3, 5)), 50):
        text = problem.prompt + expert_solution(problem).text
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("1a").input_ids[1] == tokenizer.unk_token_id
