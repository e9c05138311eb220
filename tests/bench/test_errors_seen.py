"""The wrong steps that a PRM is judged on are of the kinds that the page names."""

from bench.errors_seen import KINDS, judge, wrong_solutions
from repirl.data.tasks.arithmetic import run


def results(solution):
    return [int(line.partition("=")[2].rstrip("; ")) for line in solution.lines[:-1]]


def test_wrong_steps_are_what_they_are_called():
    solutions = wrong_solutions(seed=3, count=120)
    for solution in solutions["right"]:
        assert results(solution) == run(solution.problem.start, solution.problem.steps)
    for kind in KINDS:
        assert len(solutions[kind]) > 10
        for solution in solutions[kind]:
            values, right = results(solution), run(solution.problem.start, solution.problem.steps)
            step = next(i for i, (value, expected) in enumerate(zip(values, right, strict=True)) if value != expected)
            assert step == solution.error_step
            shift = values[step] - right[step]
            if kind == "lost tens":
                before = right[step - 1] if step else solution.problem.start
                assert shift == (-10 if right[step] > before else 10)
                assert right[step] // 10 != before // 10
            else:
                assert abs(shift) in ((1, 2) if kind == "off by 1 or 2" else (10,))


def test_a_prm_that_sees_one_kind_is_judged_so(monkeypatch):
    solutions = wrong_solutions(seed=4, count=60)

    def scored(prm, given):
        is_seen = given is solutions["lost tens"]
        return [([-float(is_seen and i == s.error_step) for i in range(len(s.lines) - 1)], []) for s in given]

    monkeypatch.setattr("bench.errors_seen.score_solutions", scored)
    assert judge(None, solutions) == {"lost tens": 1.0, "off by 1 or 2": 0.5, "off by 10": 0.5}
