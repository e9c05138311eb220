"""`repirl search` on a tiny model: what it writes is what the PRM says, budgets are counted, kills change no byte."""

import json
import math
from types import SimpleNamespace

import pytest
from tiny import make_model

from repirl.apps.beams import Beam, SearchShape
from repirl.apps.output import ResumableOutput
from repirl.apps.prompt_rows import PromptRow
from repirl.apps.search import SearchCounts, SearchOptions, search
from repirl.apps.searcher import Searcher
from repirl.cli import main
from repirl.config import ConfigError
from repirl.data.text import find_end_tokens
from repirl.data.values import Place
from repirl.prm import PRMDescription, StepRule, load_prm
from repirl.rollout.transformers import TransformersEngine

RULE = StepRule(rule="separator", separator="; ")
PROMPTS = ["8+7-3=", "2+2=", "9-4+1=", "1+2+3=", "5-2="]
SHAPE = SearchShape("beam", beams=4, width=2, max_steps=4)
OPTIONS = SearchOptions(shape=SHAPE, temperature=1.0, max_tokens=16, prompts=2, baseline=True)


def is_right(text):
    return len(text) % 3 == 0


@pytest.fixture(scope="module", autouse=True)
def _verdicts():
    """What random weights write is never right. This verifier knows better, and needs no processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repirl.verify.process.Verifier.judge", lambda _, pairs: [float(is_right(t)) for t, _ in pairs])
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A policy, a PRM and prompts."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "policy")
    prm = make_model(folder / "prm", tied=False)
    config = json.loads((prm / "config.json").read_text())
    described = PRMDescription(reward="logprob", steps=RULE).model_dump(mode="json")
    (prm / "config.json").write_text(json.dumps(config | {"repirl": described}))
    rows = [{"id": i, "prompt": prompt, "answer": str(i)} for i, prompt in enumerate(PROMPTS)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place, output, options=OPTIONS, **more):
    return search(place / "policy", place / "prm", place / "in.jsonl", output, options, **more)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """The output of one call, its counts, and the tokens that the engine sampled in it."""
    output, sampled, generate = tmp_path_factory.mktemp("whole") / "out.jsonl", [], TransformersEngine.generate

    def counting(self, prompts, seeds, sampling):
        responses = generate(self, prompts, seeds, sampling)
        sampled.extend(len(response.token_ids) for response in responses)
        return responses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "generate", counting)
        without = run(place, output.with_name("without.jsonl"), SearchOptions(SHAPE, 1.0, 16, prompts=2))
        budget = sum(sampled)
        counts = run(place, output)
    return output, counts, without, budget


def test_lines_are_rows_with_the_best_beam(place, whole):
    output, counts, _, _ = whole
    prm = load_prm(place / "prm", device="cpu")
    lines = rows_of(output)
    assert [(line["id"], line["prompt"]) for line in lines] == list(enumerate(PROMPTS))
    assert counts.prompts == counts.judged == 5
    assert counts.responses == sum(len(line["beams"]) for line in lines)
    # Of random weights, so that there are beams of several steps, ended and cut off.
    assert {beam["finished"] for line in lines for beam in line["beams"]} == {True, False}
    assert max(len(beam["step_scores"]) for line in lines for beam in line["beams"]) > 1
    for line in lines:
        best = max(line["beams"], key=lambda beam: beam["score"])
        assert {key: line[key] for key in ("response", "finished", "score")} == {
            key: best[key] for key in ("response", "finished", "score")
        }
        for beam in line["beams"]:
            # As `repirl score` scores the text.
            part = beam["response"] or [prm.tokenizer.eos_token_id]
            [steps] = prm.step_scores([(line["prompt"], part)], finished=beam["finished"])
            assert beam["step_scores"] == pytest.approx(steps.tolist(), abs=1e-5)
            assert beam["score"] == pytest.approx(math.fsum(beam["step_scores"]) / len(steps), abs=1e-6)


def test_tokens_are_the_engines_and_the_baseline_has_as_many(whole):
    output, counts, without, budget = whole
    lines = rows_of(output)
    # All that was sampled, also in beams that were dropped.
    assert without.tokens_sampled == budget == counts.tokens_sampled == sum(line["tokens"] for line in lines)
    assert without.baseline_tokens == 0
    assert all("baseline" not in line for line in rows_of(output.with_name("without.jsonl")))
    for line in lines:
        baseline = line["baseline"]
        # The last response crosses the budget, and has at most 16 tokens.
        assert line["tokens"] <= baseline["tokens"] < line["tokens"] + 16
        assert baseline["responses"] >= baseline["tokens"] / 16
    assert counts.baseline_tokens == sum(line["baseline"]["tokens"] for line in lines)
    assert SearchCounts.from_flat(json.loads(json.dumps(counts.flat()))) == counts


def test_a_killed_search_goes_on_to_the_same_bytes(place, whole, tmp_path, monkeypatch):
    output, counts, _, _ = whole
    write, again = ResumableOutput.write, tmp_path / "out.jsonl"

    def killed(self, lines, figures):
        write(self, lines, figures)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResumableOutput, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(place, again)
    assert len(rows_of(again)) == 2
    with pytest.raises(ConfigError, match="holds 2 of 5 rows; go on with it by --resume"):
        run(place, again)
    other = SearchOptions(SearchShape("dvts", beams=4, width=2, max_steps=4), 1.0, 16, prompts=2, baseline=True)
    with pytest.raises(ConfigError, match="was made with method 'beam', now it is 'dvts'"):
        run(place, again, other, resume=True)
    resumed = run(place, again, resume=True)
    assert again.read_bytes() == output.read_bytes()
    counts.seconds = resumed.seconds
    assert resumed == counts
    # Nothing is left to do.
    assert run(place, again, resume=True) == resumed


def test_the_command_searches_trees_and_prints_what_is_right(place, tmp_path, capsys):
    arguments = ["search", "--model", place / "policy", "--prm", place / "prm", "--input", place / "in.jsonl"]
    arguments += [
        "--method",
        "dvts",
        "--beams",
        4,
        "--width",
        2,
        "--max-steps",
        3,
        "--max-tokens",
        12,
        "--device",
        "cpu",
    ]
    arguments = [str(part) for part in arguments]
    output = tmp_path / "out.jsonl"
    assert main([*arguments, "--output", str(output), "--seed", "1", "--rollout.max_sequences", "4"]) == 0
    printed = capsys.readouterr().out
    for text in ("diverse verifier tree search", "oracle", "tokens sampled", "out.jsonl: 5 rows"):
        assert text in printed
    for line in rows_of(output):
        assert {beam["tree"] for beam in line["beams"]} == {0, 1}
        assert len({beam["response"] for beam in line["beams"]}) > 1


def test_answers_are_judged(whole):
    output, counts, _, _ = whole
    for side in ("search", "baseline"):
        lines = [line if side == "search" else line["baseline"] for line in rows_of(output)]
        assert [line["right"] for line in lines] == [is_right(line["response"]) for line in lines]
        assert all(line["chosen"]["best_of_n"] == line["right"] for line in lines)
        for choice in ("best_of_n", "majority", "weighted", "oracle"):
            assert counts.right[f"{side} {choice}"] == sum(line["chosen"][choice] for line in lines)
    for line in rows_of(output):
        assert line["chosen"]["oracle"] == any(is_right(beam["response"]) for beam in line["beams"])
    assert counts.right["search oracle"] > 0


def test_a_beginning_without_text_has_the_lowest_score(place):
    prm = load_prm(place / "prm", device="cpu")
    sampler, ends = SimpleNamespace(tokenizer=prm.tokenizer), find_end_tokens(prm.prompts, prm.tokenizer)
    searcher = Searcher(sampler, prm, None, ends, OPTIONS)
    row = PromptRow(Place("in.jsonl", "line 1"), {}, "1+1=", None, 0, (1,))
    beams = [Beam((prm.tokenizer.pad_token_id,)), Beam((ends.turn,), ended=True, finished=True)]
    [(nothing, lowest), (steps, score)] = searcher.score([row, row], beams)
    assert (nothing, lowest) == ((), -math.inf)
    assert steps == (pytest.approx(score),)
    # Nor does it choke on beams of which none has a score.
    line, _ = searcher.judged(row, [Beam(beams[0].token_ids, score=lowest)] * 2)
    assert line == {"response": "", "finished": False, "score": None}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beams", "6"], "--beams is 6, which --width 4 does not divide"),
        (["--method", "bfs"], "--method is 'bfs', expected one of beam, dvts"),
        (["--temperature", "0"], "--temperature is 0.0, expected a number above 0"),
        (["--max-tokens", "1000000"], "--max-tokens is 1000000, but behind the longest prompt, of 6 tokens, "),
        (["--max-tokens", "1000000"], "has positions for 32762 (max_position_embeddings in its config.json): ask for"),
        (["--rollout.max_response_tokens", "1000000"], "--rollout.max_response_tokens is 1000000, but behind the"),
        (["--max-tokens", "9", "--rollout.max_response_tokens", "9"], "are the same: give one of them"),
        (["--aggregate", "prod"], "--aggregate prod multiplies chances"),
        (["--answer-column", "gold"], "no column 'gold' (--answer-column)"),
        (["--rollout.engin", "vllm"], "unknown option 'rollout.engin'"),
        (["--model", "PRM"], "is the PRM of an export (config.json, key `repirl`): the policy is"),
        (["--model", "/nowhere/policy"], "cannot load the model '/nowhere/policy': there is no such folder\n"),
        (["--prompt-column", "question"], "no column 'question' (--prompt-column)"),
    ],
)
def test_what_cannot_be_searched_is_refused(place, tmp_path, capsys, more, message):
    arguments = ["search", "--model", place / "policy", "--prm", place / "prm", "--input", place / "in.jsonl"]
    more = [str(place / "prm") if part == "PRM" else part for part in more]
    assert main([*map(str, arguments), "--output", str(tmp_path / "out.jsonl"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_do_not_fit_are_refused(place, tmp_path):
    for rows, message in [
        ([{"prompt": "1+1=", "score": 1.0}], "line 1: there is a column 'score' already"),
        ([{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2="}], "line 2: there is no 'answer', but other rows have"),
    ]:
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ConfigError, match=message):
            search(place / "policy", place / "prm", tmp_path / "in.jsonl", tmp_path / "out.jsonl", OPTIONS)
