"""Times our ops and each peer with pytest-benchmark, for its options, saved runs and comparisons.

``python -m bench.run`` runs the same cases and contenders in interleaved rounds, and also measures errors and memory.
"""

import pytest
import torch

from bench.cases import PROFILES, make_inputs
from bench.contenders import CONTENDERS, CannotRun
from bench.measure import drop_gradients, step, synchronize, yardstick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = PROFILES["gpu" if DEVICE == "cuda" else "quick"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bare_product(benchmark, case):
    benchmark.group = case.name
    product = yardstick(case, make_inputs(case, DEVICE))
    benchmark.pedantic(lambda: (product(), synchronize(DEVICE)), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(benchmark, case, contender):
    benchmark.group = case.name
    inputs = make_inputs(case, DEVICE)
    if contender.given_logits != (case.task == "logits"):
        pytest.skip("has other inputs")
    try:
        step(contender, inputs, case)
    except (CannotRun, ImportError) as reason:
        pytest.skip(str(reason))
    benchmark.pedantic(
        lambda: (step(contender, inputs, case), synchronize(DEVICE)), setup=lambda: drop_gradients(inputs), rounds=5
    )
