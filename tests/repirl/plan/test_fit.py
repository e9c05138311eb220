"""What makes a run fit into a memory, and how that is shown."""

import io

from plan_cases import configured, merged
from rich.console import Console

from repirl.plan.fit import device_note, find_fit, print_plan, usable
from repirl.plan.plan import GIB, plan


def test_what_fits_needs_no_switch_and_what_never_fits_says_so(tmp_path):
    config = configured(tmp_path)
    assert find_fit(config, 1000 * GIB).switches == []
    assert find_fit(config, GIB // 8).switches is None
    assert usable(24 * GIB, "cuda") < 24 * GIB > usable(24 * GIB, "cpu")


def test_the_cheapest_switches_that_suffice(tmp_path):
    config = configured(tmp_path)
    first = plan(config).peak
    least = plan(merged(config, policy={"gradient_checkpointing": True}, prm={"gradient_checkpointing": True})).peak
    memory = int((first.total + least.total) / 2 / 0.85)
    fit = find_fit(config, memory)
    assert fit.switches == ["gradient_checkpointing"]
    assert fit.plan.peak.total == least.total
    # Where cheap ones do not help they are not named: here the KV cache is the peak.
    cache = configured(tmp_path, rollout={"max_response_tokens": 3000, "prompts_per_step": 64})
    actual = find_fit(cache, int(0.7 * plan(cache).peak.total / 0.85))
    assert [name.split()[0] for name in actual.switches] == ["rollout.max_sequences"]


def test_printed_plan(tmp_path):
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(configured(tmp_path), [0.2, 2, 100], ranks=2, console=console)
    text = console.export_text()
    assert "policy moments" in text
    assert "2 CPU processes" in text
    assert "100 GiB (85.00 usable): fits" in text
    assert "0.2 GiB (0.17 usable): does not fit with all switches" in text
    assert "does not fit as it is; fits with " in text


def test_the_device_of_a_plan_is_told_with_its_reason(tmp_path):
    auto, fixed = configured(tmp_path, device="auto"), configured(tmp_path, device="cuda")
    assert device_note(auto, "cuda") == (
        "planned for a GPU, which device 'auto' takes where there is one; for a CPU: --device cpu"
    )
    assert device_note(fixed, "cuda") == "planned for a GPU, as device 'cuda' says"
    assert device_note(auto, "cpu", "cpu") == "planned for a CPU, as device 'cpu' says"
