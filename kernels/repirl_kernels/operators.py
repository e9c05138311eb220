"""What all custom operators of this package have in common."""

import torch

# These operators read values on the host (how many rows count, whether targets are in range): they cannot be part of a
# CUDA graph, and torch.compile(mode="reduce-overhead") has to know.
OPERATOR_TAGS = (torch.Tag.cudagraph_unsafe,)


def under_transforms() -> bool:
    """Whether ``torch.func`` transforms this call: ``grad``, ``vjp``, ``vmap`` and the like."""
    if not torch.compiler.is_compiling():
        return torch._C._are_functorch_transforms_active()
    if _traces_a_transform():
        torch._dynamo.graph_break("repirl_kernels: torch.func transforms inside torch.compile run eagerly")
    return False


def _traces_a_transform() -> bool:
    return torch._C._are_functorch_transforms_active()


# Called for real where torch.compile traces, and its result taken as a constant.
_traces_a_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
