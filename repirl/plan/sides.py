"""What one process holds of each learner: its own weights, gradients and moments, and what it gathers of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from repirl.config import Config, ConfigError
from repirl.options import AdapterConfig, LearnerConfig
from repirl.plan.activations import LINEAR, Precision, Shape, Sizes
from repirl.systems import LABELS

# torchao quantises moments in blocks, each with a float32 scale, and leaves small tensors as they are.
_STATE_BLOCK, _STATE_SMALLEST = 256, 4096


@dataclass(frozen=True)
class Placement:
    """Where a run's values lie, and how many bytes each takes."""

    on_gpu: bool
    ranks: int
    # Processes that share one copy of the weights.
    shards: int
    # Bytes of a parameter, a gradient or a moment.
    kept: int
    # Bytes of an activation or a gathered weight.
    computed: int
    # Models are gathered unit by unit to be computed with, also where one process holds all shards.
    sharded: bool
    # Weights that are trained are cast unit by unit to be computed with (distributed/precision.py).
    casts: bool
    # Parameters, gradients and moments stay in host memory.
    away: bool

    def local(self, shape: Sizes) -> int:
        """Values that one process holds of a weight, the largest share of any."""
        return math.ceil(shape[0] / self.shards) * math.prod(shape[1:])

    def local_weights(self, weights: Iterable[Sizes]) -> int:
        """Values that one process holds of all these weights."""
        return sum(map(self.local, weights))

    def moments(self, weights: Iterable[Sizes], bits: int) -> int:
        """Bytes of AdamW's two moments on one process."""
        total = 0
        for shape in weights:
            count = self.local(shape)
            small = count < _STATE_SMALLEST or count % _STATE_BLOCK
            total += 2 * self.kept * count if bits == 32 or small else 2 * (count + 4 * count // _STATE_BLOCK)
        return total


def place(config: Config, ranks: int, device: str) -> Placement:
    """The placement of a run. ConfigError where `ranks` does not fit `parallel.replicate`."""
    replicate, on_gpu = config.parallel.replicate, device == "cuda"
    if ranks < 1 or ranks % replicate:
        raise ConfigError(f"ranks is {ranks}: expected a multiple of parallel.replicate, {replicate}")
    # As in distributed/world.py: one process shards, too, where weights stay in host memory.
    sharded = ranks > 1 or config.parallel.cpu_offload
    return Placement(
        on_gpu=on_gpu,
        ranks=ranks,
        shards=ranks // replicate,
        kept=_itemsize(config.dtype),
        computed=_itemsize(config.computes_in),
        sharded=sharded,
        casts=not sharded and config.computes_in != config.dtype and config.adapters is None,
        away=config.parallel.cpu_offload and on_gpu,
    )


def _itemsize(dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


@dataclass(frozen=True)
class Side:
    """A learner as the plan sees it. All numbers are bytes on one process."""

    name: str
    # The options that it is trained with; None for a frozen one.
    section: LearnerConfig | None
    shape: Shape
    precision: Precision
    reads_values: bool
    # What is its own: adapters share their base, which is nobody's.
    weights: int
    gradients: int = 0
    moments: int = 0
    # Whole gradients of the input and of the output embeddings; 0 where these are frozen or not there.
    embeddings: int = 0
    head: int = 0
    # What is gathered or cast at a time: the unit with the embeddings, and one layer.
    root: int = 0
    layer: int = 0

    @property
    def label(self) -> str:
        """Its name for people."""
        return LABELS.get(self.name, self.name)

    @property
    def tied(self) -> bool:
        """Whether the output embeddings are the input embeddings."""
        return self.shape.head is None

    @property
    def checkpointing(self) -> bool:
        return self.section is not None and self.section.gradient_checkpointing

    @property
    def activation_offload(self) -> bool:
        return self.section is not None and self.section.activation_offload

    @property
    def state_bits(self) -> int:
        return self.section.optimizer.state_bits if self.section is not None else 32


def build_sides(config: Config, placement: Placement, shapes: Mapping[str, Shape]) -> dict[str, Side]:
    """A side for each learner.

    Args:
        config: the run's.
        placement: where its values lie.
        shapes: of each learner's model, by the names of `run.learner_names`.

    Raises:
        ConfigError: where `adapters.target_modules` name no linear layer.
    """
    make = _full_side if config.adapters is None else _adapted_side
    return {name: make(config, placement, name, shape) for name, shape in shapes.items()}


def base_weights(config: Config, placement: Placement, shapes: Mapping[str, Shape]) -> int:
    """Bytes of the frozen base that adapters share; 0 without adapters."""
    if config.adapters is None:
        return 0
    return placement.computed * placement.local_weights(next(iter(shapes.values())).weights())


def _precision(
    placement: Placement, shape: Shape, adapted: int | None = None, adapters: tuple[str, ...] = (), rank: int = 0
) -> Precision:
    half = placement.computed == 2
    kernel = placement.on_gpu and half
    repeated = placement.on_gpu and not half and shape.query != shape.key
    return Precision(placement.kept, placement.computed, adapted, adapters, rank, kernel, repeated)


def _full_side(config: Config, placement: Placement, name: str, shape: Shape) -> Side:
    """A model of its own, all of whose weights are trained, or none."""
    section, reads_values = config.trained_sections.get(name), config.reads_values(name)
    kept, computed, fetched = placement.kept, placement.computed, placement.sharded
    if placement.casts:
        # Frozen weights are kept as they are computed with.
        kept, fetched = (computed, False) if section is None else (kept, True)
    weights = shape.weights(reads_values)
    local = kept * placement.local_weights(weights)
    embeddings = math.prod(shape.embeddings)
    gradient = embeddings * (computed if fetched else kept) if section is not None else 0
    return Side(
        name,
        section,
        shape,
        _precision(placement, shape),
        reads_values,
        weights=local,
        gradients=local if section is not None else 0,
        moments=placement.moments(weights, section.optimizer.state_bits) if section is not None else 0,
        embeddings=gradient,
        head=0 if reads_values else gradient,
        root=computed * embeddings if fetched else 0,
        layer=computed * shape.layer_values if fetched else 0,
    )


def _adapted_side(config: Config, placement: Placement, name: str, shape: Shape) -> Side:
    """Adapters on the base that all learners share, or as a frozen learner that base itself."""
    assert config.adapters is not None
    section, reads_values = config.trained_sections.get(name), config.reads_values(name)
    kept, computed, sharded = placement.kept, placement.computed, placement.sharded
    targets = _targets(shape, config.adapters.target_modules)
    lora = _lora(shape, targets, config.adapters)
    # A gathered layer brings every learner's adapters.
    layer = shape.layer_values + sum(map(math.prod, lora)) * len(config.system.trains)
    root = math.prod(shape.embeddings)
    if section is None:
        precision, weights = _precision(placement, shape, adapted=computed), []
    else:
        # A sharded model is computed in one type throughout.
        precision = _precision(placement, shape, computed if sharded else kept, targets, config.adapters.rank)
        value_head: list[Sizes] = [(1, shape.hidden), (1,)] if reads_values else []
        weights = [*lora * shape.num_layers, *value_head]
    local = kept * placement.local_weights(weights)
    return Side(
        name,
        section,
        shape,
        precision,
        reads_values,
        weights=local,
        gradients=local,
        moments=placement.moments(weights, section.optimizer.state_bits) if section is not None else 0,
        root=computed * root if sharded else 0,
        layer=computed * layer if sharded else 0,
    )


def _lora(shape: Shape, targets: tuple[str, ...], adapters: AdapterConfig) -> list[Sizes]:
    """The weights of one layer's adapters."""
    pairs: list[Sizes] = []
    for target in targets:
        out, features = shape.layer[f"{target}.weight"]
        pairs += [(adapters.rank, features), (out, adapters.rank)]
    return pairs


def _targets(shape: Shape, modules: str | list[str]) -> tuple[str, ...]:
    """Which linear layers get adapters, as peft understands the names."""
    if modules == "all-linear":
        return LINEAR
    layers = tuple(x for x in LINEAR if any(x == name or x.endswith(f".{name}") for name in modules))
    if not layers:
        raise ConfigError(f"adapters.target_modules {modules} name no linear layer; there are {[*LINEAR]}")
    return layers
