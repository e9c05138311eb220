"""Programs are judged by what they write and return, and what goes wrong is counted by its kind."""

import json
from contextlib import closing

import pytest

from repirl.config import ConfigError
from repirl.options import VerifierConfig
from repirl.verify.choose import count_metrics, make_verifier
from repirl.verify.code_tests import Tests

SUMS = Tests("program", tuple({"input": f"{i} {i}\n", "outputs": [f"{2 * i}\n"]} for i in range(1, 5))).text()
CALLS = Tests("function", tuple({"args": [i], "kwargs": {}, "outputs": [i * i]} for i in (-1, 2)), "f").text()
ASSERTIONS = Tests("assertions", ("assert f(2) == 4", "assert f([]) == []"), "f").text()


def fenced(code):
    return f"```python\n{code}\n```"


def judged(pairs, **options):
    code = {"test_seconds": 20.0} | options.pop("code", {})
    config = VerifierConfig(kind="code", code=code, **{"processes": 2, "timeout_seconds": 60.0} | options)
    with closing(make_verifier(config)) as verifier:
        verdicts = verifier.judge(pairs)
        return verdicts, [verifier.reasons[i] for i in range(len(pairs))], verifier.counts


def test_reasons_are_told_and_counted_apart():
    programs = {
        "passed": "a, b = map(int, input().split())\nprint(a + b)",
        "wrong answer: test 2 of 4: '4.5'": "a, b = map(int, input().split())\nprint(a + b if a < 2 else 4.5)",
        "compile error: test 1 of 4: SyntaxError": "print(",
        "crashed: test 1 of 4: ZeroDivisionError": "print(1 / 0)",
        "too much output: test 1 of 4": "while True: print('x' * 1000)",
        "out of memory: test 1 of 4": "x = 'x' * 2**40",
        "no code found": None,
    }
    pairs = [("no" if code is None else fenced(code), SUMS) for code in programs.values()]
    verdicts, reasons, counts = judged(pairs, code={"memory_mb": 256, "max_output_kb": 64})
    assert verdicts == [1, 0, 0, 0, 0, 0, 0]
    for reason, start in zip(reasons, programs, strict=True):
        assert reason.startswith(start.replace("'", "")), reason
    kinds = ["no_code", "compile_errors", "wrong_answers", "memory", "output_limits", "crashes"]
    assert counts == dict.fromkeys(kinds, 1) | {"judged_twice": 0, "differing": 0}
    assert count_metrics([counts, counts])["crashes"] == 2


def test_endless_programs_are_given_up():
    [verdict], [reason], counts = judged([(fenced("while True: pass"), SUMS)], code={"test_seconds": 0.5})
    assert (verdict, counts["timeouts"]) == (0, 1)
    assert reason.startswith("timed out: test 1 of 4")
    # All tests together have a time as well.
    slow = fenced("import time\ntime.sleep(0.4)\na, b = map(int, input().split())\nprint(a + b)")
    [verdict], [reason], _ = judged([(slow, SUMS)], timeout_seconds=0.3)
    assert (verdict, reason) == (0, "timed out: test 2 of 4: all tests together took more than 0.3 s")


def test_functions_are_called_and_assertions_run():
    square = fenced("def f(x):\n    return x * x if x else x")
    pairs = [(square, CALLS), (fenced("def f(x): return 2 * x"), CALLS), (square, ASSERTIONS)]
    pairs += [(fenced("def f(x): return 4"), ASSERTIONS), (fenced("def g(x): return x"), CALLS)]
    named = Tests("function", ({"args": [], "kwargs": {"b": 1, "a": 2}, "outputs": [1]},), "Solution.f").text()
    pairs.append((fenced("class Solution:\n    def f(self, a, b): return gcd(a, a) - b"), named))
    # Imports from __future__ have to come first, whatever else is put before a program.
    future = fenced("from __future__ import annotations\nclass Solution:\n    def f(self, a: No, b): return gcd(b, b)")
    setup = Tests("assertions", ("assert f(2) == seven()",), "f", setup="def seven():\n    return 7").text()
    pairs += [(future, named), (fenced("from __future__ import annotations\ndef f(x: No): return seven()"), setup)]
    verdicts, reasons, counts = judged(pairs)
    assert verdicts == [1, 0, 1, 0, 0, 1, 1, 1]
    assert reasons[1] == "wrong answer: test 1 of 2: -2 instead of 1"
    assert reasons[3].startswith("wrong answer: test 2 of 2: AssertionError")
    assert reasons[4].startswith("crashed: test 1 of 2: ")
    assert counts["wrong_answers"] == 2


