"""What each phase of a run needs: what is there throughout, and the moment at which most is held."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from repirl.config import Config
from repirl.objectives import load_objectives
from repirl.plan.activations import (
    Micro,
    Precision,
    backward_bytes,
    forward_bytes,
    recomputed_bytes,
    saved_bytes,
)
from repirl.plan.batches import Sequences, micro_batches, of_data, rollouts, trained_on
from repirl.plan.sides import Placement, Side
from repirl.rollout.transformers import CACHE_ROOM
from repirl.rollout.vllm import MAX_BATCHED_TOKENS
from repirl.streams import STREAM_OF

# Resident memory of a process that trains without a model: Python, PyTorch, transformers and what they load on first
# use; torchao compiles its optimiser, which loads the compiler. Measured (bench/plan_check.py measures it again).
PROCESS_BYTES, COMPILER_BYTES = 512 << 20, 72 << 20
# vLLM (0.32, its CPU build) in the same process, without its weights and its cache. Measured once.
ENGINE_BYTES = 280 << 20
# Slabs of the fused head: the native backend's on a CPU, Triton's on a GPU.
_HEAD_BYTES_CPU, _HEAD_BYTES_GPU = 24 << 20, 128 << 20

# Bytes by what they are for.
Rows = dict[str, int]


@dataclass(frozen=True)
class Phase:
    """A part of a turn, or `load` before the first one. rows: what is held at the moment that needs most."""

    name: str
    rows: Rows

    @property
    def total(self) -> int:
        return sum(self.rows.values())


class Planner:
    """The phases of one configuration; a class because all of them need the same few values.

    Args:
        config: the run's.
        placement: where its values lie.
        sides: its learners by name, as `sides.build_sides` makes them.
        base: bytes of the base that adapters share, 0 without adapters.
    """

    def __init__(self, config: Config, placement: Placement, sides: dict[str, Side], base: int) -> None:
        self.config, self.placement, self.base = config, placement, base
        self.by_name, self.sides = sides, list(sides.values())
        self.has_engine = config.system.online and config.rollout.engine == "vllm"
        self._fetched = "cast weights" if placement.casts else "gathered weights"

    def phases(self) -> list[Phase]:
        """All phases, in the order of a turn; those that come only in some turns last."""
        config = self.config
        scored = (rollouts(config),) if config.system.online else of_data(config)
        phases = [self._load()]
        if config.system.online:
            phases += [self._rollout(), self._score("old_logprob", self.by_name["policy"], scored)]
        if "reference" in self.by_name:
            phases.append(self._score("reference", self.by_name["reference"], scored))
        for name, kind in load_objectives(config.system.objectives).items():
            sequences = trained_on(config, name)
            for other in kind(config).reads_learners:
                if other != name:
                    phases.append(self._score(STREAM_OF[other], self.by_name[other], sequences))
            phases.append(self._update(self.by_name[name], sequences))
        if self.has_engine:
            phases.append(self._push_weights())
        if config.data.eval is not None and config.eval.every:
            shown = config.eval.num_prompts or config.rollout.max_sequences * self.placement.ranks
            rows = min(config.rollout.max_sequences, -(-shown // self.placement.ranks))
            phases.append(self.decode("eval", rows, rows))
        if config.checkpoint.every:
            # One learner after the other, straight from its tensors; frozen ones are not saved.
            trained = [side for side in self.sides if side.section is not None]
            largest = max(trained, key=lambda side: side.weights + side.moments)
            phases.append(self._phase("checkpoint", largest, [], steps=True))
        return phases

    def host(self) -> Rows:
        """What lies in host memory beside each process, where the device is a GPU."""
        if not self.placement.on_gpu:
            return {}
        rows: Rows = {}
        if self.placement.away:
            own = sum(side.weights + side.gradients + side.moments for side in self.sides)
            rows["weights, gradients, moments"] = self.base + own
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
                for micro in self._micro_batches(side, trained_on(self.config, side.name))
            )
        return rows

    # What is there throughout a phase.

    def _phase(self, name: str, active: Side | None, moments: Iterable[Rows], *, steps: bool = False) -> Phase:
        """A phase: what is there throughout it, and of the moments the one that needs most."""
        rows = self._resident(active, steps=steps)
        worst = max(moments, key=lambda moment: sum(moment.values()), default={})
        return Phase(name, _without_zeros(rows | worst))

    def _resident(self, active: Side | None, *, steps: bool = False) -> Rows:
        """What is there whatever is computed. active: the learner that works, where idle ones leave the device; steps:
        whether its optimiser's state is needed, which otherwise stays away, too."""
        placement, config = self.placement, self.config
        rows: Rows = {}
        if not placement.on_gpu:
            compiles = any(side.state_bits == 8 for side in self.sides)
            rows["process"] = PROCESS_BYTES + COMPILER_BYTES * compiles + ENGINE_BYTES * self.has_engine
        if placement.away:
            return rows
        if self.base:
            rows["base weights"] = self.base
        for side in self.sides:
            if config.offload_idle and side is not active:
                continue
            rows[f"{side.label} weights"] = side.weights
            if steps or not config.offload_idle:
                rows[f"{side.label} moments"] = side.moments
        if config.checkpoint.every and config.checkpoint.asynchronous and not placement.on_gpu:
            rows["checkpoint copy"] = self._checkpoint_copy()
        if self.has_engine and not placement.on_gpu:
            # On a CPU a sleeping engine keeps its weights in the process's memory; on a GPU they wait in the host's.
            rows["engine weights"] = self._engine_weights()
        return rows

    def _checkpoint_copy(self) -> int:
        return sum(side.weights + side.moments for side in self.sides if side.section is not None)

    def _load(self) -> Phase:
        """Weights, before there are moments. A model that is sharded is checked by a short pass."""
        sides = self.sides
        if self.config.offload_idle:
            # Each leaves before the next one comes. On a CPU weights are mapped from the file, and copied before they
            # leave.
            copies = 1 if self.placement.on_gpu or self.placement.sharded else 2
            rows = {f"{sides[0].label} weights": max(side.weights for side in sides) * copies}
        else:
            rows = {f"{side.label} weights": side.weights for side in sides}
        if self.placement.casts and (frozen := [side for side in sides if side.section is None]):
            # Until its weights are cast for good.
            rows["cast weights"] = frozen[-1].weights * (self.placement.kept // self.placement.computed - 1)
        resident = {key: value for key, value in self._resident(None).items() if key in ("process", "base weights")}
        if self.placement.away:
            rows = {}
        if self.has_engine:
            rows |= self._engine()
        return Phase("load", _without_zeros(resident | rows | self._gathering(sides[0])))

    # Passes over packed sequences.

    def _score(self, name: str, side: Side, sequences: tuple[Sequences, ...]) -> Phase:
        """Forward passes without gradients."""
        moments: list[Rows] = []
        for micro in self._micro_batches(side, sequences):
            head = 0 if side.reads_values else self._head_bytes() + 40 * micro.responses
            temporary = forward_bytes(side.shape, micro, side.precision)
            moments.append({"head and embeddings": head, "temporary": temporary} | self._gathering(side))
        return self._phase(name, side, moments)

    def _gathering(self, side: Side) -> Rows:
        """Weights of a sharded model in a forward pass: the unit with the embeddings stays; while a layer is gathered,
        the buffer of the one before it is still there. Cast weights have no buffers."""
        return {self._fetched: (1 if self.placement.casts else 2) * (side.root + side.layer)}

    def _update(self, side: Side, sequences: tuple[Sequences, ...]) -> Phase:
        """Backward passes over the micro-batches, then the optimiser."""
        micros = self._micro_batches(side, sequences)
        gradients = 0 if self.placement.away else side.gradients
        # Filled layer by layer as the first micro-batch's activations go.
        moments = [self._backward(side, micro, gradients if i else 0) for i, micro in enumerate(micros)]
        moments += self._last_gradients(side, gradients, several=len(micros) > 1)
        # AdamW, fused or with 8 bits, holds nothing beside its state while it steps.
        moments.append({"gradients": gradients})
        return self._phase(side.name, side, moments, steps=True)

    def _backward(self, side: Side, micro: Micro, gradients: int) -> Rows:
        """A backward pass at its start. gradients: of the micro-batches before."""
        computed = self.placement.computed
        shape, precision = side.shape, side.precision
        saved = saved_bytes(shape, micro, precision, checkpointing=side.checkpointing, reads_values=side.reads_values)
        if side.checkpointing:
            if side.activation_offload and self.placement.on_gpu:
                # All layers' inputs wait in host memory but two, which are on their way.
                saved -= (shape.num_layers - 2) * self._layer_input(side, micro)
            saved += recomputed_bytes(shape, micro, precision)
        head = 0
        if not side.reads_values:
            # The gradient of hidden states in float32, then in their own type.
            head = side.head + self._head_bytes() + micro.responses * shape.hidden * (4 + computed)
        rows = {
            "gradients": gradients,
            "activations": saved,
            "head and embeddings": head,
            "temporary": backward_bytes(shape, micro, precision),
        }
        if self.placement.casts:
            # Cast weights are there from forward to backward, but in layers that are computed again.
            return rows | {"cast weights": side.root + side.layer * (1 if side.checkpointing else shape.num_layers)}
        return rows | {
            # The next layer is fetched while one is computed.
            "gathered weights": side.root + 4 * side.layer,
            # A layer's gradients in the type of its weights, and in float32 those of it and of the layer before.
            "reduced gradients": side.layer + 8 * side.layer // computed if side.embeddings else 0,
        }

    def _last_gradients(self, side: Side, gradients: int, *, several: bool) -> list[Rows]:
        """The end of a backward pass, at the embeddings. several: whether there were micro-batches before."""
        if not side.embeddings:
            return []
        placement, embeddings = self.placement, side.shape.embeddings
        # The gradient of the embeddings, and with tied ones that of the head, to be added to it.
        done = gradients - (0 if several else placement.kept * placement.local(embeddings))
        both = side.embeddings + (side.head if side.tied else 0)
        moments = [{"gradients": done, "head and embeddings": both, self._fetched: side.root}]
        if placement.casts:
            # That gradient in the type of the parameters, where there is one to add it to.
            cast = placement.kept * math.prod(embeddings) if several else 0
            moments.append({"gradients": gradients, "head and embeddings": side.embeddings, "cast gradients": cast})
        if placement.sharded:
            # That gradient whole and in float32, and where there is one to add it to, its sum over the processes.
            whole = 4 * math.prod(embeddings)
            reduced = whole + (whole // placement.shards if several else 0)
            moments.append(
                {"gradients": gradients, "head and embeddings": side.embeddings, "reduced gradients": reduced}
            )
        return moments

    def _head_bytes(self) -> int:
        return _HEAD_BYTES_GPU if self.placement.on_gpu else _HEAD_BYTES_CPU

    def _layer_input(self, side: Side, micro: Micro) -> int:
        return self.placement.computed * side.shape.hidden * micro.tokens

    def _micro_batches(self, side: Side, sequences: tuple[Sequences, ...]) -> list[Micro]:
        return micro_batches(self.config, self.placement.ranks, side.shape, side.reads_values, sequences)

    # Sampling.

    def _rollout(self) -> Phase:
        """Sampling of a turn's rollouts."""
        options = self.config.rollout
        sampled = options.prompts_per_round * options.samples_per_prompt
        rows = min(options.max_sequences, -(-sampled // self.placement.ranks))
        return self.decode("rollout", rows, -(-rows // options.samples_per_prompt))

    def decode(self, name: str, sequences: int, prompts: int) -> Phase:
        """Sampling `sequences` responses side by side to `prompts` different prompts."""
        policy = self.by_name["policy"]
        if self.config.rollout.engine == "vllm_server":
            return self._phase(name, policy, [])
        if self.has_engine:
            return self._phase(name, policy, [self._engine() | {"temporary": self._engine_pass(policy)}])
        return self._phase(name, policy, self._sampling(policy, sequences, prompts))

    def _sampling(self, policy: Side, sequences: int, prompts: int) -> list[Rows]:
        """Sampling with the policy's own model: the prompts, their caches for every sequence, the last token."""
        shape, size, options = policy.shape, self.placement.computed, self.config.rollout
        _, prompt, response = rollouts(self.config)
        gathered = 0
        if self.placement.sharded:
            # All units at once; a layer's also holds its adapters.
            gathered = size * shape.num_values + shape.num_layers * (policy.layer - size * shape.layer_values)
        elif self.placement.casts and policy.section is not None:
            gathered = size * shape.num_values
        one_layer = 2 * shape.key * size
        cache = one_layer * shape.num_layers
        tokens = prompts * prompt
        # Tokens of a sequence for which there is room: at first, and at the end.
        first = room = prompt + CACHE_ROOM
        while room < prompt + response:
            room += 1 + CACHE_ROOM
        precision = Precision(self.placement.kept, size, kernel=True)
        prefill = forward_bytes(shape, Micro(tokens, 0, ()), precision)
        if shape.query != shape.key:
            # With a mask, keys and values are repeated for every head.
            attention = size * (5 * shape.query + 4 * shape.hidden) * tokens
            prefill = max(prefill, attention + prompts * prompt**2 * (1 + size))
        # The logits, in float32 (where they are not) and tempered, their exponentials, and in float64 their sums.
        copies = (4 if size < 4 else 0) + (4 if options.temperature != 1.0 else 0)
        sampling = sequences * shape.vocab * (size + copies + 4 + 8)
        # A layer's tensors are there twice while they grow.
        grown = one_layer * sequences * (room - 1 - CACHE_ROOM) if room > first else 0
        last = max(sampling, grown + sequences * shape.vocab * size)
        moments: list[Rows] = [
            {"KV cache": cache * prompts * first, "temporary": prefill},
            # Each sequence gets its prompt's cache, layer by layer.
            {"KV cache": cache * sequences * first, "temporary": one_layer * prompts * first + sampling},
            {"KV cache": cache * sequences * room, "temporary": last},
        ]
        return [moment | {self._fetched: gathered} for moment in moments]

    # vLLM in this process.

    def _engine(self) -> Rows:
        """What it holds while it is awake."""
        cache = int(self.config.rollout.vllm.kv_cache_gib * 2**30)
        return {"engine weights": self._engine_weights(), "KV cache": cache}

    def _engine_weights(self) -> int:
        shape = self.by_name["policy"].shape
        count = shape.num_values
        if not self.placement.on_gpu and shape.head is None:
            # Tied weights are there once more, packed for the head's products.
            count += math.prod(shape.embeddings)
        return self.placement.computed * count // self.config.rollout.vllm.tensor_parallel

    def _engine_pass(self, policy: Side) -> int:
        """The most that a pass of the engine holds for a moment."""
        precision = Precision(self.placement.kept, self.placement.computed, kernel=True)
        prefill = forward_bytes(policy.shape, Micro(MAX_BATCHED_TOKENS, 0, ()), precision)
        return max(prefill, 8 * self.config.rollout.max_sequences * policy.shape.vocab)

    def _push_weights(self) -> Phase:
        """The engine gets the policy's weights, one after the other and whole; adapters are added in float32."""
        placement, policy = self.placement, self.by_name["policy"]
        largest = max(map(math.prod, policy.shape.weights()))
        each = 12 if self.base else placement.kept * placement.sharded + 2 * placement.computed
        return self._phase("push_weights", policy, [self._engine() | {"temporary": each * largest}])


def _without_zeros(rows: Rows) -> Rows:
    return {key: value for key, value in rows.items() if value}
