"""The commands of examples/tour.sh are commands of repirl, with options that these have."""

import re
import shlex
from pathlib import Path

import pytest

from repirl.cli import _check_spelling, make_parser
from repirl.config import Config

TOUR = Path(__file__).parents[2] / "examples" / "tour.sh"
TEXT = TOUR.read_text(encoding="utf-8").replace("\\\n", " ").replace("$HELD_OUT", "$T/data/eval.jsonl")
COMMANDS = re.findall(r"^repirl (.*)$", TEXT, re.MULTILINE)


def test_the_tour_uses_a_trained_prm_in_every_way():
    uses = {"report", "signal", "judge", "score", "rerank", "search", "adapt", "localize", "eval"}
    assert {command.split()[0] for command in COMMANDS} == {"train", "export", "sample", *uses}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_options_exist(command):
    options, overrides = make_parser().parse_known_args(shlex.split(command))
    _check_spelling(options, overrides)
    names = [word[2:] for word in overrides if word.startswith("--")]
    assert all(name == "preset" or name.partition(".")[0] in Config.model_fields for name in names)


def test_a_file_is_made_before_it_is_read():
    """All but what the start model comes with."""
    made = {"data/train.jsonl", "data/eval.jsonl", "start"}
    for line in TEXT.splitlines():
        if not line.startswith(("repirl", "python -m", "head")):
            continue
        places = [place.rstrip('"') for place in re.findall(r"\$T/([\w./]+)", line)]
        outputs = re.findall(r'(?:--output|--output_dir|processbench|gsm8k|>) "\$T/([\w./]+)"', line)
        for place in places:
            if place not in outputs:
                assert any(place == part or place.startswith(f"{part}/") for part in made), line
        made |= set(outputs)
