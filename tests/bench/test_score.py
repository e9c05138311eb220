"""``bench/score.py``: contenders give the same rewards before they are timed, and the table has what was measured."""

import json

import pytest
import torch

from bench import score
from repirl.prm import PRM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(score, "SMOLLM2_135M", SMALL)
    yield
    torch.set_num_threads(threads)


def test_both_are_measured(tmp_path, capsys):
    output = tmp_path / "score.json"
    sizes = ["--layers", "1", "--rows", "4", "--solutions", "2", "--rounds", "2", "--device", "cpu"]
    assert score.main([*sizes, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert list(result["rewards"]) == ["value", "logprob"]
    for part in result["rewards"].values():
        assert (part["rows"], part["tokens"] > 40) == (4, True)
        assert [len(seconds) for seconds in part["seconds"].values()] == [2, 2]
    page = output.with_suffix(".md").read_text()
    assert "`logprob`, 1 layers, 4 rows" in page
    assert page.count("| repirl score | ") == 2
    assert "| scoring pass in training | " in capsys.readouterr().out


def test_figures_are_medians_of_rounds():
    part = {"tokens": 100, "rows": 1, "seconds": {score.PASS: [1.0, 2.0, 4.0], score.COMMAND: [2.0, 2.0, 5.0]}}
    assert score.table(part)[2:] == [
        "| scoring pass in training | 50 (25 to 100) | 1 |",
        "| repirl score | 50 (20 to 50) | 0.800 (0.500 to 1.000) |",
    ]


def test_other_rewards_are_not_timed(tmp_path, monkeypatch):
    score.make_files(tmp_path, 1, 3, 1)
    prm, original = score.load(tmp_path, "value", "cpu"), PRM.rewards
    monkeypatch.setattr(PRM, "rewards", lambda self, pairs: [1.1 * reward for reward in original(self, pairs)])
    with pytest.raises(ValueError, match="the rewards of repirl score are off by"):
        score.measure(tmp_path, prm, 1, "cpu")
