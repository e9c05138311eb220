"""The Triton backend (CUDA and ROCm): four functions on checked, compacted rows.

The same code runs on CPU tensors when ``TRITON_INTERPRET=1`` is set before triton is imported, which is for
tests.
"""

from .linear_backward import linear_backward
from .linear_forward import linear_forward
from .logits import logits_backward, logits_forward

__all__ = ["linear_backward", "linear_forward", "logits_backward", "logits_forward"]
