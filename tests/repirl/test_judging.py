"""Which verifiers go with which data."""

import pytest

from repirl.config import ConfigError
from repirl.configfile import build_config, load_config


def config(**changes):
    values = {"output_dir": "runs/a", "steps": 1, "policy": {"model": "m"}, "data": {"train": "a.jsonl"}}
    return build_config(values | {"objective": "rloo"} | changes)


def test_programs_are_judged_by_tests_unless_it_is_said_otherwise():
    assert config().data.answers == "text"
    assert config(verifier={"kind": "code"}).data.answers == "tests"
    held_out = {"verifier": {"kind": "custom", "function": "a:b"}, "eval": {"verifier": {"kind": "code"}}}
    assert config(**held_out).data.answers == "tests"
    assert config(verifier={"kind": "custom", "function": "a:b"}, data={"train": "a", "answers": "tests"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"verifier": {"kind": "code"}, "data": {"train": "a", "answers": "text"}},
            "data.answers is 'text', but verif",
        ),
        ({"data": {"train": "a", "answers": "tests"}}, "verifier.kind 'math' judges by text"),
        ({"verifier": {"kind": "mixed"}}, "data.verifier_column is null"),
        ({"data": {"train": "a", "verifier_column": "domain"}}, "verifier.kind 'math' judges all rows"),
        ({"verifier": {"code": {"partial_credit": True}}}, "verifier.kind 'math' runs no programs"),
        ({"verifier": {"kind": "code", "code": {"checker": "same"}}}, "verifier.code.checker is 'same'"),
        ({"verifier": {"kind": "code", "function": "a:b"}}, "judges by itself"),
        ({"verifier": {"kind": "code", "code": {"memory_mb": 0}}}, "memory_mb"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_papers_recipe_for_code_goes_on_from_that_for_mathematics():
    config = load_config(None, ["--preset", "paper-code-3b"])
    assert (config.verifier.kind, config.data.answers, config.loss.process_coefficient) == ("code", "tests", 0.1)
    before = load_config(None, ["--preset", "paper-math-3b"])
    assert config.policy.model == f"{before.output_dir}/export/policy"
    assert config.prm.model == f"{before.output_dir}/export/prm"
    assert (config.rollout, config.irl) == (before.rollout, before.irl)
    both = ["--preset", "paper-code-3b", "--verifier.kind", "mixed", "--data.verifier_column", "domain"]
    assert load_config(None, both).verifier.kind == "mixed"
