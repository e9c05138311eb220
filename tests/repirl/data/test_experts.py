"""Experts of the prompts that a turn samples on."""

import logging

import pytest
import torch

from repirl.batch import EXPERT, pack
from repirl.config import ConfigError
from repirl.data.experts import Expert, Experts, check_matches
from repirl.data.prompts import Prompt, PromptSet

ROWS = [Expert((2, 3), (4, 1)), Expert((2,), (5, 1)), Expert((2, 3), (6, 7, 1)), Expert((9,), (8, 1))]


def test_matching_gives_all_experts_of_each_prompt_in_its_group():
    asked = []

    def reference(batch):
        asked.append(batch.num_sequences)
        return -batch.response_ids.float()

    experts = Experts(ROWS, seed=0, per_turn=2, reference=reference)
    # Prompt (2, 3) twice in one turn; (2, 4) has no expert.
    rollouts = pack(
        [([2, 3], [9, 1]), ([2, 3], [1]), ([2, 4], [1]), ([2], [2, 3, 1]), ([2, 3], [8, 1])], group_ids=[0, 0, 1, 2, 3]
    )
    before = experts.state_dict()["cursor"]
    batch = experts.matching(rollouts)
    assert batch.group_ids.tolist() == [0, 0, 2, 3, 3]
    assert batch.response_ids.tolist() == [4, 1, 6, 7, 1, 5, 1, 4, 1, 6, 7, 1]
    assert (batch.source == EXPERT).all()
    assert torch.equal(batch.read("prm_ref_logprob"), -batch.response_ids.float())
    # Each expert is asked for once, and the place in the data stays.
    assert asked == [3]
    assert experts.state_dict()["cursor"] == before
    assert experts.matching(rollouts.select([2])) is None


def test_a_run_whose_prompts_have_no_experts_is_refused(caplog):
    def prompts(*token_ids):
        return PromptSet([Prompt(i, ids, None) for i, ids in enumerate(token_ids)], 0)

    with pytest.raises(ConfigError, match="none of the 2 training prompts is the prompt of one of the 4 experts"):
        check_matches(ROWS, prompts((7,), (3, 2)))
    with caplog.at_level(logging.WARNING):
        check_matches(ROWS, prompts((2,), (9,)))
        assert not caplog.records
        check_matches(ROWS, prompts((2,), (7,), (8,)))
    assert "2 of 3 training prompts have no expert" in caplog.text
