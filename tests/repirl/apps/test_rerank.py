"""Best-of-N and votes from a file of samples: scores, outcomes and answers from wherever they are."""

import json
import math
from itertools import combinations
from statistics import fmean, stdev

import pytest
from tiny import make_model, make_step_prm

from repirl.apps.rerank import METHODS, RerankOptions, rerank
from repirl.cli import main
from repirl.config import ConfigError
from repirl.prm import PRMDescription, load_prm

# Of each prompt: (response, score), the right answer is 1.
SAMPLES = {
    "p": [("#### 2", 0.5), ("#### 1", 2.0), ("#### 2", -1.0), ("#### 1.0", 1.0)],
    "q": [("#### 3", 9.0), (r"\boxed{1}", 0.0), ("no idea", 10.0), ("#### 1", -3.0), ("#### 4", 5.0)],
    "r": [("#### 7", 0.1), ("#### 8", 0.2), ("#### 7", 0.3), ("#### 1", 0.2)],
}
RIGHT = {"p": [0, 1, 0, 1], "q": [0, 1, 0, 1, 0], "r": [0, 0, 0, 1]}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="in.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def single_rows(**more):
    # In turn, as they need not stand together.
    places = sorted((i, prompt) for prompt, samples in SAMPLES.items() for i in range(len(samples)))
    for i, prompt in places:
        response, score = SAMPLES[prompt][i]
        yield {"prompt": prompt, "answer": "1", "response": response, "score": score} | more


def without_score(rows):
    return [{key: value for key, value in row.items() if key != "score"} for row in rows]


def test_figures_are_those_of_all_subsets(tmp_path, write):
    result = rerank(write(single_rows()), tmp_path / "new" / "out.json")
    assert [line["n"] for line in result["results"]] == [1, 2, 4]
    for line in result["results"]:
        values = {"best_of_n": [], "oracle": []}
        for prompt, samples in SAMPLES.items():
            chosen = list(combinations(range(len(samples)), line["n"]))
            best = [max(subset, key=lambda i: (samples[i][1], -i)) for subset in chosen]
            values["best_of_n"].append(fmean(RIGHT[prompt][i] for i in best))
            values["oracle"].append(fmean(max(RIGHT[prompt][i] for i in subset) for subset in chosen))
        for method, of_prompts in values.items():
            assert line[method]["mean"] == pytest.approx(fmean(of_prompts))
            assert line[method]["error"] == pytest.approx(stdev(of_prompts) / math.sqrt(3))
    first, last = result["results"][0], result["results"][-1]
    assert len({round(first[method]["mean"], 12) for method in METHODS}) == 1
    # p: 2 twice, 1 twice, the first one counts; r: 7. q: 1 where both of it are in, which is so in three of the five
    # subsets of four; in the others 3 is the first of three single answers.
    assert last["majority"]["mean"] == pytest.approx((0 + 3 / 5 + 0) / 3)
    # exp(2) + exp(1) > exp(0.5) + exp(-1); q: 3 and 4 outweigh it.
    assert last["weighted"]["mean"] == pytest.approx(1 / 3)
    counts = ("prompts", "responses", "fewest", "most", "without_answer")
    assert [result[name] for name in counts] == [3, 13, 4, 5, 1]
    p, q, _ = result["chosen"]
    assert p["best_of_n"] == {"response": "#### 1", "score": 2.0, "right": True}
    assert p["majority"] == {"response": "#### 2", "score": 0.5, "right": False}
    assert p["weighted"]["response"] == "#### 1"
    assert (q["best_of_n"]["response"], q["majority"]["response"]) == ("no idea", r"\boxed{1}")
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == result


def test_lists_of_responses_and_outcomes_are_the_same_samples(write):
    expected = rerank(write(single_rows()))
    rows = []
    for prompt, samples in SAMPLES.items():
        responses, scores = zip(*samples, strict=True)
        row = {"prompt": prompt, "answer": 1, "responses": responses, "scores": scores}
        rows.append(row | {"outcomes": RIGHT[prompt]})
    assert rerank(write(rows)) == expected
    # Verdicts go before outcomes, and both before the verifier.
    wrong = rerank(write([row | {"verdicts": [0] * len(row["responses"])} for row in rows]))
    assert {figure["mean"] for line in wrong["results"] for name, figure in line.items() if name != "n"} == {0.0}


