"""The benchmark of the sandbox: programs a second, and the comparison with attackers among them."""

import pytest

from bench import sandbox as benchmark
from repirl.verify.sandbox import KINDS


def test_programs_are_timed_on_the_kinds_that_are_here(capsys):
    assert benchmark.main(["--rounds", "2", "--programs", "2", "--tasks", "program,test"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert {line.split()[0] for line in lines} == set(KINDS)
    assert any(float(line.split()[2]) > 0 for line in lines if "not on this machine" not in line)


def test_attackers_among_programs_are_counted(capsys):
    assert benchmark.main(["--mixed", "40"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "not on this machine" not in line]
    assert told
    for line in told:
        assert line.endswith("38 programs, 2 attackers among them: 0 verdicts differ, 0 attackers pass")


def test_a_kind_that_there_is_not_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--kinds", "jail"])
    assert "--kinds names 'jail', expected some of bubblewrap, namespaces, landlock" in capsys.readouterr().err
