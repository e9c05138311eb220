"""The wrong steps that a PRM is judged on are of the kinds that the page names."""

import json
import sys

from bench import errors_seen
from bench.errors_seen import KINDS, TAUGHT, judge, wrong_solutions
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


def test_the_page_has_rewards_and_probes_and_keeps_what_was_written_below(tmp_path, monkeypatch):
    computed = []

    def run_cell(folder, seed, turns):
        computed.append((turns, seed))
        probe = {"all layers": {name: dict.fromkeys(KINDS, 0.75 + 0.1 * seed) for name in TAUGHT}}
        return {"seed": seed, "turns": turns, "auroc": dict.fromkeys(KINDS, 0.5 + 0.1 * seed), "probe": probe}

    monkeypatch.setattr(errors_seen, "run_cell", run_cell)
    output = tmp_path / "out.json"
    arguments = ["errors_seen", "--turns", "0", "12", "--output", str(output), "--seeds"]
    monkeypatch.setattr(sys, "argv", [*arguments, "1"])
    errors_seen.main()
    output.write_text(json.dumps(json.loads(output.read_text()) | {"notes": ["Nothing is seen."]}))
    monkeypatch.setattr(sys, "argv", [*arguments, "2"])
    errors_seen.main()
    assert computed == [(0, 0), (12, 0), (0, 1), (12, 1)]
    lines = output.with_suffix(".md").read_text().splitlines()
    cells = " | ".join(["0.550 ± 0.050"] * 3)
    assert f"| `logprob`, start | 0, 1 | {cells} |" in lines
    assert f"| `value`, PRM after 12 turns | 0, 1 | {cells} |" in lines
    assert f"| start | 0, 1 | all layers | lost tens | {' | '.join(['0.800 ± 0.050'] * 3)} |" in lines
    assert lines[-1] == "Nothing is seen."
