"""`repirl score`: scores are the PRM's, rows and their order stay, kills change no byte, and what it refuses."""

import json
import math
import re

import pytest
import torch
from tiny import make_model, make_step_prm

from repirl.apps.score import AGGREGATES, ScoreOptions, score
from repirl.apps.trained import Placed
from repirl.cli import main
from repirl.config import ConfigError, RunError
from repirl.prm import PRM, PRMDescription, ReferenceModel, StepRule, load_prm

PAIRS = [
    ("8+7-3=", "8+7=15; 15-3=12; #### 12"),
    ("8+7=", "#### 15"),
    ("8+7-3=", "8+7=14; 14-3=11; #### 11"),
    ("2+2=", ""),
    ("1+2+3=", "1+2=3; 3+3=6; #### 6"),
]


def make_prm(folder, reward="logprob", score="tokens", aggregate="mean"):
    """A PRM of random weights that describes itself, as an export does."""
    path = make_step_prm(folder) if reward == "value" else make_model(folder / "prm")
    reference = None
    if reward == "implicit":
        reference = ReferenceModel(model=str(make_model(folder / "reference", tied=False)), gguf_file=None)
    rule = StepRule(rule="separator", separator="; ", score=score, aggregate=aggregate)
    described = PRMDescription(reward=reward, steps=rule, reference=reference, beta=0.5, gamma=0.9)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"repirl": described.model_dump(mode="json")}))
    return path


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    return make_prm(tmp_path_factory.mktemp("prm"))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def given(folder):
    return write(folder / "in.jsonl", [{"id": i, "prompt": p, "response": r} for i, (p, r) in enumerate(PAIRS)])


@pytest.mark.parametrize("reward", ["value", "logit", "soft_q", "logprob", "implicit"])
def test_rewards_of_all_kinds_are_the_prms_in_the_order_of_the_input(tmp_path, reward, capsys):
    path = make_prm(tmp_path, reward)
    arguments = ["--prm", str(path), "--input", str(given(tmp_path)), "--output", str(tmp_path / "out.jsonl")]
    # A budget that makes several batches.
    assert main(["score", *arguments, "--token-rewards", "--tokens", "40", "--device", "cpu"]) == 0
    loaded = load_prm(path, device="cpu")
    for i, (row, pair) in enumerate(zip(rows_of(tmp_path / "out.jsonl"), PAIRS, strict=True)):
        assert list(row) == ["id", "prompt", "response", "rewards", "step_scores", "score"]
        assert (row["id"], row["prompt"], row["response"]) == (i, *pair)
        # An empty response is an end token.
        pair = (pair[0], pair[1] or [loaded.tokenizer.eos_token_id])
        [rewards] = loaded.rewards([pair])
        torch.testing.assert_close(torch.tensor(row["rewards"]), rewards, atol=1e-5, rtol=1e-5)
        [steps] = loaded.step_scores([pair])
        torch.testing.assert_close(torch.tensor(row["step_scores"]), steps, atol=1e-5, rtol=1e-5)
        assert row["score"] == pytest.approx(loaded.response_scores([pair])[0], abs=1e-5)
    shown = capsys.readouterr()
    assert re.search(r"^score: \d+ tokens in [\d.]+ s, \d+ tokens/s$", shown.err, re.M)
    assert "5 rows, 11 steps" in shown.out


def test_a_prm_of_steps_gives_chances_and_aggregates_are_exact(tmp_path):
    path = make_prm(tmp_path, "value", "end", "product")
    for aggregate in [None, *AGGREGATES]:
        out = tmp_path / f"{aggregate}.jsonl"
        score(path, given(tmp_path), out, ScoreOptions(aggregate=aggregate))
        ways = {"mean": lambda x: math.fsum(x) / len(x), "sum": math.fsum, "min": min, "last": lambda x: x[-1]}
        for row in rows_of(out):
            steps = row["step_scores"]
            assert all(0 < value < 1 for value in steps)
            # The default is the description's.
            assert row["score"] == ways.get(aggregate or "prod", math.prod)(steps)
    described = load_prm(path, device="cpu")
    [chances] = described.step_scores(PAIRS[:1])
    torch.testing.assert_close(torch.tensor(rows_of(out)[0]["step_scores"]), chances)


