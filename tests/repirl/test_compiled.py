"""Compiled layers: the numbers of those that are not, one compilation for all of them, and the same names."""

import pytest
import torch
from families import save_model
from shared import CPU
from tiny import gradients, make_model, tiny_config
from torch._dynamo.testing import CompileCounterWithBackend

from repirl.batch import pack
from repirl.compiled import compile_layers
from repirl.config import ConfigError
from repirl.learner import Learner, enable_checkpointing
from repirl.loop import train
from repirl.models import load_model
from repirl.options import OptimizerConfig
from repirl.report.log import read_metrics

PAIRS = [([3, 4, 5], [6, 7, 8, 9, 10, 1]), ([9], [10, 1]), ([4, 4], [5]), ([3] * 9, [4, 5, 6, 1])]


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    """Graphs that were compiled. Inductor would take minutes here, and makes of them what the backend here makes."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("repirl.compiled.BACKEND", backend)
    yield backend
    torch._dynamo.reset()


def learner(path, *, compiles, compute_dtype=None, checkpointing=False):
    model = load_model(str(path), kind="causal", dtype=torch.float32, compute_dtype=compute_dtype, device=CPU)
    if checkpointing:
        enable_checkpointing(model)
    if compiles:
        compile_layers(model, "policy")
    return Learner(model, OptimizerConfig(lr=1e-2), tokens_per_microbatch=12)


def batch(pairs=PAIRS):
    result = pack(pairs)
    result.write("weight", torch.linspace(-1, 1, result.num_response_tokens))
    return result


def loss(outputs, micro):
    return ((outputs["logprob"] + 0.3 * outputs["entropy"]) * micro.read("weight")).sum()


@pytest.mark.parametrize(
    ("compute_dtype", "checkpointing"), [(None, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_compiled_layers_make_the_same_numbers(tmp_path, counter, compute_dtype, checkpointing):
    path, options = make_model(tmp_path / "model"), {"compute_dtype": compute_dtype, "checkpointing": checkpointing}
    ours, plain = (learner(path, compiles=compiles, **options) for compiles in (True, False))
    assert list(ours.model.state_dict()) == list(plain.model.state_dict())
    scores, expected = ours.score(batch()), plain.score(batch())
    atol = 1e-5 if compute_dtype is None else 2e-2
    torch.testing.assert_close(scores["logprob"], expected["logprob"], atol=atol, rtol=0)
    assert counter.frame_count > 0
    values, exact = gradients(ours, batch(), loss), gradients(plain, batch(), loss)
    for name, value in exact.items():
        torch.testing.assert_close(values[name], value, atol=atol * float(value.abs().max()), rtol=1e-4, msg=name)
    # The second layer, other lengths and other weights need no compilation of their own.
    compiled = counter.frame_count
    ours.score(batch(PAIRS[:2]))
    gradients(ours, batch([([5] * 7, [6] * 3), *PAIRS[1:]]), loss)
    assert counter.frame_count == compiled


def test_sampling_is_not_compiled(tmp_path, counter):
    ours = learner(make_model(tmp_path / "model"), compiles=True)
    with ours.ordinary_model() as model:
        model(torch.tensor([[1, 2, 3]]), use_cache=True)
    assert counter.frame_count == 0


def test_a_run_compiles_what_its_options_name_and_goes_on_without(tmp_path, counter):
    options = {"objective": "sft", "eval": {"every": 0}}
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), steps=2, **options))
    assert counter.frame_count == 0
    train(tiny_config(tmp_path, steps=1, policy={"compile": True}, **options))
    assert counter.frame_count > 0
    # The checkpoint is that of any run.
    train(tiny_config(tmp_path, steps=2, **options), resume=True)
    ours, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    assert [x["policy/loss"] for x in ours] == pytest.approx([x["policy/loss"] for x in expected], rel=1e-3)


def test_what_is_not_compiled_is_said(tmp_path, caplog, counter):
    path = save_model("nemotron", tmp_path / "model")
    padded = learner(path, compiles=True)
    assert "policy.compile has no effect" in caplog.text
    padded.score(batch())
    assert counter.frame_count == 0
    with pytest.raises(ConfigError, match=r"policy\.compile is for a model of its own, but adapters share one"):
        tiny_config(tmp_path, adapters={"rank": 4}, policy={"compile": True})
