"""Shared by all tests: seeded, and offline."""

import os
from collections.abc import Iterator

# Set before transformers is imported: no test may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors here are tiny: further threads would only wait for each other, for seconds where a core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Memory is poisoned by torch's deterministic mode, in which a GPU's matrix products ask for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Results to the bit depend on the number of threads, which the demo sets, and other processes do not know."""
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