def test_right_outputs_are_never_too_long():
    numbers = list(range(30_000))
    printed = Tests("program", ({"input": "", "outputs": ["\n".join(map(str, numbers))]},)).text()
    returned = Tests("function", ({"args": [numbers], "kwargs": {}, "outputs": [numbers]},) * 3, "f").text()
    pairs = [(fenced("for x in range(30000): print(x)"), printed), (fenced("def f(x): return x"), returned)]
    pairs += [(fenced("for x in range(10**6): print(x)"), printed), (fenced("def f(x): return 20 * x"), returned)]
    verdicts, _, counts = judged(pairs, code={"max_output_kb": 16})
    assert verdicts == [1, 1, 0, 0]
    assert counts["output_limits"] == 2


def test_a_class_may_be_given_where_a_function_is_asked_for():
    source = "class Solution:\n    def f(self, x: List[int]):\n        return x * x"
    outside = "class Solution:\n    def f(self, x): return 1\ndef f(x): return x * x"
    named = "class Solution:\n    def f(self, x): return 1\nf: object = lambda x: x * x"
    pairs = [(fenced(code), CALLS) for code in (source, outside, named, f"{source} + 1")]
    assert judged(pairs)[0] == [1, 1, 1, 0]
    # Functions that such a class may rely on are not the program's answer.
    gcd = Tests("function", ({"args": [4, 6], "kwargs": {}, "outputs": [2]},), "gcd").text()
    wrong = "class Solution:\n    def gcd(self, a, b): return a"
    assert judged([(fenced(wrong), gcd), (fenced("class Solution: pass"), gcd)])[0] == [0, 0]


def test_reasons_hold_nothing_that_a_terminal_obeys():
    programs = [
        "print('\\x1b]0;title\\x07\\x1b[2J')",
        "import os\nos.write(1, b'\\xff\\0\\x9b31m')",
        "print('\\ud800\\u202e')",
        "raise ValueError('\\x1b[31m' * 99)",
        "print('\\u0662')",
    ]
    verdicts, reasons, _ = judged([(fenced(code), SUMS) for code in programs])
    assert verdicts == [0] * 5
    assert all(reason.isprintable() for reason in reasons)
    assert "\\x1b]0;title" in reasons[0]


def test_what_a_program_returns_cannot_say_that_it_is_equal():
    sly = fenced("class X(int):\n    def __eq__(self, other): return True\ndef f(x): return X(3)")
    assert judged([(sly, CALLS), (sly, ASSERTIONS)])[0] == [0, 0]


def test_partial_credit_is_the_share_that_passes():
    half = fenced("a, b = map(int, input().split())\nprint(a + b if a % 2 else 0)")
    pairs = [(half, SUMS), ("none", SUMS), (fenced("def f(x): return 4"), CALLS), (half.replace("0)", "2 * a)"), SUMS)]
    verdicts, reasons, counts = judged(pairs, code={"partial_credit": True})
    assert verdicts == [0.5, 0, 0.5, 1]
    assert reasons[0].startswith("wrong answer: test 2 of 4")
    assert counts["wrong_answers"] == 2


