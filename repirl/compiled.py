"""Decoder layers compiled by torch.compile: norms, rotary embeddings and activation functions become few kernels.

Only packed passes are compiled (scores and updates), not sampling with a cache. All layers call one function, so they
share what is compiled, for any number of tokens. The parameters keep their names.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from repirl.distributed.precision import find_layers

logger = logging.getLogger(__name__)

BACKEND = "inductor"


def compile_layers(model: PreTrainedModel, name: str) -> None:
    """Compile the decoder layers of a fused model, in place; each is compiled when it is first called.

    Sharding, casts and the recomputation of activations stay outside of what is compiled; attention over packed
    sequences is not compiled.

    Args:
        model: the model.
        name: of the learner, for messages.
    """
    if not model.packs:
        logger.warning(
            "%s.compile has no effect: %s computes padded batches with its own attention, which is not compiled",
            name,
            type(model).__name__,
        )
        return
    for layer in find_layers(model):
        layer.forward = _packed_compiled(layer.forward)


def _packed_compiled(forward: Any) -> Any:
    compiled = torch.compile(forward, dynamic=True, backend=BACKEND)

    @functools.wraps(forward)
    def choose(*args: Any, **options: Any) -> Any:
        return (forward if options.get("packed_layout") is None else compiled)(*args, **options)

    return choose
