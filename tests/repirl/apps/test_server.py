"""A PRM on a server gives what it gives here; another model, and a server that fails, are told in words and in time."""

import json
import re
import shlex
import socket
import time
from urllib.request import Request, urlopen

import pytest
import torch
from pooling_server import pooling_server
from shared import ROOT
from tiny import make_model, make_step_prm

from repirl.apps import server as module
from repirl.apps.server import Server, served_prm
from repirl.apps.trained import Placed
from repirl.cli import main
from repirl.config import ConfigError, RunError
from repirl.models import load_model
from repirl.prm import PRMDescription, ReferenceModel, StepRule, load_prm
from repirl.serving import read_probe, serve_command, take_probe

PAIRS = [("8+7-3=", "8+7=15; 15-3=12; #### 12"), ("8+7=", "#### 15"), ("2+2=", ""), ("1+2+3=", "1+2=3; 3+3=6; #### 6")]


def make_prm(folder, reward="value", score="tokens"):
    """A PRM of random weights that describes itself, as an export does."""
    path = make_step_prm(folder) if reward == "value" else make_model(folder / "prm")
    reference = ReferenceModel(model=str(path), gguf_file=None) if reward == "implicit" else None
    rule = StepRule(rule="separator", separator="; ", score=score)
    described = PRMDescription(reward=reward, steps=rule, reference=reference)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"repirl": described.model_dump(mode="json")}))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_probe(path):
    model = load_model(str(path), kind="trained value", dtype=torch.float32, device=torch.device("cpu"))
    take_probe(model).save(path)
    return path


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    path = make_prm(tmp_path_factory.mktemp("value"), "value")
    return with_probe(path)


