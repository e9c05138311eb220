"""Reasons of the verifier of mathematical answers: the verdicts are its own."""

import json

import pytest
from shared import ROOT

from repirl.options import VerifierConfig
from repirl.verify.explain import math_verdict, plain_verdict
from repirl.verify.math import MAX_PARSED, math_reward
from repirl.verify.process import Verifier


@pytest.mark.parametrize(
    ("response", "answer", "reward", "reason"),
    [
        ("so #### 72", "72.0", 1, "equal"),
        ("so #### 72", "It is 73.\n#### 73", 0, "differs: 72 vs 73"),
        (r"\boxed{\frac{1}{2}}", "0.5", 1, "equal"),
        (r"\boxed{(1, 2)}", "(1, 3)", 0, "differs: (1, 2) vs (1, 3)"),
        ("the total is 12", "13", 0, "differs: 12 vs 13"),
        ("I do not know", "3", 0, "no final answer found"),
        ("", "3", 0, "no final answer found"),
        (r"so \boxed{}", "3", 0, "no final answer found"),
        (r"\boxed{x \foo @ 3}", "4", 0, r"answer not readable: x \foo @ 3"),
        ("#### 4 apples", "?? @@", 0, "right answer not readable: ?? @@"),
        (r"\boxed{x = 3}", "x = 4", 0, "differs: x = 3 vs x = 4"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\{1, 2\}", 0, None),
        (r"\boxed{" + "1+" * MAX_PARSED + "1}", "3", 0, "too long: the final answer has 1001 characters"),
        ("#### Rome", "Paris", 0, "differs: Rome vs Paris"),
        ("#### " + "7" * 100, "8", 0, f"differs: {'7' * 57}... vs 8"),
    ],
)
def test_math_says_why(response, answer, reward, reason):
    verdict = plain_verdict(response, answer) or math_verdict(response, answer)
    assert verdict == reward == math_reward(response, answer)
    assert reason is None or verdict.reason.startswith(reason)


def test_a_fault_of_a_parser_is_the_reason(monkeypatch):
    def fail(*_):
        raise RecursionError

    monkeypatch.setattr("repirl.verify.explain.final_answer", fail)
    assert math_verdict(r"\boxed{x}", "y").reason == "answer not readable: RecursionError"


def test_verdicts_stay_whatever_the_reasons():
    lines = (ROOT / "tests" / "repirl" / "verify" / "math_verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines[::40]):
        verdict = math_verdict(row["response"], row["gold"])
        assert verdict == math_reward(row["response"], row["gold"])
        assert (verdict.reason == "equal") == (verdict == 1)


def test_a_verifier_gives_reasons_where_asked():
    pairs = [
        ("#### 1", "1"),
        (r"\boxed{\sqrt{4}}", "2"),
        (r"\boxed{\sqrt{4}}", "3"),
        (r"\boxed{" + "x+" * 999 + "1}", "3"),
    ]
    for explain in (False, True):
        verifier = Verifier(VerifierConfig(), explain=explain)
        try:
            assert verifier.judge(pairs) == [1, 1, 0, 0]
            reasons = verifier.reasons
            verifier.judge(pairs[:0])
            assert verifier.reasons == {}
        finally:
            verifier.close()
        overlong = "too long: the final answer has 1999 characters, at most 500 are read"
        explained = {0: "equal", 1: "equal", 2: r"differs: \sqrt{4} vs 3"} if explain else {}
        assert reasons == explained | {3: overlong}
