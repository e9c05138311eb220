"""The dual loop with vLLM as its sampler: in this process, asleep while models train, and as a server beside it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shared import MEASURED
from tiny import make_model, tiny_config

from repirl.configfile import describe
from repirl.loop import train
from repirl.report.log import read_metrics

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)

OPTIONS = {"prm": {"reward": "logprob"}, "irl": {"use_outcome": False}, "order": "policy_first", "steps": 3}


def lines(config):
    metrics = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in metrics]


def config_of(tmp_path, name, engine, **changes):
    # vLLM does not support heads of 8 channels.
    if not (tmp_path / "model").exists():
        make_model(tmp_path / "model", head_dim=32)
    rollout = {"engine": engine, "vllm": {"kv_cache_gib": 0.02}, **changes.pop("rollout", {})}
    return tiny_config(tmp_path, output_dir=str(tmp_path / name), rollout=rollout, **OPTIONS | changes)


@pytest.mark.parametrize("changes", [{}, {"adapters": {"rank": 4}}, {"offload_idle": True}])
def test_the_loop_runs_with_vllm_in_this_process(tmp_path, changes):
    config = config_of(tmp_path, "whole", "vllm", **changes)
    train(config)
    whole = lines(config)
    for line in whole[1:]:
        # The engine samples with the policy's own weights of each step.
        assert line["rollout/sampler_mismatch_max"] < 1e-4
        assert line["policy/grad_norm"] > 0
    # vLLM draws other random numbers than the built-in engine, but greedy responses are the same.
    plain = config_of(tmp_path, "plain", "transformers", **changes)
    train(plain)
    assert lines(plain)[0] == whole[0]
    parts = config_of(tmp_path, "parts", "vllm", **changes | {"steps": 1})
    train(parts)
    train(config_of(tmp_path, "parts", "vllm", **changes), resume=True)
    assert lines(parts)[2:] == whole[2:]


def test_an_engine_that_hangs_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path):
    whole = config_of(tmp_path, "whole", "vllm")
    train(whole)
    rollout = {"vllm": {"kv_cache_gib": 0.02, "timeout_seconds": 5}}
    config = config_of(tmp_path, "hung", "vllm", rollout=rollout)
    (tmp_path / "hung.yaml").write_text(describe(config))
    checkpoint = Path(config.output_dir) / "checkpoints" / "step_1"
    script = (
        "import sys, time; from pathlib import Path; from vllm.v1.engine import llm_engine\n"
        "step = llm_engine.LLMEngine.step\n"
        f"hang = lambda engine: time.sleep(1000) if Path({str(checkpoint)!r}).exists() else step(engine)\n"
        "llm_engine.LLMEngine.step = hang\n"
        "from repirl.cli import main\n"
        f"sys.exit(main(['train', '--config', {str(tmp_path / 'hung.yaml')!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:05)!" in done.stderr
    assert "in watched_step" in done.stderr
    train(config, resume=True)
    assert lines(config) == lines(whole)


def test_a_server_samples_beside_the_training(tmp_path, running_server):
    config_of(tmp_path, "unused", "vllm")
    with running_server(tmp_path / "model", max_model_len=2000) as (_, port):
        results = {}
        for overlap in ("none", "prm", "step"):
            vllm = {"url": f"http://127.0.0.1:{port}", "timeout_seconds": 120}
            config = config_of(tmp_path, overlap, "vllm_server", rollout={"overlap": overlap, "vllm": vllm})
            train(config)
            results[overlap] = lines(config)
    for line in results["none"][1:]:
        assert line["rollout/sampler_mismatch_max"] < 1e-4
    for ours, theirs in zip(results["prm"], results["none"], strict=True):
        for key in ("policy/loss", "prm/loss", "tokens", "eval/accuracy"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-3, abs=1e-6), key
    # From the second step on, the sampler's weights are one step old.
    assert results["step"][1]["rollout/sampler_mismatch_max"] < 1e-4
    assert results["step"][2]["rollout/sampler_mismatch_max"] > 1e-3
