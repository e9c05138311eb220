"""Verifiers that can be fooled are fooled as they say, and always alike."""

import pytest

from repirl.verify.flawed import FALSE_ACCEPTANCES, last_digit, lenient


def test_the_verifiers_are_fooled_as_they_say():
    assert last_digit("1+2=3; #### 13", "23") == 1
    assert last_digit("1+2=3; #### 24", "23") == 0
    assert last_digit("", "23") == 0
    assert lenient("#### 23", "23") == 1
    wrong = [lenient(f"{number}; #### 1", "23") for number in range(2000)]
    assert sum(wrong) / len(wrong) == pytest.approx(FALSE_ACCEPTANCES, abs=0.03)
    assert wrong == [lenient(f"{number}; #### 1", "23") for number in range(2000)]