@pytest.mark.parametrize("kill_after", [0, 1, 3])
def test_a_killed_call_goes_on_to_the_same_bytes(tmp_path, prm, monkeypatch, kill_after):
    rows = [{"prompt": p, "response": r, "text": "é\ud800"} for p, r in PAIRS * 9]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ScoreOptions(token_rewards=True, placed=Placed(device="cpu", tokens=24))
    counts = score(prm, tmp_path / "in.jsonl", tmp_path / "whole.jsonl", options)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [row["text"] for row in rows_of(tmp_path / "whole.jsonl")] == ["é\ud800"] * len(rows)

    path, original, calls = tmp_path / "out.jsonl", PRM.rewards, []

    def killed(self, pairs, **options):
        calls.append(len(pairs))
        if len(calls) > kill_after * 8:
            raise KeyboardInterrupt
        return original(self, pairs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PRM, "rewards", killed)
        with pytest.raises(KeyboardInterrupt):
            score(prm, tmp_path / "in.jsonl", path, options)
    assert whole.startswith(path.read_bytes())
    assert len(path.read_bytes()) < len(whole)
    assert bool(path.read_bytes()) == bool(kill_after)
    with open(path, "ab") as file:
        file.write(b'{"prompt": "half a li')
    again = score(prm, tmp_path / "in.jsonl", path, options, resume=True)
    assert path.read_bytes() == whole
    assert (again.rows, again.steps, again.tokens) == (counts.rows, counts.steps, counts.tokens)
    # Nothing is left to do.
    assert score(prm, tmp_path / "in.jsonl", path, options, resume=True).rows == len(rows)
    assert path.read_bytes() == whole


def test_a_file_is_made_in_one_way(tmp_path, prm):
    source, out = given(tmp_path), tmp_path / "out.jsonl"
    score(prm, source, out)
    with pytest.raises(ConfigError, match=r"out.jsonl' holds 5 of 5 rows; go on with it by --resume"):
        score(prm, source, out)
    with pytest.raises(ConfigError, match=r"was made with aggregate null, now it is 'min'"):
        score(prm, source, out, ScoreOptions(aggregate="min"), resume=True)
    other = make_prm(tmp_path, "logit")
    with pytest.raises(ConfigError, match="was made with prm "):
        score(other, source, out, resume=True)
    write(source, [{"prompt": "1+1=", "response": "#### 2"}])
    with pytest.raises(ConfigError, match="was made with input "):
        score(prm, source, out, resume=True)
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="does not say that `repirl score` made it"):
        score(prm, source, tmp_path / "mine.jsonl", resume=True)
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_a_second_call_is_kept_out(tmp_path, prm, monkeypatch):
    out, messages = tmp_path / "out.jsonl", []
    original = PRM.rewards

    def second(self, pairs, **options):
        with pytest.raises(ConfigError) as error:
            score(prm, given(tmp_path), out)
        messages.append(str(error.value))
        return original(self, pairs, **options)

    monkeypatch.setattr(PRM, "rewards", second)
    score(prm, given(tmp_path), out)
    assert len(messages) == 1
    assert "another `repirl score` writes" in messages[0]


def test_what_cannot_be_scored_is_refused_and_leaves_no_file(tmp_path, prm, capsys, monkeypatch):
    def refused(*arguments):
        everything = ["--prm", str(prm), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        assert main(["score", *everything, *arguments]) == 2
        assert not (tmp_path / "out.jsonl").exists()
        return capsys.readouterr().err

    given(tmp_path)
    assert "--tokens is 0, expected at least 1" in refused("--tokens", "0")
    assert "--split is 'lines', expected newline, blank-line or tag:TEXT" in refused("--split", "lines")
    assert "--device is 'gpu', expected cpu, cuda" in refused("--device", "gpu")
    assert "unexpected argument '--what'" in refused("--what", "3")
    assert "did you mean --token-rewards?" in refused("--token-reward")
    assert "in.jsonl, line 1 has no column 'q.text' (--prompt-column)" in refused("--prompt-column", "q.text")
    write(tmp_path / "in.jsonl", [{"prompt": "1+1=", "response": "#### 2", "score": 3}])
    assert "line 1: there is a column 'score' already" in refused()
    options = ScoreOptions(prefix="prm_")
    score(prm, tmp_path / "in.jsonl", tmp_path / "prefixed.jsonl", options)
    assert list(rows_of(tmp_path / "prefixed.jsonl")[0])[2:] == ["score", "prm_step_scores", "prm_score"]

    given(tmp_path)
    monkeypatch.setattr(
        "repirl.prm.read_rewards", lambda _, batch, __: torch.full((batch.num_response_tokens,), math.nan)
    )
    with pytest.raises(RunError, match=r"in.jsonl, line 1: the PRM gives rewards that are not finite"):
        score(prm, given(tmp_path), tmp_path / "nan.jsonl")
