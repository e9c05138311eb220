"""`repirl eval --benchmark` of answers: what is asked, kept, judged and shown, and that it goes on after a kill."""

import json
from dataclasses import replace

import pytest
from tiny import make_model

from repirl.apps import eval_answers
from repirl.apps.eval_answers import GradeOptions, eval_model, eval_responses, print_result
from repirl.apps.eval_commands import ANSWER_BENCHMARKS, STEP_BENCHMARKS
from repirl.apps.eval_sampling import AskOptions, ask, sampled
from repirl.apps.eval_steps import READERS
from repirl.cli import main
from repirl.config import ConfigError
from repirl.evals import BENCHMARKS

QUESTIONS = ["8+7-3=", "1+2=", "9-4+2=", "5+5=", "7-1="]
ANSWERS = ["8+7=15; 15-3=12; #### 12", "#### 3", "#### 7", "#### 10", "#### 6"]
FEW = AskOptions(samples=2, max_response_tokens=6, changes={"rollout": {"max_sequences": 6}})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "policy"))


@pytest.fixture
def data(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return write(tmp_path / "gsm8k.jsonl", rows)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def describe(model, prompt):
    """Let the model say of itself how it was asked in training."""
    path = model / "config.json"
    content = json.loads(path.read_text())
    content["repirl"] = {"format": 1, "role": "policy", "temperature": 1.0, "prompt": prompt}
    path.write_text(json.dumps(content))
    return str(model)


def test_a_model_is_asked_and_its_responses_are_kept(tmp_path, data, model, capsys):
    arguments = ["--model", model, "--samples", "2", "--max-response-tokens", "6", "--prompt", "{problem}"]
    output = tmp_path / "out"
    more = ["--output", str(output), "--rollout.max_sequences", "6", "--seed", "1", "--resamples", "50"]
    assert main(["eval", "--benchmark", "gsm8k", "--data", data, *arguments, *more]) == 0
    rows, result = rows_of(output / "responses.jsonl"), json.loads((output / "results.json").read_text())
    shown = capsys.readouterr().out
    assert [(row["id"], row["sample"]) for row in rows] == [(str(i), s) for i in range(5) for s in (None, 0, 1)]
    assert [row["prompt"] for row in rows[::3]] == QUESTIONS
    assert {row["temperature"] for row in rows} == {0.0, 0.8}
    assert all(row["tokens"] == 6 or row["finished"] for row in rows)
    assert (result["problems"], result["answered"], result["asked"]["seed"]) == (5, 5, 1)
    assert list(result["figures"]) == ["greedy pass@1", "avg@2", "pass@2", "maj@2"]
    truncated = sum(not row["finished"] for row in rows if row["sample"] is None) / 5
    assert result["greedy"]["truncated"] == truncated
    kinds = [row["reason"].partition(":")[0] for row in rows if row["sample"] is not None]
    unread = sum(kind in BENCHMARKS["gsm8k"].unreadable for kind in kinds)
    assert result["sampled"]["unreadable"] == unread > 0
    assert "gsm8k: 5 problems" in shown
    assert f"5 greedy responses: {truncated:.1%} cut off" in shown
    assert f"10 sampled responses: {result['sampled']['truncated']:.1%} cut off, {unread} with no answer" in shown
    # The same figures without the model, of what it said.
    again = eval_responses("gsm8k", data, output / "responses.jsonl", grading=GradeOptions(seed=1, resamples=50))
    for name in ("figures", "greedy", "sampled", "votes"):
        assert again[name] == result[name]


def test_what_was_killed_goes_on_to_the_same_bytes(tmp_path, data, model, monkeypatch):
    # A grader whose process starts quickly.
    monkeypatch.setitem(BENCHMARKS, "gsm8k", replace(BENCHMARKS["gsm8k"], grader="judges:even_length"))

    def bytes_of(name):
        return [(tmp_path / name / file).read_bytes() for file in ("responses.jsonl", "results.json")]

    for name in "ab":
        eval_model("gsm8k", data, model, tmp_path / name, FEW)
    assert bytes_of("a") == bytes_of("b")

    def killed(*arguments):
        yield next(sampled(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval_answers, "sampled", killed)
        with pytest.raises(KeyboardInterrupt):
            eval_model("gsm8k", data, model, tmp_path / "c", FEW)
    assert len(rows_of(tmp_path / "c" / "responses.jsonl")) == 6
    with pytest.raises(ConfigError, match="holds 6 of 15 rows; go on with it by --resume"):
        eval_model("gsm8k", data, model, tmp_path / "c", FEW)
    other = AskOptions(2, 0.5, 6, changes=FEW.changes)
    with pytest.raises(ConfigError, match=r"was made with temperature 0\.8, now it is 0\.5"):
        eval_model("gsm8k", data, model, tmp_path / "c", other, resume=True)
    eval_model("gsm8k", data, model, tmp_path / "c", FEW, resume=True)
    assert bytes_of("c") == bytes_of("a")
    # A complete file is judged no more: its figures are computed again, without the model.
    monkeypatch.setattr(eval_answers, "policy_sampler", None)
    eval_model("gsm8k", data, model, tmp_path / "c", FEW, resume=True)
    assert bytes_of("c") == bytes_of("a")


def test_an_export_is_asked_as_it_was_trained(tmp_path, data):
    plain = make_model(tmp_path / "plain")

    def asked(model, **options):
        return ask(BENCHMARKS["gsm8k"], data, str(model), "out", AskOptions(**options))

    # No words of the benchmark, which this model has never seen, and its own template around the problem.
    trained = describe(make_model(tmp_path / "trained"), {"chat_template": False, "prompt_template": "1+{prompt}"})
    result = asked(trained)
    assert [problem.prompt for problem in result.problems] == QUESTIONS
    assert result.tokenizer.decode(result.prompts[1].token_ids) == "1+1+2="
    assert asked(trained, prompt="2{problem}3").problems[1].prompt == "21+2=3"
    assert "reason step by step" in asked(plain).problems[0].prompt
    assert not asked(plain).config.data.chat_template
    tokenizer = result.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(plain)
    assert asked(plain).config.data.chat_template
    assert not asked(plain, changes={"data": {"chat_template": False}}).config.data.chat_template
    # A response ends where the model's window does.
    assert asked(plain).config.rollout.max_response_tokens == 1024
    content = json.loads((plain / "config.json").read_text())
    longest = asked(plain).config.data.max_prompt_tokens
    (plain / "config.json").write_text(json.dumps(content | {"max_position_embeddings": longest + 9}))
    assert asked(plain).config.rollout.max_response_tokens == 9
    assert len(asked(plain, problems=2).problems) == 2
    (plain / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 3}))
    with pytest.raises(ConfigError, match=r"the longest prompt has .* tokens, but .* positions for 3 only"):
        asked(plain)


