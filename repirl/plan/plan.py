"""What a run will need, phase by phase, before anything is loaded.

Everything is derived from the configuration and the model's `config.json`: numbers of parameters from the model on the
meta device, activations from what autograd saves of each operation of a decoder layer, the rest from what the trainer
allocates and when it lets go. Lengths are taken at their limits: every prompt, expert and response is as long as the
configuration allows. Of each phase the moment counts in which most is held.

On a CPU the sum is the resident memory of one process, on a GPU what PyTorch's allocator hands out; `usable` says what
it may be of a device.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from repirl.attention import PackedLayout
from repirl.batch import deal_out
from repirl.config import Config, ConfigError, OptimizerConfig
from repirl.plan.activations import (
    LINEAR,
    Micro,
    Precision,
    Shape,
    Sizes,
    backward_bytes,
    forward_bytes,
    load_shape,
    recomputed_bytes,
    saved_bytes,
)
from repirl.rollout.vllm import MAX_BATCHED_TOKENS
from repirl.run import needs_reference

GIB = 2**30
# Resident memory of a process that trains without a model: Python, PyTorch, transformers and what they load on first
# use; torchao compiles its optimiser, which loads the compiler. Measured (bench/plan_check.py measures it again).
PROCESS_BYTES, COMPILER_BYTES = 512 << 20, 72 << 20
# vLLM (0.32, its CPU build) in the same process, beside its weights and its cache. Measured once.
ENGINE_BYTES = 280 << 20
# Slabs of the fused head: the native backend's on a CPU, Triton's on a GPU.
_HEAD_BYTES_CPU, _HEAD_BYTES_GPU = 24 << 20, 128 << 20
# torchao quantises moments in blocks, each with a float32 scale, and leaves small tensors alone.
_STATE_BLOCK, _STATE_SMALLEST = 256, 4096

Rows = dict[str, int]


@dataclass(frozen=True)
class Side:
    """One of the learners, in bytes of one process. weights, gradients, moments: what it has of its own · gathered:
    the unit of a sharded model that holds embeddings and head, and one layer's, whole · embeddings: a gradient of the
    embeddings, 0 if they are frozen · head: one of the output embedding."""

    name: str
    shape: Shape
    precision: Precision
    reads_values: bool
    weights: int
    gradients: int = 0
    moments: int = 0
    embeddings: int = 0
    head: int = 0
    root: int = 0
    layer: int = 0
    checkpointing: bool = False
    activation_offload: bool = False
    state_bits: int = 32

    @property
    def tied(self) -> bool:
        return self.shape.head is None


@dataclass(frozen=True)
class Phase:
    """A part of a step (or `load`): bytes by what they are for, at the moment that needs most."""

    name: str
    rows: Rows

    @property
    def total(self) -> int:
        return sum(self.rows.values())


@dataclass(frozen=True)
class Plan:
    """What one process needs. host: pinned or kept in host memory beside it, where the device is a GPU."""

    device: str
    ranks: int
    phases: list[Phase]
    host: Rows = field(default_factory=dict)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)


def plan(config: Config, ranks: int = 1, device: str | None = None) -> Plan:
    """Predict the memory of a run with this configuration. ranks: processes that share it · device: "cuda" or "cpu",
    by default the configuration's, and a GPU where that is left open.

    ConfigError where the model's configuration cannot be read or is not understood, or `ranks` does not fit.
    """
    device = device or ("cuda" if config.device == "auto" else config.device)
    if ranks < 1 or ranks % config.parallel.replicate:
        raise ConfigError(f"ranks is {ranks}: expected a multiple of parallel.replicate, {config.parallel.replicate}")
    shapes = [_load_shape(config.policy.model, config.policy.gguf_file)]
    if config.system.has_prm and config.prm.model is not None:
        shapes.append(_load_shape(config.prm.model, config.prm.gguf_file))
    return _Planner(config, ranks, device, shapes[0], shapes[-1]).plan()


_load_shape = functools.cache(load_shape)


class _Planner:
    """The plan of one configuration; a class because all parts of it want the same few numbers."""

    def __init__(self, config: Config, ranks: int, device: str, policy: Shape, prm: Shape) -> None:
        self.config, self.ranks, self.device, self.shape = config, ranks, device, policy
        self.kept, self.computed = _itemsize(config.dtype), _itemsize(config.computes_in)
        self.on_gpu = device == "cuda"
        self.shards = ranks // config.parallel.replicate
        # As in distributed/world.py: one process shards, too, where that is how it computes in another type.
        other_type = config.computes_in != config.dtype and config.adapters is None
        self.sharded = ranks > 1 or other_type or config.parallel.cpu_offload
        self.away = config.parallel.cpu_offload and self.on_gpu
        system = config.system
        self.base, self.base_name = 0, ""
        if config.adapters is None:
            make = self._full_side
        else:
            make = self._adapted_side
            self.base = self.computed * sum(map(self._local, policy.weights()))
        sections = config.policy, config.prm
        self.policy = make("policy", policy, False, sections[0])
        self.prm = make("PRM", prm, config.prm.reward == "value", sections[1]) if system.has_prm else None
        self.reference = make("reference", policy, False, None) if needs_reference(config) else None
        self.sides = [side for side in (self.policy, self.prm, self.reference) if side is not None]
        self.has_engine = system.online and config.rollout.engine == "vllm"
        # Sequences of a step: how many, their prompt tokens, their response tokens.
        prompt, count = config.data.max_prompt_tokens, config.rollout.prompts_per_step
        rollouts = (count * config.rollout.samples_per_prompt, prompt, config.rollout.max_response_tokens)
        experts = (config.experts_per_step, prompt, config.data.max_expert_tokens)
        self.scored = [rollouts]
        self.trained = {"policy": [rollouts if system.online else experts], "PRM": [experts, rollouts]}

    def _local(self, shape: Sizes) -> int:
        """Values that this process holds of a weight."""
        return math.ceil(shape[0] / self.shards) * math.prod(shape[1:])

    def _precision(self, shape: Shape, **adapters: Any) -> Precision:
        half = self.computed == 2
        kernel = self.on_gpu and half
        repeated = self.on_gpu and not half and shape.query != shape.key
        return Precision(self.kept, self.computed, kernel=kernel, repeated=repeated, **adapters)

    def _moments(self, weights: Iterable[Sizes], bits: int) -> int:
        total = 0
        for shape in weights:
            count = self._local(shape)
            small = count < _STATE_SMALLEST or count % _STATE_BLOCK
            total += 2 * self.kept * count if bits == 32 or small else 2 * (count + 4 * count // _STATE_BLOCK)
        return total

    def _units(self, shape: Shape, reads_values: bool, layer: int) -> dict[str, int]:
        """Bytes of gathered units: the one with the embeddings, and a layer."""
        if not self.sharded:
            return {}
        return {"root": self.computed * math.prod(shape.embeddings), "layer": layer}

    def _full_side(self, name: str, shape: Shape, reads_values: bool, section: Any) -> Side:
        weights = shape.weights(reads_values)
        local = sum(map(self._local, weights))
        layer = self.computed * sum(map(math.prod, shape.layer.values()))
        units = self._units(shape, reads_values, layer)
        precision = self._precision(shape)
        if section is None:
            return Side(name, shape, precision, reads_values, self.kept * local, **units)
        embeddings = math.prod(shape.embeddings) * (self.computed if self.sharded else self.kept)
        return Side(
            name,
            shape,
            precision,
            reads_values,
            self.kept * local,
            gradients=self.kept * local,
            moments=self._moments(weights, section.optimizer.state_bits),
            embeddings=embeddings,
            head=0 if reads_values else embeddings,
            **units,
            **_switches(section),
        )

    def _adapted_side(self, name: str, shape: Shape, reads_values: bool, section: Any) -> Side:
        adapters = self.config.adapters
        assert adapters is not None
        targets = _targets(shape, adapters.target_modules)
        lora: list[Sizes] = []
        for target in targets:
            out, features = shape.layer[f"{target}.weight"]
            lora += [(adapters.rank, features), (out, adapters.rank)]
        count = sum(map(math.prod, lora)) * len(self.config.system.trains)
        layer = self.computed * (sum(map(math.prod, shape.layer.values())) + count)
        units = self._units(shape, reads_values, layer)
        # A sharded model is computed in one type throughout.
        adapted = self.computed if self.sharded else self.kept
        precision = self._precision(shape, adapted=adapted, adapters=targets, rank=adapters.rank)
        if section is None:
            # The reference is the base, whatever the adapters are.
            return Side(name, shape, self._precision(shape, adapted=self.computed), reads_values, 0, **units)
        weights = [*lora * shape.num_layers, *([(1, shape.hidden), (1,)] if reads_values else [])]
        local = self.kept * sum(map(self._local, weights))
        moments = self._moments(weights, section.optimizer.state_bits)
        fixed = {"weights": local, "gradients": local, "moments": moments}
        return Side(name, shape, precision, reads_values, **fixed, **units, **_switches(section))

    # What is there in every phase.

    def _resident(self, active: Side | None) -> Rows:
        rows: Rows = {}
        if not self.on_gpu:
            compiles = any(side.state_bits == 8 for side in self.sides)
            rows["process"] = PROCESS_BYTES + COMPILER_BYTES * compiles + ENGINE_BYTES * self.has_engine
        if self.away:
            return rows
        if self.base:
            rows["base weights"] = self.base
        for side in self.sides:
            if self.config.offload_idle and side is not active:
                continue
            rows[f"{side.name} weights"] = side.weights
            rows[f"{side.name} moments"] = side.moments
        if self.config.checkpoint.every and self.config.checkpoint.asynchronous and not self.on_gpu:
            rows["checkpoint copy"] = self._checkpoint_copy()
        if self.has_engine and not self.on_gpu:
            # Asleep it keeps its weights there; on a GPU these wait in host memory.
            rows["engine weights"] = self._engine_weights()
        return rows

    def _engine_weights(self) -> int:
        count = sum(map(math.prod, self.shape.weights()))
        if not self.on_gpu and self.shape.head is None:
            # Tied weights are there once more, packed for the head's products.
            count += math.prod(self.shape.embeddings)
        return self.computed * count // self.config.rollout.vllm.tensor_parallel

    def _checkpoint_copy(self) -> int:
        return sum(side.weights + side.moments for side in self.sides if side.gradients)

    def _phase(self, name: str, active: Side | None, moments: Iterable[Rows]) -> Phase:
        """The resident rows and the largest of the moments."""
        rows = self._resident(active)
        worst = max(moments, key=lambda moment: sum(moment.values()), default={})
        return Phase(name, {key: value for key, value in (rows | worst).items() if value})

    # The phases.

    def plan(self) -> Plan:
        config = self.config
        phases = [self._load()]
        if config.system.online:
            rows = min(config.rollout.max_sequences, -(-self.scored[0][0] // self.ranks))
            phases.append(self._decode("rollout", rows, -(-rows // config.rollout.samples_per_prompt)))
            phases.append(self._score("old_logprob", self.policy))
        if config.system.online and self.reference is not None:
            phases.append(self._score("reference", self.reference))
        if self.prm is not None:
            phases.append(self._update("prm", self.prm))
            if config.loss.process_coefficient:
                phases.append(self._score("reward", self.prm))
        phases.append(self._update("policy", self.policy))
        if self.has_engine:
            # Weight after weight, whole; adapters are worked in, in float32.
            largest = max(map(math.prod, self.shape.weights()))
            moved = (12 if self.base else self.kept * self.sharded + 2 * self.computed) * largest
            phases.append(self._phase("push_weights", self.policy, [self._engine() | {"temporary": moved}]))
        if config.data.eval is not None and config.eval.every:
            shown = config.eval.num_prompts or config.rollout.max_sequences * self.ranks
            rows = min(config.rollout.max_sequences, -(-shown // self.ranks))
            phases.append(self._decode("eval", rows, rows))
        if config.checkpoint.every:
            # One learner after the other, straight from its tensors; the reference is not saved.
            largest = max((s for s in self.sides if s.gradients), key=lambda side: side.weights + side.moments)
            phases.append(self._phase("checkpoint", largest, []))
        return Plan(self.device, self.ranks, phases, self._host())

    def _load(self) -> Phase:
        """Weights, before there are moments. A model that is sharded is checked by a short pass."""
        sides = self.sides
        check = self._gathering(self.policy)
        if self.config.offload_idle:
            # Each leaves before the next one comes. On a CPU weights lie in the file, and have to be copied to leave.
            copies = 1 if self.on_gpu or self.sharded else 2
            rows = {f"{sides[0].name} weights": max(side.weights for side in sides) * copies}
        else:
            rows = {f"{side.name} weights": side.weights for side in sides}
        resident = {key: value for key, value in self._resident(None).items() if key in ("process", "base weights")}
        if self.away:
            rows = {}
        if self.has_engine:
            rows |= self._engine()
        return Phase("load", {key: value for key, value in (resident | rows | check).items() if value})

    def _gathering(self, side: Side) -> Rows:
        """Weights of a sharded model in a forward pass: the unit with the embeddings stays; what was gathered last
        waits in its buffer while the next is."""
        return {"gathered weights": 2 * side.root + 2 * side.layer}

    def _score(self, name: str, side: Side) -> Phase:
        moments = []
        for micro in self._micro_batches(side, self.scored):
            head = 0 if side.reads_values else self._head_bytes() + 40 * micro.responses
            temporary = forward_bytes(side.shape, micro, side.precision)
            moments.append({"head and embeddings": head, "temporary": temporary} | self._gathering(side))
        return self._phase(name, side, moments)

    def _head_bytes(self) -> int:
        return _HEAD_BYTES_GPU if self.on_gpu else _HEAD_BYTES_CPU

    def _update(self, name: str, side: Side) -> Phase:
        """Backward passes over the micro-batches, then the optimiser."""
        micros = self._micro_batches(side, self.trained[side.name])
        gradients = 0 if self.away else side.gradients
        root = side.root
        # A layer's gradients as backward leaves them, and in float32, of it and the one before.
        reduced = side.layer + 8 * side.layer // self.computed if side.embeddings else 0
        moments: list[Rows] = []
        for i, micro in enumerate(micros):
            saved = saved_bytes(
                side.shape, micro, side.precision, checkpointing=side.checkpointing, reads_values=side.reads_values
            )
            if side.checkpointing:
                if side.activation_offload and self.on_gpu:
                    # The inputs of all layers wait in host memory, but for two on their way.
                    saved -= (side.shape.num_layers - 2) * self._layer_input(side, micro)
                saved += recomputed_bytes(side.shape, micro, side.precision)
            head = 0
            if not side.reads_values:
                # The gradient of hidden states in float32, then in their own type.
                rows = micro.responses * side.shape.hidden * (4 + self.computed)
                head = side.head + self._head_bytes() + rows
            moments.append(
                {
                    # Filled layer by layer as the first micro-batch's activations go.
                    "gradients": gradients if i else 0,
                    "activations": saved,
                    "head and embeddings": head,
                    "temporary": backward_bytes(side.shape, micro, side.precision),
                    # Of layers, the next is fetched while one is computed.
                    "gathered weights": root + 4 * side.layer,
                    "reduced gradients": reduced,
                }
            )
        several = len(micros) > 1
        if side.embeddings:
            # At the end the gradient of the embeddings, and with tied ones that of the head, to be added to it.
            done = gradients - (0 if several else self.kept * self._local(side.shape.embeddings))
            both = side.embeddings + (side.head if side.tied else 0)
            moments.append({"gradients": done, "head and embeddings": both, "gathered weights": root})
        if side.embeddings and self.sharded:
            # The same, whole and in float32, and its sum over the processes, while there is one to add it to.
            whole = 4 * math.prod(side.shape.embeddings)
            reduced = {"gradients": gradients, "head and embeddings": side.embeddings}
            moments.append(reduced | {"reduced gradients": whole + (whole // self.shards if several else 0)})
        # AdamW, fused or with 8 bits, holds nothing beside its state while it steps.
        moments.append({"gradients": gradients})
        return self._phase(name, side, moments)

    def _layer_input(self, side: Side, micro: Micro) -> int:
        return self.computed * side.shape.hidden * micro.tokens

    def _decode(self, name: str, sequences: int, prompts: int) -> Phase:
        """Sampling `sequences` responses side by side to `prompts` different prompts."""
        side, config = self.policy, self.config
        shape, size = side.shape, self.computed
        if config.rollout.engine == "vllm_server":
            return self._phase(name, side, [])
        if self.has_engine:
            precision = Precision(self.kept, size, kernel=True)
            prefill = forward_bytes(shape, Micro(MAX_BATCHED_TOKENS, 0, ()), precision)
            sampling = 8 * config.rollout.max_sequences * shape.vocab
            return self._phase(name, side, [self._engine() | {"temporary": max(prefill, sampling)}])
        _, prompt, response = self.scored[0]
        gathered = 0
        if self.sharded:
            whole = sum(map(math.prod, shape.weights()))
            gathered = size * whole + shape.num_layers * (side.layer - size * sum(map(math.prod, shape.layer.values())))
        cache = 2 * shape.key * size * shape.num_layers
        one_layer = 2 * shape.key * size
        tokens = prompts * prompt
        precision = Precision(self.kept, size, kernel=True)
        prefill = forward_bytes(shape, Micro(tokens, 0, ()), precision)
        if shape.query != shape.key:
            # With a mask, keys and values are repeated for every head.
            attention = size * (5 * shape.query + 4 * shape.hidden) * tokens
            prefill = max(prefill, attention + prompts * prompt**2 * (1 + size))
        # The logits, in float32 (where they are not) and tempered, their exponentials, and in float64 their sums.
        copies = (4 if size < 4 else 0) + (4 if config.rollout.temperature != 1.0 else 0)
        sampling = sequences * shape.vocab * (size + copies + 4 + 8)
        length = sequences * (prompt + response)
        moments = [
            {"KV cache": cache * tokens, "temporary": prefill},
            # Each sequence gets its prompt's cache, layer by layer.
            {"KV cache": cache * sequences * prompt, "temporary": one_layer * tokens + sampling},
            {
                "KV cache": cache * length,
                "temporary": max(sampling, one_layer * length + sequences * shape.vocab * size),
            },
        ]
        return self._phase(name, side, [moment | {"gathered weights": gathered} for moment in moments])

    def _engine(self) -> Rows:
        """vLLM in this process, awake."""
        cache = int(self.config.rollout.vllm.kv_cache_gib * GIB)
        return {"engine weights": self._engine_weights(), "KV cache": cache}

    def _micro_batches(self, side: Side, sequences: list[tuple[int, int, int]]) -> list[Micro]:
        shape = side.shape
        # Operations as models.forward_flops counts them, by which sequences are dealt out.
        costs = (
            2 * shape.num_layers * sum(map(math.prod, shape.layer.values())),
            2 * shape.num_layers * shape.query,
            2 * shape.hidden * (1 if side.reads_values else shape.vocab),
        )
        return _micro_batches(tuple(sequences), self.config.batch.tokens_per_microbatch, self.ranks, costs)

    def _host(self) -> Rows:
        """What lies in host memory, where the device is a GPU."""
        if not self.on_gpu:
            return {}
        rows: Rows = {}
        if self.away:
            rows["weights, gradients, moments"] = self.base + sum(
                s.weights + s.gradients + s.moments for s in self.sides
            )
        elif self.config.offload_idle:
            # All of them: a model leaves before the next one comes, and PyTorch keeps pinned memory.
            rows["idle models"] = sum(side.weights + side.moments for side in self.sides)
        if self.config.checkpoint.every and self.config.checkpoint.asynchronous:
            rows["checkpoint copy"] = self._checkpoint_copy()
        if self.has_engine:
            rows["sleeping engine"] = self._engine_weights()
        offloading = [side for side in self.sides if side.activation_offload]
        if offloading:
            rows["layers' inputs"] = max(
                side.shape.num_layers * self._layer_input(side, micro)
                for side in offloading
                for micro in self._micro_batches(side, self.trained[side.name])
            )
        return rows


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize


def _switches(section: Any) -> dict[str, Any]:
    optimizer: OptimizerConfig = section.optimizer
    return {
        "checkpointing": section.gradient_checkpointing,
        "activation_offload": section.activation_offload,
        "state_bits": optimizer.state_bits,
    }


def _targets(shape: Shape, modules: str | list[str]) -> tuple[str, ...]:
    """Which linear layers get adapters, as peft understands the names."""
    if modules == "all-linear":
        return LINEAR
    found = tuple(x for x in LINEAR if any(x == name or x.endswith(f".{name}") for name in modules))
    if not found:
        raise ConfigError(f"adapters.target_modules {modules} name no linear layer; there are {[*LINEAR]}")
    return found


@functools.cache
def _micro_batches(
    sequences: tuple[tuple[int, int, int], ...], budget: int, ranks: int, costs: tuple[int, int, int]
) -> list[Micro]:
    """The first process's micro-batches, the costliest first, of (count, prompt tokens, response tokens)."""
    pairs = [(prompt + response, response) for count, prompt, response in sequences for _ in range(count)]
    per_token, per_pair, per_response = costs
    estimates = [
        per_token * float(length) + per_pair * float(length) ** 2 + per_response * float(response)
        for length, response in pairs
    ]
    micros = []
    for places in deal_out([length for length, _ in pairs], budget, ranks, estimates)[0]:
        chosen = [pairs[i] for i in places]
        lengths = [length for length, _ in chosen]
        layout = PackedLayout(torch.tensor([0, *itertools.accumulate(lengths)]), torch.device("cpu"))
        groups = tuple((group.shape[0], group.shape[1]) for group in layout.groups)
        micros.append(Micro(sum(lengths), sum(response for _, response in chosen), groups))
    return micros