def test_the_command_prints_a_table(tmp_path, write, capsys):
    output = tmp_path / "out.json"
    arguments = ["rerank", "--input", str(write(single_rows())), "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in ("best of N", "0.3833 ± 0.0726", "3 prompts with 4 to 5 responses; scores: column 'score'"):
        assert text in printed
    assert "1 of 13 responses mark no final answer, and do not vote" in printed
    assert main(arguments) == 2
    assert "exists already: choose another file" in capsys.readouterr().err


def test_without_answers_it_says_what_it_chooses(write, capsys):
    rows = [{key: row[key] for key in ("prompt", "response", "score")} for row in single_rows()]
    result = rerank(write(rows))
    assert result["results"] == []
    assert result["chosen"][0]["best_of_n"] == {"response": "#### 1", "score": 2.0, "right": None}
    assert main(["rerank", "--input", str(write(rows))]) == 0
    assert "what is right is not known" in capsys.readouterr().out


def test_a_prm_scores_what_has_no_score(tmp_path, write):
    prm = make_step_prm(tmp_path)
    texts = ["3+4=7; #### 7", "3+4=8; #### 8", "3+4=9; 9-1=8; #### 8"]
    rows = [{"prompt": "3+4", "answer": 7, "response": text} for text in texts]
    # A response that was cut off gets no end token, so that its last step has another score.
    rows.append(rows[1] | {"finished": False})
    loaded, pairs = load_prm(prm), [("3+4", text) for text in texts]
    steps = [*loaded.step_scores(pairs), *loaded.step_scores(pairs[1:2], finished=False)]
    for name, way in (("min", min), ("mean", fmean)):
        scores = [way(part.tolist()) for part in steps]
        best = scores.index(max(scores))
        # `min` is what this PRM says of itself.
        options = None if name == "min" else RerankOptions(aggregate=name)
        result = rerank(write(rows), prm=prm, options=options)
        chosen = result["chosen"][0]["best_of_n"]
        assert chosen["score"] == pytest.approx(scores[best], rel=1e-4)
        assert chosen["response"] == rows[best]["response"]
        assert result["options"]["aggregate"] == name
    assert fmean(steps[1].tolist()) != fmean(steps[3].tolist())
    assert [line["oracle"]["mean"] for line in result["results"]] == [0.25, 0.5, 1.0]
    assert result["results"][0]["oracle"]["error"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": None}, "line 2: 'score' is null, but other rows have one"),
        ({"score": True}, "line 2: 'score' is True, expected a number: a verdict is no score"),
        ({"score": float("nan")}, "line 2: 'score' is nan, expected a finite number"),
        ({"score": "high"}, "line 2: 'score' is 'high', expected a number"),
        ({"response": 3}, "line 2: 'response' holds 3, expected text"),
        ({"answer": None}, "line 2: there is neither 'verdict', 'outcome' nor 'answer', but other rows have one"),
        ({"outcome": "yes"}, "line 2: 'outcome' is 'yes', expected a number"),
    ],
)
def test_rows_that_cannot_be_used_are_named(write, changes, message):
    rows = list(single_rows())[:2]
    with pytest.raises(ConfigError, match=message):
        rerank(write([rows[0], rows[1] | changes]))


def test_lists_that_do_not_fit_are_named(write):
    row = {"prompt": "p", "answer": 1, "responses": ["#### 1", "#### 2"]}
    with pytest.raises(ConfigError, match=r"line 1: 'scores' is .*, expected a list of 2, one for each response"):
        rerank(write([row | {"scores": [1.0]}]))
    with pytest.raises(ConfigError, match="'responses' is 'a', expected a list of texts"):
        rerank(write([row | {"responses": "a"}]))
    with pytest.raises(ConfigError, match=r"neither 'response' \(text\) nor 'responses'"):
        rerank(write([{"prompt": "p"}]))


def test_options_are_checked(write, capsys):
    path = str(write(without_score(single_rows())))
    for options, message in (
        ([], "'score' is no column of "),
        ([], ": give --prm DIR, or name another column by --score-column"),
        (["--temperature", "0"], "--temperature is 0.0, expected a number above 0"),
        (["--subsets", "0"], "--subsets is 0, expected at least 1"),
        (["--tokens", "0"], "--tokens is 0"),
    ):
        assert main(["rerank", "--input", path, *options]) == 2
        assert message in capsys.readouterr().err
    nulls = [row | {"score": None} for row in single_rows()]
    with pytest.raises(ConfigError, match=r"'score' is null in all rows of .*: give --prm DIR"):
        rerank(write(nulls))
    with pytest.raises(ConfigError, match="--aggregate min makes scores of steps' scores, but the rows have a 'score'"):
        rerank(write(single_rows()), options=RerankOptions(aggregate="min"))
    missing = [nulls[0], *list(single_rows())[1:]]
    del missing[0]["score"]
    with pytest.raises(ConfigError, match="line 1: there is no 'score', but other rows have one"):
        rerank(write(missing))
    with pytest.raises(ConfigError, match="--aggregate is 'sum', expected one of mean, min, last, prod"):
        RerankOptions(aggregate="sum")


def test_verdicts_may_be_true_and_false(write):
    right = ("#### 1", "#### 1.0", r"\boxed{1}")
    rows = [row | {"verdict": row["response"] in right} for row in single_rows()]
    assert rerank(write(rows))["results"] == rerank(write(single_rows()))["results"]


def test_a_product_of_rewards_is_refused(tmp_path, write):
    path = make_model(tmp_path / "prm")
    content = json.loads((path / "config.json").read_text())
    described = PRMDescription(reward="logprob").model_dump(mode="json")
    (path / "config.json").write_text(json.dumps(content | {"repirl": described}))
    with pytest.raises(ConfigError, match="--aggregate prod multiplies chances, and the step scores of this PRM are"):
        rerank(write(without_score(single_rows())), prm=path, options=RerankOptions(aggregate="prod"))
