"""The sections of kernels/README.md lower the peak by at least one tensor of the logits' size."""

import importlib.util
import sys

import pytest
from memory import SEQUENCE, VARIANTS, VOCABULARY, measure_apart

NUM_TOKENS = 4 * SEQUENCE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("section", VARIANTS)
def test_peak_falls_by_the_logits(section):
    package, variants = VARIANTS[section]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-integrations")
    before, after = (measure_apart(section, variant, NUM_TOKENS) for variant in (variants[0], variants[-1]))
    logits = NUM_TOKENS * VOCABULARY * 4 >> 20
    assert 0 < after < before - logits
