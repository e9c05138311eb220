"""The ablation of PRMs that learn alone: its arms are what they are called, and its table says what was measured."""

from pathlib import Path

import pytest

from bench.prm_alone import ARMS, arm_config, table


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_has_a_gate_and_a_verifier_as_its_name_says(tmp_path, arm):
    config = arm_config(tmp_path, arm, 3)
    judged = arm.startswith("verifier")
    assert config.loss.outcome_coefficient == (1.0 if judged else 0.0)
    assert config.irl.use_outcome == judged
    assert config.gate_threshold == (2.0 if arm.endswith(", gate") or not (judged or arm.endswith("no gate")) else None)
    assert config.prm.reward in arm
    assert config.policy.model == str(tmp_path / "starts" / "plain_3" / "start")
    assert len({arm_config(Path("x"), other, 0).output_dir for other in ARMS}) == len(ARMS)


def test_the_table_gives_means_and_standard_errors():
    def run(seed, accuracies, held, auroc):
        curve = [[5 * i, accuracy] for i, accuracy in enumerate(accuracies)]
        return {"arm": "value", "seed": seed, "accuracy": curve, "held": held, "auroc": auroc}

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
