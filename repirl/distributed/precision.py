"""Weights that are computed with in another dtype than they are kept in, where one process holds all of them.

Several processes get this from FSDP2 (shard.py), and the same numbers: each unit of a model is cast when its forward
pass begins, gradients are made in the dtype of the products and added up in that of the parameters. Nothing is gathered
here, and nothing is cast a second time for the backward pass, unless the unit is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def find_units(model: PreTrainedModel) -> list[nn.Module]:
    """The parts of a model whose weights are needed at different times, the model itself last.

    Each decoder layer is a unit, embeddings and head are one each unless they are tied, and the model is what is left.
    """
    units = find_layers(model)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # Tied weights are one parameter of two modules, so it must belong to the unit that contains both, the model.
    if head is not None and head.weight is not embeddings.weight:
        units += [embeddings, head]
    return [*units, model]


class CastUnit:
    """Puts cast weights in the place of a unit's own while it computes.

    Args:
        unit: a module.
        places: the modules of the unit, each with the name of a parameter of its own.
        dtype: of the products.
    """

    def __init__(self, unit: nn.Module, places: list[tuple[nn.Module, str]], dtype: torch.dtype) -> None:
        self.unit, self._places, self._dtype = unit, places, dtype
        self._own: list[Tensor] = []
        self._depth = 0

    def enter(self, *_: Any) -> None:
        """Cast the weights, unless they are cast by now. `leave` has to follow."""
        self._depth += 1
        if self._depth > 1:
            return
        # A parameter of two modules is cast once, so that its gradients are added up before they are cast back.
        casts: dict[int, Tensor] = {}
        for module, name in self._places:
            own = module._parameters[name]
            assert own is not None
            self._own.append(own)
            if id(own) not in casts:
                casts[id(own)] = own.to(self._dtype)
            module._parameters[name] = casts[id(own)]  # type: ignore[assignment]

    def leave(self, *_: Any) -> None:
        """Undo `enter`; also after an error, by which recomputation ends early."""
        self._depth -= 1
        if self._depth == 0:
            for (module, name), own in zip(self._places, self._own, strict=True):
                module._parameters[name] = own  # type: ignore[assignment]
            self._own.clear()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with cast weights."""

        def with_casts(*args: Any, **options: Any) -> Any:
            self.enter()
            try:
                return function(*args, **options)
            finally:
                self.leave()

        return with_casts


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a fused model compute in another dtype than that of its parameters from now on, in place.

    `model.compute_dtype` says in which, as that of a sharded model does. Buffers stay as they are.
    """
    model.__dict__["compute_dtype"] = dtype
    casts, taken = [], set[nn.Module]()
    for unit in find_units(model):
        modules = [module for module in unit.modules() if module not in taken]
        taken.update(modules)
        places = [(module, name) for module in modules for name, p in module._parameters.items() if p is not None]
        cast = CastUnit(unit, places, dtype)
        unit.register_forward_pre_hook(cast.enter)
        unit.register_forward_hook(cast.leave, always_call=True)
        casts.append(cast)
    model.__dict__["cast_units"] = casts


def recompute_with_casts(model: PreTrainedModel) -> None:
    """Cast the weights also where activations are computed a second time, for which hooks on modules may not run.

    To be called once, after gradient checkpointing was enabled.
    """
    for cast in model.__dict__.get("cast_units", ()):
        plain = getattr(cast.unit, "_gradient_checkpointing_func", None)
        if plain is not None:
            cast.unit._gradient_checkpointing_func = _recomputed_with(cast, plain)


def _recomputed_with(cast: CastUnit, plain: Callable[..., Any]) -> Callable[..., Any]:
    def checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return plain(cast.around(function), *args, **options)

    return checkpoint


@torch.no_grad()
def keep_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep a model's parameters, which will not be trained, in the dtype of its products: its outputs stay the same."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """A context in which all weights stay cast, for many short passes without gradients."""
    with ExitStack() as stack:
        for cast in model.__dict__.get("cast_units", ()):
            cast.enter()
            stack.callback(cast.leave)
        yield
