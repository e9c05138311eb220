"""`repirl adapt` on a tiny model: answers never reach training, kills change no byte, and the summary is true."""

import json
import math
from statistics import fmean

import pytest
import yaml
from tiny import make_model, make_step_prm
from transformers import AutoModelForCausalLM

from repirl.apps.adapt import AdaptOptions, adapt
from repirl.apps.stop_rule import REWARD, StopOptions
from repirl.cli import main
from repirl.config import ConfigError
from repirl.loop import train
from repirl.prm import PRMDescription, ReferenceModel, StepRule, load_prm
from repirl.report.log import read_metrics

PROMPTS = ["8+7-3=", "2+2=", "9-4+1=", "1+2+3="]
OPTIONS = AdaptOptions(StopOptions(max_turns=3, max_kl=None, every=1), 1e-2, 3, 3, max_tokens=10, answer="gold")


def describe(folder, **changes):
    """Let a model describe itself as a PRM."""
    described = PRMDescription(reward="logprob", steps=StepRule(rule="separator", separator="; "))
    content = json.loads((folder / "config.json").read_text())
    described = described.model_copy(update=changes).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(content | {"repirl": described}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _verdicts():
    """Right is what has the answer's length modulo 2. This verifier needs no processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "repirl.verify.process.Verifier.judge",
            lambda _, pairs: [float(len(text) % 2 == int(answer) % 2) for text, answer in pairs],
        )
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A policy, a PRM and prompts with two sets of answers."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "policy")
    describe(make_model(folder / "prm", tied=False))
    for name, answer in (("in", 0), ("other", 1)):
        rows = [{"prompt": prompt, "gold": answer, "solution": "secret"} for prompt in PROMPTS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place, output, options=OPTIONS, name="in", **more):
    return adapt(place / "policy", place / "prm", place / f"{name}.jsonl", output, options, **more)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The output of one call, and what it returned."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, run(place, output)


def files(output):
    """What an uninterrupted call and one that went on have in common."""
    names = ("policy/model.safetensors", "adapt.json", "responses.jsonl", "prompts.jsonl")
    return {name: (output / name).read_bytes() for name in names}


def test_the_result_says_what_was_done(place, whole):
    output, result = whole
    assert json.loads((output / "adapt.json").read_text()) == result
    assert (result["turns"], result["stopped"], result["prompts"]) == (3, "turns", 4)
    assert result["why"] == "3 turns are done"
    lines = read_metrics(output / "run" / "metrics.jsonl")
    assert result["evaluations"] == [line[REWARD] for line in lines]
    assert result["kl"] == lines[-1]["policy/kl_reference"] > 0
    # Before and after, from the responses.
    rows = [json.loads(line) for line in (output / "responses.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    for side in ("before", "after"):
        right = [len(row[side]["response"]) % 2 == 0 for row in rows]
        assert [row[side]["right"] for row in rows] == right
        assert result["accuracy"][side]["mean"] == fmean(right)
        error = math.sqrt(fmean(right) * (1 - fmean(right)) / 3)
        assert result["accuracy"][side]["error"] == pytest.approx(error)
        assert result["prm_reward"][side]["mean"] == pytest.approx(fmean(row[side]["score"] for row in rows))
        assert result["finished"][side] == fmean(row[side]["finished"] for row in rows)
    prm = load_prm(place / "prm", device="cpu")
    for row in rows:
        response = row["after"]["response"] or [prm.tokenizer.eos_token_id]
        [score] = prm.response_scores([(row["prompt"], response)], finished=row["after"]["finished"])
        assert row["after"]["score"] == pytest.approx(score, abs=1e-5)
    gain = result["prm_reward"]["after"]["mean"] - result["prm_reward"]["before"]["mean"]
    assert result["prm_reward"]["gain"]["mean"] == pytest.approx(gain)
    # Training did something, and what is exported is what it did.
    start, adapted = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (place / "policy", output / "policy")
    )
    assert any(not value.equal(adapted[name]) for name, value in start.items())


def test_answers_never_reach_training(place, whole, tmp_path):
    output, result = whole
    assert (output / "prompts.jsonl").read_text() == "".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS)
    config = yaml.safe_load(next((output / "run" / "checkpoints").glob("step_*/config.yaml")).read_text())
    assert config["data"]["train"]["path"] == str(output / "prompts.jsonl")
    assert (config["data"]["answer_column"], config["data"]["eval"]) == (None, None)
    assert config["loss"]["outcome_coefficient"] == 0
    assert not any("outcome" in name for line in read_metrics(output / "run" / "metrics.jsonl") for name in line)
    # All answers are others, and the policy is the same to the bit.
    other = run(place, tmp_path / "out", name="other")
    assert files(tmp_path / "out")["policy/model.safetensors"] == files(output)["policy/model.safetensors"]
    before = result["accuracy"]["before"]["mean"]
    assert other["accuracy"]["before"]["mean"] == pytest.approx(1 - before)
    assert {**other, "accuracy": None} == {**result, "accuracy": None}


def test_what_was_killed_goes_on_to_the_same_bytes(place, whole, tmp_path, monkeypatch):
    again = tmp_path / "out"

    class Killed(Exception):
        pass

    def dying(config, *, resume, callbacks):
        class Dying:
            def begin(self, records):
                pass

            def after_turn(self, turn, metrics):
                if turn == 2:
                    raise Killed
                return False

            after_evaluation = after_turn

        return train(config, resume=resume, callbacks=[*callbacks, Dying()])

    with monkeypatch.context() as patch:
        patch.setattr("repirl.apps.adapt.train", dying)
        with pytest.raises(Killed):
            run(place, again)
    assert [folder.name for folder in (again / "run" / "checkpoints").iterdir()] == ["step_1"]
    with pytest.raises(ConfigError, match="already holds a run"):
        run(place, again)
    # Killed once more, when training had ended and the policy was not exported yet.
    with monkeypatch.context() as patch:
        patch.setattr("repirl.apps.adapt.export_checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(place, again, resume=True)
    monkeypatch.setattr("repirl.apps.adapt.train", None)
    run(place, again, resume=True)
    assert files(again) == files(whole[0])
    with pytest.raises(ConfigError, match="holds a result already"):
        run(place, again, resume=True)


def test_the_command_stops_by_kl_with_a_prm_of_steps(place, tmp_path, capsys):
    prm = make_step_prm(tmp_path)
    arguments = ["adapt", "--policy", place / "policy", "--prm", prm, "--prompts", place / "in.jsonl"]
    arguments += ["--output", tmp_path / "out", "--lr", 0.01, "--max-kl", 1e-6, "--turns", 9, "--patience", "none"]
    arguments += ["--max-tokens", 10, "--device", "cpu", "--loss.entropy_coefficient", 0.001]
    assert main(list(map(str, arguments))) == 0
    result = json.loads((tmp_path / "out" / "adapt.json").read_text())
    # In the first turn the policy is its start.
    assert (result["stopped"], result["turns"]) == ("kl", 2)
    assert result["accuracy"] is None
    assert 0 < result["prm_reward"]["before"]["mean"] < 1
    printed = capsys.readouterr().out
    assert "stopped after 2 turns: the KL to the start is above 1e-06 nats a token; KL to the start 0." in printed
    assert "PRM's reward" in printed
    assert "accuracy" not in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.answer_column", "gold"], "--data.answer_column cannot be set here"),
        (["--loss.outcome_coefficient", "1"], "--loss.outcome_coefficient cannot be set here"),
        (["--loss.kl_coefficient", "0"], "loss.kl_coefficient is 0, so that no KL is measured: set --max-kl none"),
        (["--checkpoint.every", "0"], "checkpoint.every is 0"),
        (["--convention", "classifier"], "--convention classifier cannot be used here"),
        (["--max-kl", "far"], "--max-kl is 'far', expected a number, or none"),
        (["--patience", "1.5"], "--patience is '1.5', expected a whole number"),
        (["--turns", "0"], "--turns is 0, expected at least 1"),
        (["--answer-column", "golden"], "no column 'golden' (--answer-column)"),
        (["--prm", "POLICY"], "does not say how its rewards are read"),
        (["--policy", "PRM"], "is the PRM of an export"),
        (["--samples", "1"], "--samples is 1, expected at least 2"),
        (["--max-tokens", "0"], "--max-tokens is 0, expected at least 1"),
        (["--lr", "nan"], "--lr is nan, expected a number above 0"),
    ],
)
def test_what_cannot_be_adapted_is_refused(place, tmp_path, capsys, more, message):
    arguments = ["adapt", "--policy", place / "policy", "--prm", place / "prm", "--prompts", place / "in.jsonl"]
    more = [{"POLICY": str(place / "policy"), "PRM": str(place / "prm")}.get(part, part) for part in more]
    assert main([*map(str, arguments), "--output", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_implicit_rewards_need_their_own_reference(place, tmp_path):
    prm = make_model(tmp_path / "prm", tied=False)
    for model, message in (("elsewhere", "are relative to 'elsewhere'"), (str(place / "policy"), "loss.kl")):
        describe(prm, reward="implicit", reference=ReferenceModel(model=model, gguf_file=None))
        with pytest.raises(ConfigError, match=message):
            adapt(
                place / "policy",
                prm,
                place / "in.jsonl",
                tmp_path / "out",
                AdaptOptions(),
                values={"loss": {"kl_coefficient": 0.0}},
            )


def test_a_run_has_to_be_exported_first(place, whole, tmp_path):
    with pytest.raises(ConfigError, match="is a run's folder: export it first"):
        adapt(whole[0] / "run", place / "prm", place / "in.jsonl", tmp_path / "out", OPTIONS)
