"""What a verifier says of a file's responses: verdicts as in training, and why."""

import json

import pytest

from bench.sandbox import ATTACKERS
from repirl.apps.judge import judge, verifier_config
from repirl.cli import main
from repirl.config import ConfigError, RunError
from repirl.verify.math import MAX_PARSED

FUNCTION = """
import time

class Said(float):
    reason = "said: so"

def score(response, answer):
    if response == "sleep":
        time.sleep(100)
    if response == "raise":
        raise KeyError(answer)
    return Said(1) if response == "said" else float(response)
"""


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "in.jsonl")

    return write


@pytest.fixture
def function(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_scores:score"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_kept_and_get_verdict_and_reason(tmp_path, write, capsys):
    texts = ["#### 72", r"\boxed{\frac{144}{2}}", r"\boxed{\sqrt{2}}", "é", r"\boxed{" + "1+" * MAX_PARSED + "1}"]
    rows = [{"id": i, "out": {"text": text}, "m": {"gold": 72}, "half": "\ud800"} for i, text in enumerate(texts)]
    output = tmp_path / "new" / "out.jsonl"
    arguments = ["judge", "--verifier", "math", "--input", write(*rows), "--output", str(output)]
    assert main([*arguments, "--response-column", "out.text", "--answer-column", "m.gold"]) == 0
    written = rows_of(output)
    assert [{key: row[key] for key in rows[0]} for row in written] == rows
    assert [row["verdict"] for row in written] == [1, 1, 0, 0, 0]
    kinds = ["equal", "equal", "differs", "no final answer found", "too long"]
    assert [row["reason"].partition(":")[0] for row in written] == kinds
    assert written[2]["reason"] == r"differs: \sqrt{2} vs 72"
    printed = capsys.readouterr().out
    assert "5 responses, 40.0% right" in printed
    assert printed.index("equal ") < printed.index("differs ")
    assert [output.name] == [file.name for file in output.parent.iterdir()]
    assert main(arguments) == 2
    assert "exists already: choose another file" in capsys.readouterr().err


def test_a_function_of_the_users_judges_within_its_limits(tmp_path, write, function, capsys):
    rows = write(*({"response": text, "answer": "a"} for text in ("1", "0", "0.25", "3", "said", "sleep", "1")))
    output = tmp_path / "out.jsonl"
    arguments = ["judge", "--verifier", function, "--input", rows, "--timeout", "0.5", "--output", str(output)]
    assert main(arguments) == 0
    reasons = ["right", "wrong", "partly right: 0.25", "outside 0 to 1: 3", "said: so", "timed out: 0.5 s", "right"]
    assert [row["reason"] for row in rows_of(output)] == reasons
    assert [row["verdict"] for row in rows_of(output)] == [1, 0, 0.25, 3, 1, 0, 1]
    printed = capsys.readouterr().out
    assert "7 responses, 57.1% right, mean verdict 0.8929" in printed
    assert "timed out  " in printed
    with pytest.raises(RunError, match="KeyError: 'a'"):
        judge(verifier_config(function), write({"response": "raise", "answer": "a"}), tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()


def test_programs_are_run_on_the_tests_of_their_rows(tmp_path, write, capsys):
    tests = [{"input": [2], "output": 4}, {"input": [3], "output": 9}]
    texts = ["```python\ndef f(x):\n    return x * x\n```", "```python\ndef f(x):\n    return 4\n```", "no"]
    rows = write(*({"response": text, "tests": tests, "entry_point": "f"} for text in texts))
    output = tmp_path / "out.jsonl"
    arguments = ["--answer-column", "tests", "--output", str(output), "--timeout", "60"]
    assert main(["judge", "--verifier", "code", "--input", rows, *arguments]) == 0
    assert [row["verdict"] for row in rows_of(output)] == [1, 0, 0]
    reasons = ["passed", "wrong answer: test 2 of 2: 4 instead of 9", "no code found"]
    assert [row["reason"] for row in rows_of(output)] == reasons
    assert "3 responses, 33.3% right" in capsys.readouterr().out


def test_programs_that_attack_are_wrong_and_change_no_verdict_of_others(tmp_path, write):
    tests = [{"input": "3\n", "output": "6\n"}]
    programs = [program for attacker in ATTACKERS for program in (attacker, "print(int(input()) * 2)")]
    rows = write(*({"response": f"```python\n{program}\n```", "tests": tests} for program in programs))
    output = tmp_path / "out.jsonl"
    arguments = ["--answer-column", "tests", "--output", str(output), "--timeout", "60", "--processes", "2"]
    assert main(["judge", "--verifier", "code", "--input", rows, *arguments]) == 0
    assert [row["verdict"] for row in rows_of(output)] == [0, 1] * len(ATTACKERS)
    kinds = {row["reason"].partition(":")[0] for row in rows_of(output)}
    assert kinds <= {"passed", "crashed", "out of memory", "too much output", "wrong answer", "timed out"}


def test_counting_writes_nothing(tmp_path, write):
    counts = judge(verifier_config("math"), write({"response": "#### 1", "answer": 1, "verdict": 0.5}))
    assert (counts.responses, counts.right, counts.reasons) == (1, 1, {"equal": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "answer": 1}, r"line 2 has no column 'response' \(--response-column\)"),
        ({"response": "a", "m": {"gold": 1}}, r"line 2 has no column 'answer' \(--answer-column\); it has .*'m.gold'"),
        ({"response": None, "answer": 1}, "line 2: 'response' holds null, expected text"),
        ({"response": "a", "answer": None}, "line 2: 'answer' is null, expected an answer"),
        ({"response": "a", "answer": 1, "reason": ""}, "there is a column 'reason' already"),
    ],
)
def test_rows_that_cannot_be_judged_are_named(tmp_path, write, row, message):
    with pytest.raises(ConfigError, match=message):
        judge(verifier_config("math"), write({"response": "a", "answer": 1}, row), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verifier", "code"], "line 1: 'answer' holds 1, expected tests"),
        (["--verifier", "maths"], "--verifier is 'maths', expected math, code or module:function"),
        (["--verifier", "a b:c"], "--verifier is 'a b:c', expected math, code or module:function"),
        (["--verifier", "math", "--processes", "0"], "--processes is 0"),
        (["--verifier", "math", "--timeout", "-1"], "--timeout is -1.0"),
        (["--verifier", "math", "--answer", "a"], "did you mean --answer-column?"),
        (["--verifier", "math", "--data.x", "a"], "unexpected argument '--data.x'"),
    ],
)
def test_options_are_checked(write, capsys, options, message):
    assert main(["judge", "--input", write({"response": "a", "answer": 1}), *options]) == 2
    assert message in capsys.readouterr().err
