"""Shared by all tests: seeded, and offline."""

import os

# Set before transformers is imported: no test may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tensors here are tiny: further threads would only wait for each other, for seconds where a core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
