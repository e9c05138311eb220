"""One form for answers that say the same."""

import pytest

from repirl.verify.canonical import canonical_answer
from repirl.verify.math import MAX_PARSED


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("#### 72", r"so \boxed{72.0}"),
        (r"\boxed{\frac{1}{2}}", "#### 0.5"),
        ("The answer is $1,234.", r"\boxed{1234}"),
        ("#### 4 apples", r"\boxed{4}"),
        ("#### (B)", r"\boxed{\text{B}}"),
        (r"\boxed{ x + 1 }", r"\boxed{x+1}"),
        (r"\boxed{\left(1, 2\right)}", r"\boxed{(1,2)}"),
        ("#### 1e4000", "#### 1e4000"),
    ],
)
def test_what_says_the_same_is_equal(one, other):
    assert canonical_answer(one) is not None
    assert canonical_answer(one) == canonical_answer(other)
    assert hash(canonical_answer(one)) == hash(canonical_answer(other))


def test_other_answers_are_others():
    texts = ["#### 72", "#### 73", "#### -72", "#### B", r"\boxed{x}", r"\boxed{(1,2)}", r"\boxed{[1,2]}", "#### Paris"]
    assert len({canonical_answer(text) for text in texts}) == len(texts)


def test_without_a_final_answer_there_is_none():
    assert canonical_answer("I do not know") is None
    assert canonical_answer("") is None
    assert canonical_answer(r"\boxed{}") is None


def test_long_answers_are_texts():
    assert canonical_answer("#### " + "7" * 100_000) == "7" * 100_000
    assert canonical_answer(r"\boxed{" + "(" * MAX_PARSED + "}") == "(" * MAX_PARSED
