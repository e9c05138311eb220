"""The numbered edge cases of ``tests/kernels/test_edge_cases.py`` on a GPU, with the Triton kernels and the reference.

Without a GPU, ``TRITON_INTERPRET=1`` runs them on the CPU in Triton's interpreter.
"""

import os

import pytest
import torch
import torch.multiprocessing as mp

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device", allow_module_level=True)

from test_edge_cases import *  # noqa: F403
from test_edge_cases import fsdp_rank

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

pytestmark = pytest.mark.gpu

test_edge_case_09_more_than_2_to_31_logits = None  # has its own tests in test_large_shapes.py


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    """Replaces the fixture of the CPU's backends; the tests create their tensors on the default device."""
    with torch.device(DEVICE):
        yield request.param


def test_edge_case_20_fsdp_weights_in_uneven_shards(tmp_path):
    # One GPU is one shard; more ranks are tested on the CPU.
    mp.spawn(fsdp_rank, args=(str(tmp_path / "rendezvous"), 1, DEVICE), nprocs=1)
