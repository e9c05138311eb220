"""Linear probes are judged on errors that they were told of, and on others."""

import random
from itertools import islice

import pytest
import torch
from tiny import make_model
from transformers import AutoModel

from bench import error_probe
from bench.error_probe import first_difference, fit, probe, readings, states
from repirl.data.tasks.arithmetic import Problem, Solution, planted_error, problems


def test_responses_first_differ_at_the_wrong_digit():
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 3
    assert first_difference([[1, 9, 8], [3]], [[1, 2], [3]]) == 1


def test_states_are_those_of_the_wrong_token_and_of_the_right_one_in_its_place(tmp_path):
    folder = make_model(tmp_path)
    rng = random.Random(0)
    # 8+7=15 has become 8+7=14.
    known = Solution(Problem(8, (("+", 7), ("-", 3))), ("8+7=14; ", "14-3=11; ", "#### 11"), 0)
    wrong, right = states(folder, [known, *(planted_error(p, rng) for p in islice(problems(1, (2, 3)), 5))])
    assert wrong.shape == right.shape == (6, 2, 3, 32)
    # The token before is the same on both sides, with the same past.
    assert torch.equal(wrong[:, 0], right[:, 0])
    assert not (wrong[:, 1] == right[:, 1]).all(-1).any()
    model = AutoModel.from_pretrained(folder)
    table, token = model.get_input_embeddings().weight, lambda digit: 3 + int(digit)
    assert torch.equal(wrong[0, 1, 0].float(), table[token("4")])
    assert torch.equal(right[0, 1, 0].float(), table[token("5")])
    # Of the whole prompt and the response up to there: 8+7-3=8+7=14.
    with torch.no_grad():
        ids = torch.tensor([[token("8"), 13, token("7"), 14, token("3"), 15, token("8"), 13, token("7"), 15, 4, 7]])
        last = model(input_ids=ids).last_hidden_state[0, -1]
    torch.testing.assert_close(wrong[0, 1, -1].float(), last, atol=1e-5, rtol=1e-5)


def test_readings_take_the_layers_that_they_name():
    hidden = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4)
    parts = {name: features[0].tolist() for name, features in readings(hidden).items()}
    assert parts["embedding"] == [12, 13, 14, 15]
    assert parts["layer 1"] == [16, 17, 18, 19]
    assert parts["layer 2, the last"] == [20, 21, 22, 23]
    assert parts["all layers"] == [*range(12, 24)]
    assert sorted(parts["all layers, and those of the token before"]) == [*range(24)]


def test_a_probe_sees_what_it_was_told_of(monkeypatch):
    """Two kinds of errors that show in two different numbers of the state."""
    generator = torch.Generator().manual_seed(0)

    def made_states(folder, solutions):
        axis = int(solutions[0])
        wrong, right = (torch.randn(200, 2, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        wrong[:, 1, 1, axis] -= 6.0
        return wrong, right

    monkeypatch.setattr(error_probe, "states", made_states)
    rows = probe("model", {"a": "0000", "b": "1111"}, {"of a": ["a"], "of both": ["a", "b"]})
    last = rows["layer 1, the last"]
    assert last["of a"]["a"] > 0.99
    assert last["of a"]["b"] == pytest.approx(0.5, abs=0.1)
    assert min(last["of both"].values()) > 0.95
    assert rows["embedding"]["of both"]["a"] == pytest.approx(0.5, abs=0.1)


def test_fitted_weights_do_not_depend_on_the_scale_of_features():
    generator = torch.Generator().manual_seed(1)
    wrong, right = (torch.randn(50, 3, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 1.0))
    scale = torch.tensor([1.0, 100.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(fit(wrong * scale, right * scale) * scale, fit(wrong, right), rtol=1e-4, atol=1e-6)
