"""Tests of programs in the formats of public data sets, and what is refused."""

import base64
import json
import pickle
import zlib

import pytest

from repirl.config import ConfigError
from repirl.data.answers import read_answer
from repirl.data.code import read_tests
from repirl.data.values import Place
from repirl.dataconfig import DataConfig
from repirl.verify.code_tests import Tests, parse_tests

PLACE = Place("a.jsonl", "line 1")
HEAD = 'import math\n\ndef helper():\n    return 1\n\ndef f(x):\n    """Say."""\n'


DEEP = json.loads("[" * 200 + "]" * 200)


def read(row, column="answer"):
    tests = read_tests(row, PLACE, column, "data.answer_column")
    assert parse_tests(tests.text()) == parse_tests(json.dumps(json.loads(tests.text())))
    return tests


def test_humaneval_and_leetcode():
    check = "def check(candidate):\n    assert candidate(1) == helper()\n"
    tests = read({"prompt": HEAD, "entry_point": "f", "test": check})
    assert (tests.style, tests.entry, tests.calls_check, tests.starter) == ("assertions", "f", True, HEAD)
    # The head of what is asked for must not stand in the test's way.
    assert "def helper" in tests.setup
    assert "import math" in tests.setup
    assert "def f" not in tests.setup
    starter = "class Solution:\n    def f(self, x):\n        "
    tests = read({"entry_point": "Solution().f", "test": check.replace("helper()", "1"), "starter_code": starter})
    assert (tests.entry, tests.starter, tests.names) == ("Solution.f", starter, ["Solution.f"])
    prompt = "import math\n\nclass ListNode:\n    pass\n"
    tests = read({"prompt": prompt, "entry_point": "Solution().f", "test": check, "starter_code": starter})
    assert tests.starter == f"{prompt}\n\n{starter}"
    assert tests.setup == "import math\n\nclass ListNode:\n    pass"


def test_mbpp():
    row = {
        "test_list": ["assert set(f((1, 2))) == {1}", "assert math.isclose(f(1), 2)"],
        "test_imports": ["import math"],
    }
    assert read(row) == Tests("assertions", tuple(row["test_list"]), "f", setup="import math")
    both = {"test_list": ["assert f(g(1)) == 2"], "test_setup_code": "def g(x):\n    return x"}
    assert read(both).names == ["f"]
    assert read({"test_list": ["assert f(1) == h(2)"]}).names == ["f", "h"]


def test_livecodebench():
    public = [{"input": "1\n2\n", "output": "3\n", "testtype": "stdin"}]
    hidden = [{"input": "3\n4\n", "output": "7\n", "testtype": "stdin"}]
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(hidden)))).decode()
    for private in (packed, json.dumps(hidden), hidden):
        tests = read({"public_test_cases": json.dumps(public), "private_test_cases": private, "metadata": "{}"})
        assert tests.style == "program"
        assert [test["input"] for test in tests.tests] == ["1\n2\n", "3\n4\n"]
        assert tests.tests[1]["outputs"] == ["7\n"]
    functional = [{"input": '[1, 2]\n"a"', "output": "[2]", "testtype": "functional"}]
    starter = "class Solution:\n    def f(self, xs, s):\n        "
    row = {"public_test_cases": functional, "metadata": json.dumps({"func_name": "f"}), "starter_code": starter}
    assert read(row).tests == ({"args": [[1, 2], "a"], "kwargs": {}, "outputs": [[2]]},)
    assert read(row).entry == "Solution.f"


def test_private_tests_run_nothing():
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    public = [{"input": "1", "output": "1", "testtype": "stdin"}]
    with pytest.raises(ConfigError, match="it holds an object of builtins"):
        read({"public_test_cases": public, "private_test_cases": packed})