def test_given_responses_are_judged(tmp_path, data, capsys):
    rows = [
        {"prompt": "8+7-3=", "response": "it is \\boxed{12}", "finished": True, "temperature": 0.0},
        {"prompt": "8+7-3=", "response": "#### 12", "finished": True, "temperature": 1.0},
        {"id": 0, "response": "#### 11", "finished": False},
        {"question": "1+2=", "responses": ["#### 4", "#### 4", "#### 3", "#### " + "x" * 600]},
    ]
    given, output = write(tmp_path / "given.jsonl", rows), tmp_path / "out"
    command = ["eval", "--benchmark", "gsm8k", "--data", data, "--responses", given, "--output", str(output)]
    assert main(command) == 0
    shown, result = capsys.readouterr().out, json.loads((output / "results.json").read_text())
    values = {name: figure["value"] for name, figure in result["figures"].items()}
    # One of two and one of four; of two: 1 and 1 - C(3, 2) / C(4, 2); the first of two answers wins, as a tie does.
    assert values == {"avg@2": 0.375, "pass@2": 0.75, "maj@2": pytest.approx((1 + 1 / 6) / 2)}
    assert "gsm8k: 2 problems" in shown
    assert "3 of 5 problems have no response, and are left out" in shown
    assert "1 greedy responses: 0.0% cut off, 0 with no answer" in shown
    assert "6 sampled responses: 50.0% cut off, 1 with no answer" in shown
    assert "1 problems have a tie among all their responses" in shown
    kept = rows_of(output / "responses.jsonl")
    assert [row["verdict"] for row in kept] == [1, 1, 0, 0, 0, 1, 0]
    assert [row["sample"] for row in kept] == [None, 0, 1, 0, 1, 2, 3]
    assert kept[2]["reason"] == "differs: 11 vs 12"
    assert main(command) == 2
    assert "holds 'responses.jsonl' already: choose another folder" in capsys.readouterr().err


