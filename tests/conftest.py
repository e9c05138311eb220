"""Shared by all tests: seeded, offline, and how many run at a time."""

import os
from collections.abc import Iterator

# Set before transformers is imported: no test may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor may what a test reads on stderr depend on which tests ran before it: loading a model turns these off, too.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Tensors here are tiny: further threads would only wait for each other, for seconds where a core is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Memory is poisoned by torch's deterministic mode, in which a GPU's matrix products ask for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:
    # torch.compile would start as many processes as there are cores, for each of the workers.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch

# Each worker imports PyTorch, and some of the tests that it runs take a few GiB.
MAX_WORKERS = 8


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto``: a worker for each core; only one where there is a GPU, whose memory they would have to share."""
    if torch.cuda.is_available():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Results to the bit depend on the number of threads, which the demo sets, and other processes do not know."""
    torch.manual_seed(0)
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