def test_apps():
    row = {"input_output": json.dumps({"inputs": ["1 2\n", ["1", "2"]], "outputs": ["3\n", ["3"]]})}
    assert read(row).tests == ({"input": "1 2\n", "outputs": ["3\n"]}, {"input": "1\n2", "outputs": ["3"]})
    called = {"fn_name": "f", "inputs": [[1, [2]], [0, []]], "outputs": [[3], 0]}
    tests = read({"input_output": json.dumps(called), "starter_code": "class Solution:\n    def f(self, a, b):\n"})
    assert tests.entry == "Solution.f"
    assert tests.tests[0] == {"args": [1, [2]], "kwargs": {}, "outputs": [[3], 3]}


def test_a_list_of_ones_own():
    listed = [{"input": "1", "output": "2"}, {"input": "2", "outputs": ["3", "4"]}]
    for value in (listed, json.dumps(listed)):
        assert read({"cases": value}, "cases").tests[1] == {"input": "2", "outputs": ["3", "4"]}
    calls = [{"input": [1, 2], "output": 3}, {"input": {"a": 1, "b": 2}, "output": 3}, {"input": 5, "output": 5}]
    tests = read({"tests": calls, "entry_point": "f"})
    assert [(test["args"], test["kwargs"]) for test in tests.tests] == [([1, 2], {}), ([], {"a": 1, "b": 2}), ([5], {})]
    assert read({"tests": [{"assert": "assert f(1) == 2"}]}).names == ["f"]
    assert read({"test": "assert f(1) == 2\nassert f(2) == 3"}).names == ["f"]
    # As `repirl sample` writes them.
    assert read({"answer": tests.text()}).text() == tests.text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 3}, "line 1: 'answer' holds 3, expected tests"),
        ({"other": 3}, r"has no column 'answer' \(data.answer_column\)"),
        ({"answer": "forty-two"}, "'answer' holds 'forty-two', expected tests"),
        ({"answer": "[1, 2"}, "begins as JSON, but is none"),
        ({"answer": []}, "expected tests"),
        ({"answer": [3]}, "answer.0 is 3, expected a test"),
        ({"answer": [{"input": "1"}]}, r"answer.0 is a test with \['input'\]"),
        ({"answer": [{"input": 1, "output": "2"}]}, "test 0 of 'answer' holds 1, expected text .*'entry_point'"),
        ({"answer": {"a": 1}}, r"'answer' has \['a'\], expected inputs and outputs"),
        ({"answer": {"inputs": ["1"], "outputs": []}}, "as many inputs as outputs"),
        ({"answer": ["assert f("]}, "a test that is no Python"),
        ({"answer": ["assert 1 == 1"]}, "calls no function"),
        ({"test": "def check(candidate):\n    assert candidate(1)"}, "no column 'entry_point'"),
        ({"answer": [{"input": "1", "output": "1"}], "entry_point": "f(1)"}, "'entry_point' is 'f\\(1\\)'"),
        ({"answer": [{"input": [DEEP], "output": 1}], "entry_point": "f"}, "test 0 is nested more than 96 deep"),
        ({"public_test_cases": "[]", "private_test_cases": "!"}, "'private_test_cases' cannot be read"),
    ],
)
def test_rows_without_tests_are_named(row, message):
    with pytest.raises(ConfigError, match=message):
        read(row)


def test_rows_name_their_verifiers():
    data = DataConfig(verifier_column="domain")

    def answer(row):
        return json.loads(read_answer(row, PLACE, "answer", "data.answer_column", data))

    assert answer({"domain": "math", "answer": 3}) == {"verifier": "math", "answer": "3"}
    assert answer({"domain": "custom", "answer": "x"}) == {"verifier": "custom", "answer": "x"}
    code = answer({"domain": "code", "answer": None, "test_list": ["assert f(1) == 2"]})
    assert parse_tests(code["answer"]).names == ["f"]
    with pytest.raises(ConfigError, match="'domain' is 'maths', expected one of math, code, custom"):
        answer({"domain": "maths", "answer": 3})
