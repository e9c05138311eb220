"""A run says in words, once, where its importance weights are not to be relied on."""

import logging

import pytest
from shared import CPU
from tiny import tiny_config

from repirl.distributed.world import World
from repirl.report.reporter import Reporter, weight_warnings


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        ({}, []),
        ({"prm/pareto_k": 0.7, "prm/ess_fraction": 0.05}, []),
        ({"prm/pareto_k": float("nan"), "prm/ess_fraction": None}, []),
        ({"prm/pareto_k": 0.71, "prm/ess_fraction": 0.5}, ["prm/pareto_k"]),
        ({"prm/pareto_k": 2.9, "prm/ess_fraction": 0.99}, []),
        ({"prm/pareto_k": float("inf"), "prm/ess_fraction": 0.04}, ["prm/pareto_k", "prm/ess_fraction"]),
    ],
)
def test_which_weights_are_warned_of(metrics, names):
    assert list(weight_warnings(metrics)) == names


def test_each_warning_is_given_once_in_a_run_and_after_it_was_resumed(tmp_path, caplog):
    config, world = tiny_config(tmp_path, steps=6), World(CPU)
    heavy, few = {"prm/pareto_k": 0.9}, {"prm/ess_fraction": 0.03}
    with caplog.at_level(logging.WARNING):
        with Reporter(config, world, 0) as reporter:
            for step, metrics in enumerate([{"prm/pareto_k": 0.2}, heavy, heavy, few], 1):
                reporter.log(step, metrics)
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["turn 2", "turn 4"]
        assert "Pareto k 0.90, above 0.7): the estimate of log Z is not reliable" in caplog.records[0].getMessage()
        assert "importance weights are worth 3.0% of the samples, below 5%" in caplog.records[1].getMessage()
        caplog.clear()
        # Turn 4 was not in the checkpoint.
        with Reporter(config, world, 3) as reporter:
            reporter.log(4, heavy | few)
            reporter.log(5, heavy | few)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["turn 4"]
    assert "worth 3.0%" in caplog.text


def test_other_processes_say_nothing(tmp_path, caplog):
    with Reporter(tiny_config(tmp_path), World(CPU, rank=1), 0) as reporter:
        reporter.log(1, {"prm/pareto_k": 0.9})
    assert not caplog.records
    assert not (tmp_path / "run").exists()
