"""The plans that are measured and published: their configurations are valid, and the page is that of the planner."""

from pathlib import Path

import pytest
from shared import ROOT

from bench.plan_check import SETTINGS, qwen3_page, settings_of
from repirl.configfile import build_config

PAGE = ROOT / "bench" / "results" / "plan_qwen3_4b.md"


@pytest.mark.parametrize("label", [setting[0] for setting in SETTINGS])
def test_every_measured_setting_is_valid(label):
    changes = next(setting[2] for setting in SETTINGS if setting[0] == label)
    build_config(settings_of(Path("folder"), changes))


def test_the_published_page_is_what_the_planner_says_today():
    committed = PAGE.read_text()
    command = committed.split("Made by `")[1].split("`")[0]
    assert qwen3_page(command) == committed