def test_what_could_not_be_judged_is_told(tmp_path, data, capsys):
    rows = [{"question": "1+2=", "answer": "#### " + "x" * 600}, {"question": "2+2=", "answer": "4"}]
    problems = write(tmp_path / "odd.jsonl", rows)
    given = write(tmp_path / "a.jsonl", [{"id": i, "response": "#### 4", "temperature": 0} for i in (0, 1)])
    result = eval_responses("gsm8k", problems, given)
    assert result["greedy"]["reasons"] == {"too long": 1, "equal": 1}
    result["greedy"]["reasons"] = {"right answer not readable": 1, "timed out": 2}
    print_result(result)
    shown = capsys.readouterr().out
    assert "1 of them count as wrong because the right answer of the data could not be read" in shown
    assert "2 of them count as wrong because judging them took longer than --timeout" in shown
    assert "maj@k" not in shown


def test_the_command_line_names_every_benchmark():
    assert set(ANSWER_BENCHMARKS) == set(BENCHMARKS)
    assert set(STEP_BENCHMARKS) == set(READERS)


def test_stops_end_responses(tmp_path, data, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "gsm8k", replace(BENCHMARKS["gsm8k"], stop=("\nQ:",)))
    given = write(tmp_path / "a.jsonl", [{"id": 1, "response": "#### 3\nQ: #### 4", "finished": False}])
    result = eval_responses("gsm8k", data, given)
    assert result["figures"]["avg@1"] == {"value": 1.0, "low": None, "high": None}
    assert result["sampled"]["truncated"] == 0.0


def test_what_cannot_be_judged_is_refused(tmp_path, data, model, capsys):
    def refused(*arguments):
        assert main(["eval", "--benchmark", "gsm8k", *arguments]) == 2
        return capsys.readouterr().err

    def refused_row(**row):
        return refused("--data", data, "--responses", write(tmp_path / "r.jsonl", [row]))

    assert "needs its data: give --data FILE" in refused()
    with pytest.raises(ConfigError, match="--benchmark is 'gsm9k', expected one of gsm8k"):
        eval_responses("gsm9k", data, data)
    assert "give one of --model DIR and --responses FILE" in refused("--data", data)
    assert "names 2 files, expected one" in refused("--data", data, data, "--model", model)
    assert "give --output DIR" in refused("--data", data, "--model", model)
    assert "--samples is for --model" in refused("--data", data, "--responses", data, "--samples", "2")
    assert "--rollout is for --model" in refused("--data", data, "--responses", data, "--rollout.engine", "vllm")
    assert "--resume is for --model" in refused("--data", data, "--responses", data, "--resume")
    assert "--config is not for benchmarks" in refused("--config", "a.yaml")
    asked = ("--data", data, "--model", model, "--output", str(tmp_path / "out"))
    assert "--samples is -1, expected at least 0" in refused(*asked, "--samples", "-1")
    assert "--temperature is 0.0, expected a number above 0" in refused(*asked, "--temperature", "0")
    assert "--prompt is 'x', expected a text with {problem}" in refused(*asked, "--prompt", "x")
    assert "--rollout.temperature is not for benchmarks: use --temperature" in refused(
        *asked, "--rollout.temperature", "1"
    )
    assert "unknown option 'rollout.egnine'" in refused(*asked, "--rollout.egnine", "vllm")
    assert not (tmp_path / "out").exists()
    assert "line 1: 'id' is 9, which no problem of --data has" in refused_row(id=9, response="3")
    assert "line 1: no problem of --data has its 'prompt'" in refused_row(prompt="9+9=", response="3")
    assert "line 1: there is neither 'response'" in refused_row(id=1, answer="3")
    assert "line 1: 'finished' is 'no'" in refused_row(id=1, response="3", finished="no")
    assert "line 1: 'temperature' is -1" in refused_row(id=1, response="3", temperature=-1)
    assert main(["eval", "--model", model, "--preset", "demo"]) == 2
    assert "--model is for benchmarks: give --benchmark NAME, too" in capsys.readouterr().err
