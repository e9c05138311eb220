"""``bench/switches.py``: every switch is a valid configuration, and the table has what was measured."""

import json

import pytest

from bench import switches
from bench.plan_check import settings_of
from repirl.configfile import build_config, describe, merge
from repirl.plan.plan import GIB


@pytest.mark.parametrize(("label", "processes", "changes"), switches.SWITCHES)
def test_every_switch_changes_a_configuration(tmp_path, label, processes, changes):
    plain = describe(build_config(settings_of(tmp_path, switches.BASE)))
    changed = describe(build_config(settings_of(tmp_path, merge(switches.BASE, changes))))
    assert (changed == plain) == (label in ("none", "two processes"))
    assert switches.THREADS % processes == 0


def test_the_table_is_written_after_every_run(tmp_path, monkeypatch):
    """Medians of the rounds, and their ratios to the run without a switch; it lists only what was measured so far."""
    output, seen = tmp_path / "switches.json", []

    def measured(folder, processes, changes):
        seen.append(output.with_suffix(".md").read_text() if output.exists() else "")
        turn = (len(seen) - 1) // len(switches.SWITCHES)
        half = 0.5 if changes else 1.0
        return {"peak": 4 * GIB * half, "seconds/step": [10.0, 40.0, 20.0][turn] / half, "seconds/prm": 1.0}

    monkeypatch.setattr(switches, "make_files", lambda folder: None)
    monkeypatch.setattr(switches, "measure", measured)
    assert switches.main(["--rounds", "3", "--output", str(output)]) == 0
    assert "| none | 4.00 | 1.00 | 10.0 (10.0 to 10.0) | 1.00 |" in seen[1]
    assert "adapters" not in seen[1].split("|---|")[1]
    text = output.with_suffix(".md").read_text()
    assert "| none | 4.00 | 1.00 | 20.0 (10.0 to 40.0) | 1.00 |" in text
    assert "| `offload_idle: true` | 2.00 | 0.50 | 40.0 (20.0 to 80.0) | 2.00 |" in text
    assert {len(rounds) for rounds in json.loads(output.read_text())["rounds"].values()} == {3}
