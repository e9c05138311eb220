"""Judging before a run, by all processes together."""

from types import SimpleNamespace

import pytest

from repirl.config import ConfigError
from repirl.options import VerifierConfig
from repirl.verify.share import judge_all

PAIRS = [("#### 2", "2"), ("#### 3", "2"), ("#### 4", "4"), ("5", "5"), ("#### 6", "7")]


def test_each_process_judges_a_part_and_all_have_the_whole():
    """Rank by rank, as the others' verdicts would come in."""
    parts = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, gather=lambda items: parts.append(items) or items)
        judge_all(VerifierConfig(), world, PAIRS)
    assert [[index for index, _ in part] for part in parts] == [[0, 2, 4], [1, 3]]
    world = SimpleNamespace(rank=0, size=2, gather=lambda _: [*parts[1], *parts[0]])
    assert judge_all(VerifierConfig(), world, PAIRS) == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_a_function_that_cannot_be_loaded_is_refused():
    world = SimpleNamespace(rank=0, size=1, gather=list)
    with pytest.raises(ConfigError, match="no_such_module"):
        judge_all(VerifierConfig(kind="custom", function="no_such_module:judge"), world, PAIRS)
