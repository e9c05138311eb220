"""A sharded policy over two processes of torchrun: an engine in each, and one engine over both."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from shared import ROOT

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; make test-vllm", allow_module_level=True)


@pytest.mark.parametrize(
    ("tensor_parallel", "models"),
    [
        (1, [("llama", False, 2)]),
        # There are fewer heads of keys and values (one) than processes: both hold it.
        (2, [("qwen2", True, 2), ("qwen3", False, 1)]),
    ],
)
def test_engines_of_a_sharded_policy(tmp_path, make_policy, tensor_parallel, models):
    for architecture, tied, num_key_value_heads in models:
        make_policy(tmp_path, tied=tied, architecture=architecture, num_key_value_heads=num_key_value_heads)
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/vllm/sharded_rollouts.py"), str(result), str(tensor_parallel), *paths]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    by_rank = json.loads(result.read_text())
    assert len(by_rank) == 2
    for rank, reports in enumerate(by_rank):
        assert len(reports) == len(models)
        for report in reports:
            assert report["difference"] < 1e-4
            assert "worst model.layers.0.mlp.gate_proj.weight" in report["problem"]
            assert report["environment"] == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            assert report["num_first"] == (1 if rank == 0 else 0)
            assert len(report["lengths"]) == 5
