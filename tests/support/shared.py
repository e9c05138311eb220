"""What many tests name."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Metrics of the machine, not of what was computed.
MEASURED = ("seconds/", "tokens_per_second/", "mfu/", "memory/")
