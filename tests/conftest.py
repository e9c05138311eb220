"""Shared by all tests: seeded, and with as many threads as the machine is tested with everywhere."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
