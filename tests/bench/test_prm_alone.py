"""The ablation of PRMs that learn alone: its arms are what they are called, and its table says what was measured."""

import json
import sys
from pathlib import Path

import pytest

from bench import errors_seen, prm_alone
from bench.prm_alone import ARMS, PAIRS, arm_config, differences, table


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_a_gate_and_a_verifier_as_its_name_says(tmp_path, arm):
    config = arm_config(tmp_path, arm, 3)
    judged = arm.startswith("verifier")
    assert config.loss.outcome_coefficient == (1.0 if judged else 0.0)
    assert config.irl.use_outcome == judged
    gated = arm.endswith(", gate") or not (judged or arm.endswith("no gate"))
    if "rate by z" in arm:
        assert config.gate_threshold < 2.0 < config.irl.gate_full
    else:
        assert (config.gate_threshold, config.irl.gate_full) == (2.0 if gated else None, None)
    assert config.prm.reward in arm
    assert config.policy.model == str(tmp_path / "starts" / "plain_3" / "start")
    assert len({arm_config(Path("x"), other, 0).output_dir for other in ARMS}) == len(ARMS)


def run(seed, accuracies, held=0.0, auroc=0.5, arm="value"):
    curve = [[5 * i, accuracy] for i, accuracy in enumerate(accuracies)]
    return {"arm": arm, "seed": seed, "accuracy": curve, "held": held, "auroc": auroc}


def test_the_table_gives_means_and_standard_errors():
    lines = table([run(1, [0.5, 0.9, 0.8], 4.0, 0.6), run(0, [0.4, 0.7, 0.8], 2.0, 0.5)]).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "value",
        "0, 1",
        "45.0 ± 5.0",
        "80.0 ± 0.0",
        "35.0 ± 5.0",
        "5.0 ± 5.0",
        "3.0 ± 1.0",
        "0.550 ± 0.050",
        "80.0, 80.0",
    ]


def test_differences_are_of_the_same_seed_and_start():
    assert {name for pair in PAIRS for name in pair} <= set(ARMS)
    bases = [run(0, [0.4, 0.6]), run(1, [0.5, 0.9]), run(2, [0.5, 0.9])]
    ramps = [run(s, a, 0.0, 0.6, "value, rate by z") for s, a in ((0, [0.4, 0.8]), (1, [0.5, 0.94]), (2, [0.6, 0.1]))]
    lines = differences([*bases, *ramps]).splitlines()
    assert len(lines) == 3
    # The third start is another one.
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["value, rate by z", "value", "0, 1", "12.0 ± 8.0", "6.0 ± 4.0", "0.100 ± 0.000"]


@pytest.mark.parametrize("module", [prm_alone, errors_seen])
def test_the_committed_page_is_made_from_the_committed_results(module):
    path = Path(__file__).parents[2] / "bench" / "results" / "cpu" / f"{module.__name__.rpartition('.')[2]}.json"
    assert path.with_suffix(".md").read_text() == module.page(json.loads(path.read_text()))


def test_results_and_notes_that_are_there_are_kept(tmp_path, monkeypatch):
    output, trained = tmp_path / "out.json", []

    def run_arm(folder, arm, seed):
        trained.append((arm, seed))
        return run(seed, [0.5, 0.75], arm=arm)

    monkeypatch.setattr(prm_alone, "run_arm", run_arm)
    monkeypatch.setattr(sys, "argv", ["prm_alone", "--arms", "value", "--seeds", "1", "--output", str(output)])
    prm_alone.main()
    content = json.loads(output.read_text())
    output.write_text(json.dumps(content | {"notes": ["It gains 25 points."]}))
    sys.argv[4] = "2"
    prm_alone.main()
    assert trained == [("value", 0), ("value", 1)]
    content = json.loads(output.read_text())
    assert [r["seed"] for r in content["runs"]] == [0, 1]
    assert content["notes"] == ["It gains 25 points."]
    page = output.with_suffix(".md").read_text()
    assert page.endswith("It gains 25 points.\n")
    assert "| value | 0, 1 | 50.0 ± 0.0 | 75.0 ± 0.0 |" in page
