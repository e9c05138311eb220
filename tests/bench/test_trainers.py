"""The comparison with TRL's trainer: both make the same update, and every figure of the table is there."""

import json

import pytest

from bench import trainers

pytest.importorskip("trl", reason="TRL is not installed; make bench installs it")


def test_both_trainers_make_the_same_update(tmp_path, capsys):
    out = tmp_path / "trainers.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--steps", "1", "--response", "24"]
    cases = ["spread lengths", "spread lengths, micro-batches of 4"]
    assert trainers.main([*arguments, "--threads", "1", "--json", str(out), "--cases", *cases]) == 0
    results = json.loads(out.read_text())["results"]
    assert [r["case"] for r in results] == cases
    for result in results:
        assert result["update_difference"] < 1e-4
        assert 0.1 < result["padding"] < 0.9
        for name in trainers.CONTENDERS:
            assert {"old_logprob", "policy"} <= set(result[name]["seconds"])
            assert all(value > 0 for values in result[name]["seconds"].values() for value in values)
    first = results[0]
    assert "rollout" in first["ours"]["seconds"]
    assert "rollout" in first["trl"]["seconds"]
    assert "prm" in first["ours"]["seconds"]
    assert "| policy |" in out.with_suffix(".md").read_text()
    assert "ours / TRL" in capsys.readouterr().out


def test_recorded_rollouts_are_what_was_asked_for(tmp_path):
    trainers.record(tmp_path / "equal.json", 64, 8, 20, equal=True)
    trainers.record(tmp_path / "spread.json", 64, 8, 20, equal=False)
    equal, spread = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("equal", "spread"))
    assert {len(x) for r in equal for x in r["responses"]} == {20}
    lengths = {len(x) for r in spread for x in r["responses"]}
    assert len(lengths) > 3
    assert max(lengths) <= 20
    assert all(len(r["responses"]) == len(r["outcomes"]) == trainers.NUM_SAMPLES for r in spread)
