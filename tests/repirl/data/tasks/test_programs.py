"""The generated programs: experts pass their tests, planted errors do not, and every program has its tokens."""

import random
from contextlib import closing
from itertools import islice

import pytest

from repirl.data.tasks import programs
from repirl.options import VerifierConfig
from repirl.verify.choose import make_verifier

TOKENIZER = programs.build_tokenizer()


@pytest.fixture(scope="module")
def made():
    return list(islice(programs.problems(3, (3, 4)), 60))


def solutions(made):
    rng = random.Random(0)
    for problem in made:
        yield programs.expert_solution(problem)
        yield programs.sloppy_solution(problem, rng, 1.0)
        yield programs.planted_error(problem, rng)


def test_the_verifier_agrees_with_the_generator(made):
    rows = list(solutions(made[:20]))
    with closing(make_verifier(VerifierConfig(kind="code", processes=2, code={"test_seconds": 60.0}))) as verifier:
        verdicts = verifier.judge([(row.text, row.problem.answer) for row in rows])
    assert verdicts[0::3] == [1.0] * 20
    assert verdicts[2::3] == [0.0] * 20
    for row, verdict in zip(rows[1::3], verdicts[1::3], strict=True):
        assert verdict == 1 or row.error_step is not None


def test_only_the_planted_line_differs(made):
    for problem in made:
        wrong = programs.planted_error(problem, random.Random(1))
        right = programs.expert_solution(problem).lines
        assert [i for i, line in enumerate(wrong.lines) if line != right[i]] == [wrong.error_step]


def test_students_make_mistakes_where_they_can(made):
    rng = random.Random(0)
    assert all(programs.sloppy_solution(p, rng, 0.0).error_step is None for p in made)
    slips = [programs.sloppy_solution(p, rng, 1.0).error_step is not None for p in made]
    can = [any(step.operation.mistaken for step in p.steps) for p in made]
    assert slips == can
    assert 0.4 < sum(can) / len(can) < 0.9


def test_every_text_is_made_of_known_tokens(made):
    for row in solutions(made):
        text = row.problem.prompt + row.text
        ids = TOKENIZER(text).input_ids
        assert TOKENIZER.unk_token_id not in ids
        assert TOKENIZER.decode(ids) == text
        # Lines can be scored apart.
        assert [i for line in row.lines for i in TOKENIZER(line).input_ids] == TOKENIZER(row.text).input_ids
    assert TOKENIZER("import").input_ids == [TOKENIZER.unk_token_id] * len("import")


def test_problems_are_distinct_and_depend_on_the_seed(made):
    assert len({problem.prompt for problem in made}) == len(made)
    assert list(islice(programs.problems(3, (3, 4)), 60)) == made
    assert list(islice(programs.problems(4, (3, 4)), 60)) != made
