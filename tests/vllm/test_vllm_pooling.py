"""An exported `value` PRM on a real vLLM server gives the rewards that it gives here: bias, activation and types."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from tiny import make_model, tiny_values

from repirl.apps import server as module
from repirl.apps.server import Server, served_prm
from repirl.apps.solutions import Columns, as_source, encode, read_solutions
from repirl.cli import main
from repirl.config import ConfigError
from repirl.export import export_checkpoint
from repirl.learner import Learner
from repirl.prm import load_prm
from repirl.serving import serve_command

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

SOLUTIONS = [("8+7-3=", "8+7=15; 15-3=12; #### 12"), ("8+7=", "#### 15"), ("1+2+3=", "1+2=3; 3+3=6; #### 6")] * 4


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The exported PRM of a run, with a head whose bias no test can overlook."""
    folder = tmp_path_factory.mktemp("pooling")
    # Heads of attention that vLLM's CPU kernels know.
    make_model(folder / "model", head_dim=32)
    values = tiny_values(folder, steps=1, prm={"reward": "value"}, eval={"every": 0})
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        original = Learner.load_model_state

        def load(self, state):
            original(self, state)
            if self.reads_values:
                generator = torch.Generator().manual_seed(1)
                self.model.score.weight.data.normal_(generator=generator)
                self.model.score.bias.data.fill_(0.7)

        patch.setattr(Learner, "load_model_state", load)
        export_checkpoint(values["output_dir"], folder / "out")
    rows = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in SOLUTIONS]
    (folder / "in.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def url(export):
    """A server that was started by the command in the model card."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    prm = str(export / "out" / "prm")
    words = serve_command(prm)
    assert words[:3] == ["vllm", "serve", prm]
    words[words.index("--port") + 1] = str(port)
    # The vllm script itself refuses to start for a CPU build, whose package has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", *words[2:]]
    command += ["--max-model-len", "128", "--enforce-eager", "--kv-cache-memory-bytes", str(16 << 20)]
    with open(export / "server.log", "w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log, start_new_session=True
        )
    server, deadline = Server(f"http://127.0.0.1:{port}"), time.monotonic() + 900
    try:
        while True:
            assert process.poll() is None, (export / "server.log").read_text()[-3000:]
            with contextlib.suppress(Exception):
                server.models()
                break
            assert time.monotonic() < deadline, (export / "server.log").read_text()[-3000:]
        yield server.url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_rewards_are_the_prms(export, url):
    loaded = load_prm(export / "out" / "prm", device="cpu")
    assert float(loaded.learner.model.score.bias) == pytest.approx(0.7)
    scorer, _ = served_prm(None, Server(url))
    solutions = read_solutions(as_source(str(export / "in.jsonl")), Columns())
    encoded = [encode(solution, loaded, None) for solution in solutions]
    pairs = [(list(one.prompt), list(one.response)) for one in encoded]
    for mine, theirs in zip(loaded.rewards(pairs), scorer.rewards(pairs), strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)
    assert scorer.window == 128


def test_files_are_scored_alike(export, url):
    arguments = ["score", "--input", str(export / "in.jsonl"), "--token-rewards", "--output"]
    assert main([*arguments, str(export / "here.jsonl"), "--prm", str(export / "out" / "prm"), "--device", "cpu"]) == 0
    assert main([*arguments, str(export / "there.jsonl"), "--server", url]) == 0
    here, there = (
        [json.loads(line) for line in (export / name).read_text().splitlines()]
        for name in ("here.jsonl", "there.jsonl")
    )
    assert len(here) == len(SOLUTIONS)
    for mine, theirs in zip(here, there, strict=True):
        assert list(mine) == list(theirs)
        assert theirs["rewards"] == pytest.approx(mine["rewards"], abs=1e-3)
        assert theirs["step_scores"] == pytest.approx(mine["step_scores"], abs=1e-3)
        assert theirs["score"] == pytest.approx(mine["score"], abs=1e-3)


def test_the_server_gives_raw_rewards_to_whoever_asks(export, url):
    """As clients without repirl ask; by default vLLM gives sigmoids."""
    probe = json.loads((export / "out" / "prm" / "probe.json").read_text())
    answer = Server(url)._ask("POST", "/pooling", {"input": probe["token_ids"]})
    [values] = [entry["data"] for entry in answer["data"]]
    assert [value for [value] in values[1:]] == pytest.approx(probe["rewards"], abs=1e-3)
    assert min(probe["rewards"]) < 0


def test_another_export_is_not_what_it_serves(export, url, monkeypatch):
    probe = module.read_probe(str(export / "out" / "prm"))
    monkeypatch.setattr(module, "read_probe", lambda _: type(probe)(probe.token_ids, [1.1 * r for r in probe.rewards]))
    with pytest.raises(ConfigError, match="which is not the PRM"):
        served_prm(None, Server(url))
