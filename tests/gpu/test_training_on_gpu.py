"""The trainer on a GPU: the same gradients as on a CPU, and the dual loop with every switch that only a GPU has.

Without a GPU, ``TRITON_INTERPRET=1`` runs on the CPU the tests that do not need one.
"""

import importlib.util
import math
import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device", allow_module_level=True)
if any(importlib.util.find_spec(name) is None for name in ("pydantic", "rich", "yaml", "math_verify")):
    pytest.skip("the trainer's dependencies are not installed", allow_module_level=True)

from tiny import gradients, make_model, objective, tiny_config

from repirl.attention import PackedLayout, _torch_kernel, packed_attention
from repirl.batch import pack
from repirl.distributed.offload import Residency
from repirl.distributed.world import World, leave_world
from repirl.learner import Learner, enable_checkpointing
from repirl.loop import train
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.report.log import read_metrics

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda", 0)
PAIRS = [([3, 4, 5], [6, 7, 8, 9, 10, 1]), ([9], [10, 1]), ([4, 4], [5]), ([3] * 9, [4, 5, 6, 1])]
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _leave_world():
    yield
    leave_world()


def learner(path, device, *, checkpointing=False, offload=False):
    model = load_model(str(path), kind="causal", dtype=torch.float32, device=device)
    if checkpointing:
        enable_checkpointing(model, offload=offload)
    optimizer = OptimizerConfig(lr=1e-2, max_grad_norm=1e9)
    return Learner(model, optimizer, tokens_per_microbatch=12, world=World(device))


def loss(outputs, micro):
    return -(outputs["logprob"] * micro.read("weight")).sum() + 0.1 * outputs["entropy"].sum()


def batch():
    result = pack(PAIRS)
    result.write("weight", torch.linspace(-1, 1, result.num_response_tokens))
    return result


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}])
def test_gradients_are_the_cpus(tmp_path, options):
    path = make_model(tmp_path / "model", head_dim=16)
    ours = gradients(learner(path, DEVICE, **options), batch(), loss)
    expected = gradients(learner(path, torch.device("cpu")), batch(), loss)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name].cpu(), value, rtol=1e-3, atol=1e-5)


@needs_gpu
def test_activations_that_wait_in_host_memory_give_the_same_gradients(tmp_path):
    path = make_model(tmp_path / "model", head_dim=16)
    offloaded = learner(path, DEVICE, checkpointing=True, offload=True)
    ours, expected = gradients(offloaded, batch(), loss), gradients(learner(path, DEVICE), batch(), loss)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("kernel", ["torch", "whichever"])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_variable_length_kernels_are_attention(kernel, num_key_heads):
    """Values and gradients equal those of attention without a kernel, in groups of sequences and in float64."""
    lengths = torch.tensor([0, 7, 70, 71, 200])
    layout = PackedLayout(lengths, DEVICE)
    shapes = [(200, heads, 64) for heads in (4, num_key_heads, num_key_heads)]
    exact = [torch.randn(shape, device=DEVICE, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]

    def packed(tensors):
        return packed_attention(None, *(x.transpose(0, 1)[None] for x in tensors), None, None, layout)[0][0]

    actual = _torch_kernel(*rounded, layout, None) if kernel == "torch" else packed(rounded)
    expected = packed(exact)
    upstream = torch.randn_like(expected)
    actual.backward(upstream.bfloat16())
    expected.backward(upstream)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=3e-2)
    for ours, theirs in zip(rounded, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=6e-2)


@needs_gpu
def test_an_idle_model_leaves_the_gpu(tmp_path):
    path = make_model(tmp_path / "model", head_dim=512)
    residency = Residency(tmp_path / "offload")
    first, second = (learner(path, DEVICE) for _ in range(2))
    first.update(batch(), objective(loss))
    before = {n: w.clone().cpu() for n, w in first.model.named_parameters()}
    # Each weight has two moments; small tensors stay on the GPU.
    large = sum(3 * w.nbytes for w in before.values() if w.nbytes >= 1 << 16)
    assert large > 0
    held = torch.cuda.memory_allocated()
    residency.add(first)
    assert held - torch.cuda.memory_allocated() >= large
    residency.add(second)
    second.update(batch(), objective(loss))
    first.score(batch())
    assert all(torch.equal(w.cpu(), before[n]) for n, w in first.model.named_parameters())
    assert not (tmp_path / "offload").exists()
    residency.close()


BOTH = {"gradient_checkpointing": True, "activation_offload": True}
SWITCHES = {
    "none": {},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "bfloat16 by default": {"compute_dtype": None},
    "cpu_offload": {"parallel": {"cpu_offload": True}},
    "bfloat16 and cpu_offload": {"compute_dtype": "bfloat16", "parallel": {"cpu_offload": True}},
    "activation_offload": {"policy": BOTH, "prm": BOTH},
    "offload_idle": {"offload_idle": True},
    "offload_idle in bfloat16": {"offload_idle": True, "compute_dtype": "bfloat16"},
    "adapters": {"adapters": {"rank": 4}, "irl": {"base_measure": "reference"}},
    "adapters in bfloat16": {"adapters": {"rank": 4}, "compute_dtype": "bfloat16"},
    "asynchronous checkpoints": {"checkpoint": {"asynchronous": True}},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_dual_loop_runs_and_resumes(tmp_path, switch):
    changes = SWITCHES[switch]
    if DEVICE.type == "cpu" and ("cpu_offload" in str(changes) or "activation_offload" in str(changes)):
        pytest.skip("needs a CUDA device")
    values = {"device": DEVICE.type, "steps": 2, "eval": {"every": 0}, "compute_dtype": "float32"} | changes
    make_model(tmp_path / "model", head_dim=16)
    train(tiny_config(tmp_path, **values))
    leave_world()
    train(tiny_config(tmp_path, **values | {"steps": 3}), resume=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert "nonfinite" not in line
        assert math.isfinite(line["prm/loss"])
        assert line["policy/skipped_updates"] == line["prm/skipped_updates"] == 0
        # Sampler and trainer use the same model.
        if "bfloat16" not in switch:
            assert line["rollout/sampler_mismatch_max"] < 1e-3