@pytest.fixture
def served(prm, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    with pooling_server(load_prm(prm, device="cpu"), str(prm)) as server:
        yield server


def call(folder, name, *arguments):
    rows = [json.dumps({"prompt": p, "response": r}) for p, r in PAIRS]
    (folder / "in.jsonl").write_text("\n".join(rows))
    return main(["score", "--input", str(folder / "in.jsonl"), "--output", str(folder / name), *arguments])


def test_scores_by_a_server_are_the_prms(tmp_path, prm, served, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert call(tmp_path, "here.jsonl", "--prm", str(prm), "--token-rewards", "--device", "cpu") == 0
    here = rows_of(tmp_path / "here.jsonl")
    # Batches of few tokens; with --prm, and by the server's name of it.
    for name, given_prm in [("a.jsonl", ["--prm", str(prm)]), ("b.jsonl", [])]:
        arguments = ["--server", served.url, *given_prm, "--token-rewards", "--tokens", "40"]
        assert call(tmp_path, name, *arguments) == 0
        for row, other in zip(rows_of(tmp_path / name), here, strict=True):
            assert list(row) == list(other)
            assert row["response"] == other["response"]
            assert row["rewards"] == pytest.approx(other["rewards"], abs=1e-5)
            assert row["step_scores"] == pytest.approx(other["step_scores"], abs=1e-5)
            assert row["score"] == pytest.approx(other["score"], abs=1e-5)
    shown = capsys.readouterr()
    assert re.search(r"^score: \d+ tokens in [\d.]+ s, \d+ tokens/s$", shown.err, re.M)
    path, headers, body = served.requests[-1]
    assert path == "/pooling"
    assert headers["Authorization"] == "Bearer secret"
    assert {**body, "input": None} == {
        "model": "served-prm",
        "input": None,
        "task": "token_classify",
        "use_activation": False,
    }


def test_a_prm_of_steps_gives_chances(tmp_path, served):
    path = with_probe(make_prm(tmp_path, "value", "end"))
    loaded = load_prm(path, device="cpu")
    with pooling_server(loaded, str(path)) as server:
        scorer, _ = served_prm(path, Server(server.url))
        encoded = loaded.encode(PAIRS[:1])
        [reward] = scorer.rewards(encoded)
        chances = scorer.score_steps(reward, (6, 14, 18))
    torch.testing.assert_close(chances, loaded.step_scores(PAIRS[:1])[0])
    assert all(0 < chance < 1 for chance in chances)


def test_a_killed_call_goes_on_by_the_server_alone(tmp_path, prm, served, monkeypatch, capsys):
    arguments = ["--server", served.url, "--tokens", "4"]
    monkeypatch.setattr("repirl.apps.score.BATCHES_PER_PART", 1)
    assert call(tmp_path, "whole.jsonl", *arguments) == 0
    asked = []

    def fails(path, body):
        asked.append(path)
        return (400, b"no more") if len(asked) > 4 else None

    served.answer = fails
    assert call(tmp_path, "out.jsonl", *arguments) == 1
    assert "answers /pooling with status 400: no more" in capsys.readouterr().err
    assert 0 < len(rows_of(tmp_path / "out.jsonl")) < len(PAIRS)
    served.answer = lambda path, body: None
    # Rewards computed here are not mixed with a server's.
    assert call(tmp_path, "out.jsonl", "--prm", str(prm), "--tokens", "4", "--resume", "--device", "cpu") == 2
    assert "was made with computed by 'a server, in float32'" in capsys.readouterr().err
    assert call(tmp_path, "out.jsonl", *arguments, "--resume") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_another_model_is_refused(tmp_path, prm, served):
    def refused(**options):
        with pytest.raises(ConfigError) as error:
            served_prm(prm, Server(served.url), **options)
        return str(error.value)

    served.change = lambda values: [1.3 * x for x in values]
    assert re.search(r"serves 'served-prm', which is not the PRM '.*prm' \(its rewards of the probe are off", refused())
    assert "say so by --dtype bfloat16" in refused()
    served.change = lambda values: torch.tensor(values).sigmoid().tolist()
    message = refused()
    assert "gives the sigmoid of rewards, not rewards: start it by: vllm serve" in message
    assert """--pooler-config '{"task": "token_classify", "use_activation": false}'""" in message
    served.change = lambda values: [x + 0.25 for x in values]
    assert "rewards that are all larger by 0.25 than those of" in refused()
    # In a shorter type rewards are rounded; in float32 that is another model.
    served.change = lambda values: [x * 1.01 for x in values]
    assert "--dtype bfloat16" in refused()
    assert served_prm(prm, Server(served.url), Placed(dtype="bfloat16"))[1]["computed by"] == "a server, in bfloat16"
    served.change = lambda values: [1.3 * x for x in values]
    assert "is not the PRM" in refused(placed=Placed(dtype="bfloat16"))


@pytest.mark.parametrize("reward", ["logprob", "implicit", "logit", "soft_q"])
def test_rewards_that_are_read_off_logits_are_refused(tmp_path, served, reward):
    path = make_prm(tmp_path, reward)
    with pytest.raises(ConfigError, match=f"has rewards of kind '{reward}', which are read off logits"):
        served_prm(path, Server(served.url))


def test_what_no_server_can_serve_is_refused(tmp_path, prm, served, capsys):
    (bare := tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match=r"has no probe.json.*: export it again"):
        served_prm(make_step_prm(bare), Server(served.url))
    (prm / "probe.json").rename(prm / "kept.json")
    try:
        for content in ["{}", '{"token_ids": [1, 2], "rewards": [1, 2]}', '{"token_ids": [1, "a"], "rewards": [1]}']:
            (prm / "probe.json").write_text(content)
            with pytest.raises(ConfigError, match="is no probe of a PRM"):
                served_prm(prm, Server(served.url))
    finally:
        (prm / "kept.json").rename(prm / "probe.json")

    def refused(*arguments):
        assert call(tmp_path, "out.jsonl", *arguments) == 2
        assert not (tmp_path / "out.jsonl").exists()
        return capsys.readouterr().err

    assert "give a trained PRM by --prm DIR, or a server by --server URL" in refused()
    assert "--server is 'localhost:8000', expected an address such as http" in refused("--server", "localhost:8000")
    assert "--server-timeout is 0, expected" in refused("--server", served.url, "--server-timeout", "0")
    assert "--device cpu: the server at http://127.0.0.1" in refused("--server", served.url, "--device", "cpu")
    served.root = None
    assert "does not say which model it serves: give --prm DIR" in refused("--server", served.url)
    # Rows longer than what the server takes are named before anything is scored.
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1+1=", "response": "1+1=2; " * 20}))
    arguments = ["--server", served.url, "--prm", str(prm), "--input", str(tmp_path / "long.jsonl")]
    assert main(["score", *arguments, "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "long.jsonl, line 1: " in (message := capsys.readouterr().err)
    assert "window has 64" in message


def test_a_server_that_is_not_there_or_no_vllm(prm, served):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = Server(f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(RunError, match=r"is not there \(.*refused\): start it by: vllm serve .* \(asked 4 times\)"):
        served_prm(prm, gone)

    def failing(answer):
        served.answer = answer
        served.requests.clear()
        with pytest.raises(RunError) as error:
            served_prm(prm, Server(served.url, timeout_seconds=0.2))
        return str(error.value), [path for path, _, _ in served.requests]

    message, _ = failing(lambda path, body: (404, b"Not Found"))
    assert "answers /v1/models with status 404: Not Found; start it by: vllm serve" in message
    message, _ = failing(lambda path, body: (200, b"<html>"))
    assert 'answers /v1/models with "<html>", which a vLLM server does not: is it one?' in message
    message, _ = failing(lambda path, body: (200, b'{"data": []}'))
    assert "which a vLLM server does not" in message
    message, _ = failing(lambda path, body: (401, b'{"error": "Unauthorized"}'))
    assert "give its key in the environment variable VLLM_API_KEY" in message
    # A server that is busy is asked again, a few times.
    message, paths = failing(lambda path, body: (503, b"") if body else None)
    assert "answers /pooling with status 503: nothing (asked 4 times)" in message
    assert paths == ["/v1/models", *["/pooling"] * 4]
    # One that is slow is not.
    message, paths = failing(lambda path, body: time.sleep(0.4) if body else None)
    assert "did not answer /pooling within 0.2 s: give it longer by --server-timeout" in message
    assert paths == ["/v1/models", "/pooling"]
    # It recovers.
    answers = iter([(503, b""), (429, b"")])
    served.answer = lambda path, body: next(answers, None)
    assert served_prm(prm, Server(served.url))[0].window == 64


def test_a_wrong_number_of_values_is_no_reward(prm, served):
    def failing():
        with pytest.raises(RunError) as error:
            served_prm(prm, Server(served.url))
        return str(error.value)

    served.change = lambda values: values[1:]
    assert "gave values of shape [31, 1] for 32 tokens, expected one for each token" in failing()
    served.change = lambda values: values
    two = {"data": [{"index": 0, "data": [[0.1, 0.9]] * 32}]}
    served.answer = lambda path, body: (200, json.dumps(two).encode()) if body else None
    assert "gave values of shape [32, 2] for 32 tokens" in failing()
    served.answer = lambda path, body: (200, b'{"data": []}') if body else None
    assert "gave values of 0 sequences for 1" in failing()
    served.answer = lambda path, body: (200, b'{"data": [{"index": 0, "data": ["a"]}]}') if body else None
    assert "answers /pooling with" in failing()


def test_a_probe_is_of_the_weights_as_exported(tmp_path):
    path = make_prm(tmp_path, "value")
    probe = read_probe(str(with_probe(path)))
    assert len(probe.token_ids) == 32
    [rewards] = load_prm(path, device="cpu").rewards([(probe.token_ids[:1], probe.token_ids[1:])])
    torch.testing.assert_close(torch.tensor(probe.rewards), rewards)
    # Computed in float32 whatever the weights are, which stay what they were.
    model = load_model(str(path), kind="trained value", dtype=torch.bfloat16, device=torch.device("cpu"))
    rounded = take_probe(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    [expected] = load_prm(path, device="cpu", dtype=torch.bfloat16).rewards(
        [(probe.token_ids[:1], probe.token_ids[1:])]
    )
    assert 0 < (torch.tensor(rounded.rewards) - expected).abs().max() < 0.5


def readme():
    """What README says of serving."""
    return (ROOT / "README.md").read_text().partition("## Serve a PRM\n")[2].partition("\n## ")[0]


def commands(text):
    """The commands in indented lines, as words."""
    lines = re.findall(r"^    (.+)$", text.replace("\\\n", " ").partition("```")[0], re.M)
    return [shlex.split(line) for line in lines]


def test_readme_starts_a_server_as_messages_do():
    [serve, score, _] = commands(readme())
    assert serve == serve_command("out/prm")
    assert score[:4] == ["repirl", "score", "--server", "http://127.0.0.1:8000"]
    assert "bfloat16" in serve_command("out/prm", "bfloat16")


def test_clients_in_readme_get_rewards(prm, served):
    loaded = load_prm(prm, device="cpu")
    [_, _, curl] = commands(readme())
    address, header, body = curl[1], curl[3], curl[5]
    request = Request(address.replace("http://127.0.0.1:8000", served.url), body.encode())
    request.add_header(*header.split(": "))
    with urlopen(request) as answer:
        values = [value for [value] in json.load(answer)["data"][0]["data"]]
    ids = json.loads(body)["input"][0]
    assert values[1:] == pytest.approx(loaded.rewards([(ids[:1], ids[1:])])[0].tolist(), abs=1e-5)

    code = readme().partition("```python\n")[2].partition("```")[0]
    result = {}
    exec(code.replace("http://127.0.0.1:8000", served.url).replace("out/prm", str(prm)), result)
    [expected] = loaded.rewards([("8+7-3=", "8+7=15; 15-3=12; #### 12")])
    assert result["rewards"] == pytest.approx(expected.tolist(), abs=1e-5)