def test_a_checker_of_the_users_accepts_several_outputs(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text(
        "import json\n"
        "def same_set(output, test):\n"
        "    return sorted(output.split()) == sorted(json.loads(test)['outputs'][0].split()) or 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tests = Tests("program", ({"input": "", "outputs": ["1 2 3"]},)).text()
    pairs = [(fenced("print(3, 1, 2)"), tests), (fenced("print(3, 1)"), tests)]
    assert judged(pairs)[0] == [0, 0]
    assert judged(pairs, code={"checker": "own_checks:same_set"})[0] == [1, 0]
    with pytest.raises(ValueError, match=r"verifier.code.checker is 'x', expected \"module:name\""):
        VerifierConfig(kind="code", code={"checker": "x"}).check("verifier")


def test_verdicts_that_differ_when_judged_twice_are_counted():
    unsteady = fenced("def f(x):\n    import random\n    return x * x + random.random()")
    steady = fenced("def f(x): return x * x")
    # Both are wrong, or right, twice.
    _, _, counts = judged([(unsteady, CALLS), (steady, CALLS)], code={"judge_twice": 1.0})
    assert (counts["judged_twice"], counts["differing"]) == (2, 0)
    by_chance = fenced("import random\ndef f(x): return x * x + (random.SystemRandom().random() < 0.5)")
    _, _, counts = judged([(by_chance, CALLS)] * 24, code={"judge_twice": 1.0})
    assert counts["judged_twice"] == 24
    # Right with a chance of a quarter: that none of 24 differs has one of 0.00002.
    assert 0 < counts["differing"] < 24
    assert count_metrics([counts])["differing"] == counts["differing"] / 24


def test_order_is_kept_and_verdicts_are_those_of_one_worker():
    pairs = []
    for i in range(40):
        delay = "import time\ntime.sleep(0.05)\n" if i % 3 == 0 else ""
        test = Tests("program", ({"input": "", "outputs": [str(i)]},)).text()
        pairs.append((fenced(f"{delay}print({i if i % 2 else -1})"), test))
    expected = [float(i % 2) for i in range(40)]
    assert judged(pairs, processes=3)[0] == expected
    assert judged(pairs, processes=1)[0] == expected


def test_an_answer_that_holds_no_tests_is_the_users_mistake():
    with pytest.raises(ConfigError, match="'42' holds no tests of programs"):
        judged([(fenced("print(1)"), "42")])


def test_values_that_are_nested_too_deep_are_the_users_mistake():
    deep = json.loads("[" * 200 + "]" * 200)
    tests = Tests("function", ({"args": [deep], "kwargs": {}, "outputs": [1]},), "f").text()
    with pytest.raises(ConfigError, match="test 0 is nested more than 96 deep"):
        judged([(fenced("def f(x): return 1"), tests)])
    passing = Tests("function", ({"args": [deep[0]], "kwargs": {}, "outputs": [1]},), "f")
    passing.tests[0]["args"] = json.loads("[" * 93 + "]" * 93)
    assert judged([(fenced("def f(x): return 1"), passing.text())])[0] == [1]


def test_mixed_rows_are_judged_each_by_its_verifier(tmp_path, monkeypatch):
    (tmp_path / "own_lengths.py").write_text(
        "def score(response, answer):\n    return len(response) == int(answer) or 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [("math", r"\boxed{2}", "2"), ("code", fenced("print(1)"), SUMS), ("custom", "abc", "3"), ("math", "3", "2")]
    rows.append(("code", fenced("print(sum(map(int, input().split())))"), SUMS))
    pairs = [(response, json.dumps({"verifier": kind, "answer": answer})) for kind, response, answer in rows]
    config = VerifierConfig(kind="mixed", function="own_lengths:score", code={"test_seconds": 20.0})
    with closing(make_verifier(config)) as verifier:
        assert verifier.judge(pairs) == [1, 0, 1, 0, 1]
        assert verifier.reasons[1].startswith("wrong answer")
        assert verifier.counts["wrong_answers"] == 1
    with (
        closing(make_verifier(VerifierConfig(kind="mixed"))) as verifier,
        pytest.raises(ConfigError, match=r"verifier\.function is not set"),
    ):
        verifier.judge(pairs[2:3])
