"""Options that the device decides: what they become, what is said of it, and that a run keeps them."""

import pytest
from plan_cases import configured
from tiny import tiny_config

from repirl.checkpoint.identity import stored_configuration
from repirl.configfile import load_config
from repirl.defaults import Machine, set_defaults, this_machine
from repirl.loop import train
from repirl.plan.plan import plan
from repirl.report.record import read_starts

GPU = Machine("cuda")


def chosen(config, machine, before=None):
    result, lines = set_defaults(config, machine, before)
    return result.compute_dtype, " ".join(line for line in lines if not line.startswith("rollout.engine"))


def test_products_are_bfloat16_on_a_gpu_and_in_the_type_of_the_weights_on_a_cpu(tmp_path):
    plain, single = tiny_config(tmp_path), tiny_config(tmp_path, compute_dtype="float32")
    dtype, lines = chosen(plain, GPU)
    assert dtype == "bfloat16"
    assert "compute_dtype: bfloat16 for products and activations, the default on a GPU" in lines
    assert chosen(plain, Machine("cpu")) == (None, "")
    # What was given is kept, without a word.
    assert chosen(single, GPU) == ("float32", "")
    dtype, lines = chosen(plain, Machine("cuda", has_bfloat16=False))
    assert dtype is None
    assert "no fast bfloat16 products" in lines
    half = tiny_config(tmp_path, dtype="bfloat16", policy={"optimizer": {"lr": 1e-3}})
    assert chosen(half, GPU) == (None, "")


def test_a_run_that_goes_on_keeps_its_own(tmp_path):
    plain, half = tiny_config(tmp_path), tiny_config(tmp_path, compute_dtype="bfloat16")
    assert chosen(plain, Machine("cpu"), before=half) == ("bfloat16", "")
    dtype, lines = chosen(plain, GPU, before=plain)
    assert dtype is None
    assert "goes on in float32, as it began" in lines
    assert chosen(half, GPU, before=plain) == ("bfloat16", "")


@pytest.mark.parametrize("first", ["cuda", "cpu"])
def test_files_hold_what_was_set_and_a_run_resumes_on_another_device(tmp_path, monkeypatch, capsys, first):
    """The defaults of a GPU, computed on a CPU."""
    options = {"objective": "sft", "eval": {"every": 0}}
    for steps, device in ((1, first), (2, "cpu" if first == "cuda" else "cuda")):
        monkeypatch.setattr("repirl.run.this_machine", lambda _, device=device: Machine(device))
        train(tiny_config(tmp_path, steps=steps, **options), resume=steps == 2)
        shown = capsys.readouterr().out
        assert ("the default on a GPU" in shown) == (steps == 1 and first == "cuda")
        assert ("in float32, as it began" in shown) == (steps == 2 and first == "cpu")
    expected = "bfloat16" if first == "cuda" else None
    assert [start["configuration"]["compute_dtype"] for start in read_starts(tmp_path / "run")] == [expected] * 2
    assert load_config(stored_configuration(tmp_path / "run")).compute_dtype == expected


def test_a_plan_is_of_what_will_run(tmp_path):
    planned, single, half = (
        plan(configured(tmp_path, compute_dtype=dtype), device="cuda") for dtype in (None, "float32", "bfloat16")
    )
    assert planned == half
    assert planned != single
    cpu = [plan(configured(tmp_path, compute_dtype=dtype), device="cpu") for dtype in (None, "float32")]
    assert cpu[0] == cpu[1]


def test_a_machine_without_a_gpu_is_planned_for_as_if_it_had_a_new_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert this_machine("cuda").has_bfloat16
    assert this_machine("cpu").device == "cpu"


def engine(config, machine, before=None, **options):
    result, lines = set_defaults(config, machine, before, **options)
    return result.rollout.engine, [line for line in lines if line.startswith("rollout.engine")]


def test_vllm_samples_on_a_gpu_where_it_is_installed(tmp_path):
    both, config = Machine("cuda", has_vllm=True), tiny_config(tmp_path)
    name, [line] = engine(config, both)
    assert name == "vllm"
    assert "default on a GPU where it is installed, with 4 GiB for its cache" in line
    name, [line] = engine(config, GPU)
    assert name == "transformers"
    assert "vLLM is not installed here" in line
    assert "pip install 'repirl[vllm]'" in line
    assert engine(config, Machine("cpu", has_vllm=True)) == ("transformers", [])
    # Adapters vanish where they are rounded together with their base.
    name, [line] = engine(tiny_config(tmp_path, adapters={"rank": 4}), both)
    assert name == "transformers"
    assert "rounded together with their base" in line
    exact = tiny_config(tmp_path, adapters={"rank": 4}, compute_dtype="float32")
    assert engine(exact, both)[0] == "vllm"
    # What was given is kept, and so is what a run began with.
    given = tiny_config(tmp_path, rollout={"engine": "transformers"})
    assert engine(given, both) == ("transformers", [])
    assert engine(config, both, before=given) == ("transformers", [])


def test_nothing_is_said_of_engines_where_nothing_is_sampled(tmp_path):
    config = tiny_config(tmp_path, objective="sft", data={"eval": None})
    assert engine(config, GPU) == ("transformers", [])
    assert len(engine(config, GPU, samples=True)[1]) == 1


def test_a_plan_is_of_the_engine_that_will_run(tmp_path, monkeypatch):
    config = configured(tmp_path, objective="rloo", irl={"base_measure": "uniform"})
    for has_vllm in (False, True):
        machine = Machine("cuda", has_vllm=has_vllm)
        monkeypatch.setattr("repirl.plan.plan.this_machine", lambda _, machine=machine: machine)
        rollout = next(phase for phase in plan(config, device="cuda").phases if phase.name == "rollout")
        assert ("engine weights" in rollout.rows) == has_vllm
