"""examples/: every script runs, small, as its own text says; so does what README does from Python."""

import importlib
import json
import re

import pytest
import yaml
from pooling_server import pooling_server
from shared import ROOT
from tiny import make_data, make_model, make_step_prm, tiny_values

from repirl.cli import main
from repirl.prm import load_prm
from repirl.serving import Probe

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model and its data: model, train.jsonl, eval.jsonl."""
    folder = tmp_path_factory.mktemp("examples")
    make_data(folder)
    make_model(folder / "model")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as in its folder; returns what it prints."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(name, *arguments):
        importlib.import_module(name).main(*map(str, arguments))
        return capsys.readouterr().out

    return call


def test_every_example_is_listed():
    listed = re.findall(r"^\| \[(.+?)\]\((.+?)\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert all(name == link for name, link in listed)
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert sorted(name for name, _ in listed) == sorted(files)


def test_own_data(run, files, tmp_path):
    shown = run("own_data", files / "model", tmp_path, 1)
    assert "turn 1: mean outcome" in shown
    # What the data check says of the file.
    assert "64" in shown.split("turn 1")[0]


def test_own_verifier(run, files, tmp_path):
    assert "turn 1: mean outcome" in run("own_verifier", files / "model", files / "train.jsonl", tmp_path / "run", 1)


def test_own_objective(run, files, tmp_path, capsys):
    shown = run("own_objective", files / "model", files / "train.jsonl", tmp_path / "run", 1)
    assert "responses learned" in shown
    # What is written beside it for the command line.
    text = (EXAMPLES / "own_objective.py").read_text()
    assert "repirl plan  --preset demo --objective own_objective:BEST_OF_GROUP" in text
    model = ["--policy.model", str(files / "model")]
    assert (
        main(["plan", "--preset", "demo", "--objective", "own_objective:BEST_OF_GROUP", "--memory", "24", *model]) == 0
    )
    assert "planned for a CPU, as device 'cpu' says" in capsys.readouterr().out


def test_callbacks(run, files, tmp_path):
    shown = run("callbacks", files / "model", files / "train.jsonl", files / "eval.jsonl", tmp_path / "run", 6)
    # A random model answers nothing right: the three evaluations after that of the start end the run.
    assert "ended after 3 turns; best 0.0% at turn 0" in shown
    assert "turn 1: held-out accuracy" in shown


def test_ops_in_a_loop(run):
    shown = run("ops_in_a_loop", 40)
    first, *_, last = (float(share) for share in re.findall(r"([\d.]+)% of the tokens", shown))
    assert last > 3 * first, shown


def test_prm_service(run, tmp_path, monkeypatch):
    path = make_step_prm(tmp_path)
    prm = load_prm(path, device="cpu")
    ids = list(range(3, 13))
    Probe(ids, prm.rewards([(ids[:1], ids[1:])])[0].tolist()).save(path)
    config = json.loads((path / "config.json").read_text())
    config["repirl"]["steps"] |= {"score": "tokens", "aggregate": "mean"}
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": p, "response": r} for p in ("8+7=", "1+2=") for r in ("8+7=15; #### 15", "1+2=3; #### 3")]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pooling_server(prm, str(path)) as server:
        shown = run("prm_service", server.url, path, tmp_path / "samples.jsonl", tmp_path / "scored.jsonl")
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer secret"}
        service = importlib.import_module("prm_service").PRMService(server.url)
        pairs = prm.encode([(row["prompt"], row["response"]) for row in rows])
        for rewards, expected in zip(service.rewards(pairs), prm.rewards(pairs), strict=True):
            assert rewards == pytest.approx(expected.tolist(), abs=1e-5)
        server.change = lambda values: [x + 0.1 for x in values]
        with pytest.raises(RuntimeError, match=r"does not serve .*: the rewards of its probe are off by 0\.1"):
            service.check(path)
    lines = shown.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["8+7=", "1+2="]
    scores = [[float(line.split()[0]) for line in lines[i : i + 2]] for i in (1, 4)]
    assert all(a >= b for a, b in scores)
    scored = [json.loads(line)["score"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert sorted([*scores[0], *scores[1]]) == pytest.approx(sorted(scored), abs=1e-4)


def test_the_readmes_training_from_python(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    [block] = re.findall(r"```python\n(from repirl import EarlyStopping.*?)```", readme, re.DOTALL)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tiny_values(tmp_path, objective="sft", steps=2)))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["turns"] == 2
