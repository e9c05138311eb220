"""What `import repirl` gives, and what it costs."""

import subprocess
import sys

import pytest
from shared import ROOT

import repirl

LIGHT = """
import sys
import repirl
heavy = {"torch", "transformers", "pydantic", "numpy", "yaml"} & set(sys.modules)
assert not heavy, heavy
assert "Config" in dir(repirl)
from repirl import Config, ConfigError, load_config, list_presets, SYSTEMS, System
assert "torch" not in sys.modules
"""

WITHOUT = """
import sys
sys.modules["pydantic"] = None
import repirl
try:
    repirl.Config
except ImportError as error:
    print(error)
"""


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100).stdout


def test_the_package_is_light_until_something_is_used():
    run_python(LIGHT)


def test_every_public_name_is_there_and_documented():
    for name in repirl.__all__:
        value = getattr(repirl, name)
        assert name in {"SYSTEMS", "__version__"} or value.__doc__, name
    assert set(repirl._PLACES) == set(repirl.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        repirl.trian  # noqa: B018
    with pytest.raises(ImportError):
        from repirl import trian  # noqa: F401


def test_names_for_type_checkers_are_those_that_are_imported():
    text = (ROOT / "repirl" / "__init__.py").read_text()
    listed = [line.strip() for line in text.splitlines() if line.startswith("    from repirl.")]
    pairs = {(name, line.split()[1]) for line in listed for name in line.split(" import ")[1].split(", ")}
    assert pairs == set(repirl._PLACES.items())
    assert not {name for name in repirl.__all__ if (ROOT / "repirl" / name).exists()}


def test_what_is_missing_is_named():
    assert "repirl.Config needs pydantic, which is not installed: pip install 'repirl[train]'" in run_python(WITHOUT)


def test_both_packages_are_typed():
    assert (ROOT / "repirl" / "py.typed").exists()
    assert (ROOT / "kernels" / "repirl_kernels" / "py.typed").exists()
