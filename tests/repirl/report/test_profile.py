"""Profiles of single turns: their files, on a CPU and as far as one can tell on a GPU, and what is refused."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config

from repirl.config import ConfigError
from repirl.distributed.world import World
from repirl.loop import train
from repirl.report.log import read_metrics
from repirl.report.profile import check_profile, profiled
from repirl.run import build


@pytest.mark.parametrize(("given", "turns"), [("2-3", [2, 3]), (2, [2]), ([1, 3], [1, 3]), ([], [])])
def test_turns_are_a_list_or_a_range(tmp_path, given, turns):
    assert tiny_config(tmp_path, log={"profile_turns": given}).log.profile_turns == turns


@pytest.mark.parametrize("given", ["3-2", "two", "1-", [0], True, "1-2-3"])
def test_other_turns_are_refused(tmp_path, given):
    with pytest.raises(ConfigError, match=r"log\.profile_turns"):
        tiny_config(tmp_path, log={"profile_turns": given})


def test_a_turn_has_a_trace_with_its_phases_and_a_table(tmp_path):
    options = {"objective": "rloo", "steps": 2, "eval": {"every": 0}}
    train(tiny_config(tmp_path, output_dir=str(tmp_path / "plain"), **options))
    train(tiny_config(tmp_path, **options, log={"profile_turns": [2]}))
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["turn_2.trace.json.gz", "turn_2.txt"]
    with gzip.open(folder / "turn_2.trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"rollout", "old_logprob", "policy", "aten::mm"} <= names
    table = (folder / "turn_2.txt").read_text()
    assert "aten::mm" in table
    assert "# of Calls" in table
    # Nothing else has changed.
    profiles, plain = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    assert [line["policy/loss"] for line in profiles] == [line["policy/loss"] for line in plain]


def test_what_cannot_be_recorded_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"names turn 9, but the run has 4 \(steps\)"):
        build(tiny_config(tmp_path, log={"profile_turns": [2, 9]}))
    with pytest.raises(ConfigError, match=r"memory_snapshot records PyTorch's allocator on a GPU; this runs on a CPU"):
        build(tiny_config(tmp_path, log={"profile_turns": [2], "memory_snapshot": True}))
    with pytest.raises(ConfigError, match="memory_snapshot is of the turns in profile_turns"):
        tiny_config(tmp_path, log={"memory_snapshot": True})


def test_a_snapshot_is_of_the_profiled_turns(tmp_path, monkeypatch):
    """PyTorch's functions are replaced: there is no GPU here."""
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", **_: calls.append(enabled))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(path))
    config = tiny_config(tmp_path, log={"profile_turns": [2], "memory_snapshot": True})
    (tmp_path / "run").mkdir()
    gpu = torch.device("cuda", 0)
    check_profile(config, gpu)
    for turn in (1, 2, 3):
        with profiled(config, SimpleNamespace(device=gpu, is_main=True), turn):
            torch.ones(2) + 1
    path = str(tmp_path / "run" / "profile" / "turn_2.memory.pickle")
    assert calls == ["all", path, None]
    # After an error nothing goes on recording.
    calls.clear()
    with pytest.raises(KeyError), profiled(config, SimpleNamespace(device=gpu, is_main=True), 2):
        raise KeyError
    assert calls == ["all", None]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    config = tiny_config(tmp_path, output_dir=str(tmp_path / "gone"), log={"profile_turns": [1]})
    with profiled(config, World(torch.device("cpu")), 1):
        pass
    assert "the profile of turn 1 cannot be written" in caplog.text
