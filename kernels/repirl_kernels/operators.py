"""Code that all custom operators of this package use."""

import torch

# The operators read values on the host (how many rows count, whether targets are in range), so they cannot be part of a
# CUDA graph. This tag tells torch.compile(mode="reduce-overhead").
OPERATOR_TAGS = (torch.Tag.cudagraph_unsafe,)


def under_transforms() -> bool:
    """Whether the call is inside a ``torch.func`` transform, such as ``grad``, ``vjp`` or ``vmap``."""
    if not torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    if _traces_a_transform():
        torch._dynamo.graph_break("repirl_kernels: torch.func transforms inside torch.compile run eagerly")
    return False


def _traces_a_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


# While torch.compile traces, it calls this function and takes the result as a constant.
_traces_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
