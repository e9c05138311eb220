"""Configuration: who overrides whom, how values are read, what the presets hold."""

import pytest
import yaml

from repirl.config import ConfigError
from repirl.configfile import build_config, describe, list_presets, load_config, load_preset, merge, parse_overrides
from repirl.objectives import Objective, load_objectives
from repirl.systems import SYSTEMS


def test_file_over_preset_and_override_over_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: demo\nsteps: 7\nrollout: {prompts_per_step: 5}\n")
    config = load_config(path, ["--rollout.prompts_per_step", "6", "--loss.gamma=0.5"])
    assert config.steps == 7
    assert config.rollout.prompts_per_step == 6
    assert config.loss.gamma == 0.5
    assert config.rollout.samples_per_prompt == load_preset("demo")["rollout"]["samples_per_prompt"]
    # The command line's preset wins over the file's.
    assert load_config(path, ["--preset", "paper-math-3b"]).data.prompt_column == "problem"


def test_overrides_are_read_as_yaml():
    assert parse_overrides(["--a.b", "1", "--a.c=[1, 2]", "--d", "null", "--e", "1e-4", "--f", "true"]) == {
        "a": {"b": 1, "c": [1, 2]},
        "d": None,
        "e": 1e-4,
        "f": True,
    }
    assert parse_overrides(["--model", "HuggingFaceTB/SmolLM2-135M", "--x", "-1"]) == {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "x": -1,
    }
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_overrides(["--a", "[1"])


def test_merge_goes_section_by_section():
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merge(base, {"a": {"b": 9}, "e": 4}) == {"a": {"b": 9, "c": 2}, "d": 3, "e": 4}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}


@pytest.mark.parametrize("name", list_presets())
def test_presets_are_valid(name):
    config = load_config(None, ["--preset", name])
    assert build_config(yaml.safe_load(describe(config))) == config


def test_paper_preset_holds_the_papers_recipe():
    config = load_config(None, ["--preset", "paper-math-3b"])
    assert config.rollout.samples_per_prompt == 4
    assert config.rollout.prompts_per_step == 128
    assert (config.data.max_prompt_tokens, config.rollout.max_response_tokens) == (1536, 3000)
    assert config.loss.outcome_coefficient == 1.0
    assert config.loss.process_coefficient == 0.05
    assert config.loss.entropy_coefficient == 0.001


def test_several_problems_are_counted():
    with pytest.raises(ConfigError, match="and 2 more problems"):
        build_config({"steps": "x", "seed": "y", "output_dir": "o", "policy": {"model": "m"}, "data": 3})


def test_required_options_are_named():
    with pytest.raises(ConfigError, match=r"option 'policy\.model' is required"):
        build_config({"steps": 1, "output_dir": "o", "policy": {}, "data": {"train": "t"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"engine": "vllm", "vllm": {"url": "there:1"}}},
            "rollout.vllm.url is 'there:1', but rollout.engine",
        ),
        ({"rollout": {"engine": "vllm_server", "vllm": {"tensor_parallel": 2}}}, "rollout.vllm.tensor_parallel is 2"),
        ({"prm": {"gguf_file": "a.gguf"}}, "prm.gguf_file is 'a.gguf', but without prm.model"),
    ],
)
def test_options_that_would_be_ignored_are_refused(changes, message):
    values = {"output_dir": "out", "steps": 1, "policy": {"model": "m"}, "data": {"train": "t", "solution_column": "s"}}
    with pytest.raises(ConfigError, match=message):
        build_config(merge(values, changes))


# What gives each kind of data to a configuration, what takes it away, and how that is told.
GIVEN = {
    "prompts": {"train": "t"},
    "answers": {"answer_column": "a"},
    "experts": {"experts": {"path": "e"}},
    "pairs": {"pairs": "p"},
    "trajectories": {"trajectories": "r"},
    "outcomes": {},
    "steps": {"steps": "s"},
}
TAKEN = {
    "prompts": {"train": None},
    "answers": {"answer_column": None},
    "experts": {"experts": None},
    "pairs": {"pairs": None},
    "trajectories": {"trajectories": None},
    "outcomes": {"trajectories": {"path": "r", "outcome_column": None}},
    "steps": {"steps": None},
}
TOLD = {
    "prompts": "set data.train",
    "answers": "data.answer_column is null",
    "experts": "learns from experts",
    "pairs": "learns from pairs: set data.pairs",
    "trajectories": "learns from trajectories: set data.trajectories",
    "outcomes": "data.trajectories.outcome_column is null",
    "steps": "learns from steps: set data.steps",
}


def values_of(name):
    """The least that a system's row in the table asks for."""
    data = {"answer_column": None}
    for kind in SYSTEMS[name].data:
        data |= GIVEN[kind]
    values = {"output_dir": "out", "steps": 1, "objective": name, "policy": {"model": "m"}, "data": data}
    prm = {"reward": SYSTEMS[name].prm_rewards[0]} if SYSTEMS[name].prm_rewards else {}
    values["prm"] = prm | ({"model": "somewhere"} if "prm" in SYSTEMS[name].reads else {})
    if "answers" not in SYSTEMS[name].data:
        # Where answers are of use, though not needed.
        values |= {"loss": {"outcome_coefficient": 0.0}, "irl": {"use_outcome": False}}
    return values


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_needs_what_its_row_says_and_no_more(name):
    system = SYSTEMS[name]
    config = build_config(values_of(name))
    assert build_config(yaml.safe_load(describe(config))) == config
    for kind in system.data:
        with pytest.raises(ConfigError, match=TOLD[kind]):
            build_config(merge(values_of(name), {"data": TAKEN[kind]}))
    for kind in {"pairs", "trajectories"} - {*system.data, *system.optional}:
        with pytest.raises(ConfigError, match=f"data.{kind} is set, but objective '{name}' reads no {kind}"):
            build_config(merge(values_of(name), {"data": GIVEN[kind]}))
    # Every learner has its section of options.
    assert {*system.trains, *system.reads} <= {"policy", "prm", "critic"}
    for kind in load_objectives(system.objectives).values():
        assert issubclass(kind, Objective)
        assert system.has_prm or not kind(config).reads_rewards
        assert isinstance(kind.needs_reference(config), bool)


# Those that hold what each of these systems needs; the others are for the system that they name.
@pytest.mark.parametrize("name", ["demo", "paper-math-3b", "smollm2-gsm8k"])
@pytest.mark.parametrize("objective", ["repirl", "rloo", "sft", "airl", "iq-learn", "online-dpo", "online-dqo"])
def test_presets_of_prompts_and_experts_are_valid_for_the_systems_on_these(name, objective):
    assert load_config(None, ["--preset", name, "--objective", objective]).system is SYSTEMS[objective]


def test_a_system_that_reads_a_trained_prm_is_told_where_it_is():
    with pytest.raises(ConfigError, match=r"'rloo-prm' reads a trained PRM: set prm.model"):
        build_config(merge(values_of("rloo-prm"), {"prm": {"model": None}}))
    config = build_config(values_of("rloo-prm"))
    assert config.system.has_prm
    assert set(config.trained_sections) == {"policy"}
