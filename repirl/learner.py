"""A model with its optimiser: it computes outputs for every token, and is updated with an objective's gradients."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from repirl.adapters import belongs, has_value_head, is_shared, merged_weights, select_adapter
from repirl.batch import PackedBatch, to_device
from repirl.config import ConfigError, RunError
from repirl.distributed.offload import Residency
from repirl.distributed.precision import recompute_with_casts
from repirl.distributed.shard import find_nonfinite, gathered, reshard, whole
from repirl.distributed.world import World
from repirl.fused import PackedCausalLM, forward_flops, layout_for, ordinary_attention
from repirl.model_files import shown
from repirl.objectives import Figures, Metrics, Outputs
from repirl.optimizer import make_optimizer, make_scheduler, scaled_rates, set_rates
from repirl.options import OptimizerConfig
from repirl.work import Work


class Loss(Protocol):
    """The part of an objective that an update uses."""

    def loss(self, outputs: Outputs, micro: PackedBatch) -> tuple[Tensor, Figures]:
        """See objectives.Objective.loss."""
        ...


class TrainingError(RunError):
    """Training cannot go on: losses, gradients or weights are not finite. All processes raise this error together."""


class Learner:
    """A model and, if it is trained, its optimiser, schedule and counters.

    Args:
        model: a fused model (`models.fuse`); it is sharded if `world.mesh` is set.
        optimizer: the options of the optimiser; None for a frozen model.
        num_updates: the number of optimiser updates that the learning-rate schedule spans.
        tokens_per_microbatch: the largest number of tokens in one forward and backward pass.
        temperature: the sampling temperature; log-probabilities are those at this temperature.
        adapter: the name of this learner's adapter in a shared model (`adapters.add_adapters`); None for the base.
        world: the processes that share the work. All of them call the same methods with the same batches.
        work: the counter to which computed tokens and FLOPs are added.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerConfig | None,
        *,
        num_updates: int = 1,
        tokens_per_microbatch: int,
        temperature: float = 1.0,
        adapter: str | None = None,
        world: World | None = None,
        work: Work | None = None,
    ) -> None:
        self.model = model
        # What messages call it.
        self.label = "model"
        self.world = world or World(next(model.parameters()).device)
        self.work = work or Work()
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        self.adapter, self.shares_model = adapter, is_shared(model)
        # Whether the model has a head with one output (a value), not one over the vocabulary.
        has_own_head = adapter is not None and has_value_head(model, adapter)
        self.reads_values = has_own_head or not isinstance(model, PackedCausalLM)
        # Whether such a value is read at the state before each response token (a critic's), not at the token itself.
        self.reads_states = False
        self.residency: Residency | None = None
        # Training mode, because activation checkpointing needs it; `fuse` has switched dropout off.
        model.train()
        self.trained = self._trained_parameters() if optimizer else {}
        self.num_skipped_updates = self.num_skipped_in_a_row = 0
        # Increases when the weights change. An engine with a copy of the weights compares it to see if its copy is old.
        self.version = 0
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is None:
            if not self.shares_model:
                model.requires_grad_(False)
            return
        self.max_grad_norm = optimizer.max_grad_norm
        self.max_skipped_updates = optimizer.max_skipped_updates
        self.optimizer = make_optimizer(self.trained, optimizer)
        self.scheduler = make_scheduler(self.optimizer, self.trained, optimizer, num_updates)

    def _trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        named = self.model.named_parameters()
        if self.shares_model:
            return {name: p for name, p in named if self.adapter is not None and belongs(name, self.adapter)}
        return {name: p for name, p in named if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.world.device

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, complete, by its Hugging Face name, as a sampling engine loads it.

        If the model is sharded, all processes must go through all parameters: each one is gathered from all processes.
        """
        self._activate()
        if self.shares_model:
            yield from merged_weights(self.model, self.adapter)
            return
        for name, parameter in self.model.named_parameters():
            yield name, whole(parameter.detach())

    def find_nonfinite(self) -> list[str]:
        """The names of weights, trained ones if there are any, that hold NaN or infinity; the same on all processes."""
        self._activate()
        named = self.trained.items() or self.model.named_parameters()
        return sorted(set(self.world.gather(find_nonfinite(named))))

    # The state that a checkpoint saves.

    def model_state(self) -> dict[str, Any]:
        """The weights, sharded as they are: of the whole model, or of this learner's adapter in a shared model."""
        self._activate()
        state: dict[str, Any] = get_model_state_dict(self.model)
        return {name: state[name] for name in self.trained} if self.shares_model else state

    def load_model_state(self, state: dict[str, Any]) -> None:
        """Restore weights that `model_state` returned."""
        self._activate()
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=not self.shares_model))
        self.version += 1

    @property
    def counters(self) -> dict[str, int]:
        """The numbers in the learner's state: updates that the schedule has counted, and skipped updates."""
        return {
            "num_updates": self.scheduler.last_epoch,
            "num_skipped_updates": self.num_skipped_updates,
            "num_skipped_in_a_row": self.num_skipped_in_a_row,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state from which training can go on.

        Returns:
            `model` and `optimizer` (tensors, sharded as they are) and `counters` (numbers). Empty for a frozen learner.
        """
        if self.optimizer is None:
            return {}
        model = self.model_state()
        self._activate(moments=True)
        never_stepped = not self.optimizer.state
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        if never_stepped:
            # To create the moments, PyTorch has made a step with zero gradients. This step must not count.
            for state in self.optimizer.state.values():
                state["step"].zero_()
        return {"model": model, "optimizer": optimizer, "counters": self.counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        The optimiser's options and the schedule are not restored: a resumed run may use new ones.
        """
        assert self.optimizer is not None
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.load_model_state(state["model"])
        self._activate(moments=True)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        for group, mine in zip(self.optimizer.param_groups, options, strict=True):
            group |= mine
        counters = state["counters"]
        self._set_num_updates(counters["num_updates"])
        self.num_skipped_updates = counters["num_skipped_updates"]
        self.num_skipped_in_a_row = counters["num_skipped_in_a_row"]

    def _set_num_updates(self, count: int) -> None:
        """Set the schedule's position, and the learning rate that belongs to it, as after `count` updates."""
        assert self.optimizer is not None
        self.scheduler.last_epoch, self.scheduler._step_count = count, count + 1
        rules = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        self.scheduler._last_lr = [float(base) * rule(count) for base, rule in rules]
        set_rates(self.optimizer, self.scheduler._last_lr)

    def _activate(self, *, moments: bool = False) -> None:
        """Bring this learner's weights, and where they are needed moments, to the device if they were moved away, and
        switch on its adapter."""
        if self.residency is not None:
            self.residency.use(self, moments=moments)
        if self.shares_model:
            select_adapter(self.model, self.adapter)

    @contextmanager
    def ordinary_model(self) -> Iterator[PreTrainedModel]:
        """A context with the model set up for padded batches and a KV cache, without gradients.

        Inside, each process runs forward passes independently of the others.
        """
        self._activate()
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), gathered(self.model), ordinary_attention(self.model):
                yield self.model
        finally:
            self.model.train(training)

    def _outputs(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        device = self.device
        layout = layout_for(self.model, batch.cu_seqlens, device)
        arguments: dict[str, Any] = {
            "input_ids": to_device(batch.token_ids, device),
            "position_ids": to_device(batch.position_ids, device),
            "packed_layout": layout,
            "response_index": to_device(batch.response_index, device),
        }
        if self.reads_values:
            arguments |= {"reads_values": True}
            if self.reads_states:
                # A prompt has at least one token, so this stays in the sequence.
                arguments["response_index"] = arguments["response_index"] - 1
            outputs = {"value": self.model(**arguments)}
        else:
            arguments |= {
                "targets": to_device(batch.response_ids, device),
                "temperature": temperature or self.temperature,
            }
            outputs = self.model(**arguments)._asdict()
        self.work.slots += layout.num_slots
        return outputs

    def _microbatches(self, batch: PackedBatch, flops_factor: int) -> Iterator[tuple[list[int], PackedBatch]]:
        """This process's micro-batches: the indices of the sequences in `batch`, and a batch of these sequences.

        All processes get equally many, because a sharded model must run on all processes at once. A process that has
        no sequences left gets empty indices and a batch of one short sequence, whose results are not used.
        """
        costs = forward_flops(self.model, batch, self.reads_values)
        mine = batch.microbatches(self.tokens_per_microbatch, self.world.size, costs)[self.world.rank]
        for sequences in mine:
            if sequences:
                self.work.flops += flops_factor * sum(costs[i] for i in sequences)
                self.work.tokens += int(batch.lengths[sequences].sum())
            yield sequences, batch.select(sequences or [int(batch.lengths.argmin())])

    @torch.no_grad()
    def score(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        """Outputs for every response token, without gradients.

        Args:
            batch: the sequences.
            temperature: the temperature of the log-probabilities; None for the learner's own.

        Returns:
            Name -> [R] float32 on the CPU, the same on all processes.
        """
        self._activate()
        # They stay on the device until the end, so that the host waits for it once.
        parts: dict[str, list[Tensor]] = defaultdict(list)
        positions: list[Tensor] = []
        for sequences, micro in self._microbatches(batch, flops_factor=1):
            outputs = self._outputs(micro, temperature)
            positions.append(batch.response_positions(sequences))
            for name, values in outputs.items():
                parts[name].append(values.float()[: len(positions[-1])])
        reshard(self.model)
        collected: Outputs = {}
        for name, values_of in parts.items():
            collected[name] = torch.zeros(batch.num_response_tokens)
            collected[name][torch.cat(positions)] = torch.cat(values_of).cpu()
        return {name: self.world.sum(stream) for name, stream in collected.items()}

    def update(self, batch: PackedBatch, objective: Loss, rate: float = 1.0) -> Metrics:
        """Make one update on the whole batch, in micro-batches. The loss is the sum over all micro-batches.

        An update whose loss or gradient is not finite is skipped and counted.

        Args:
            batch: the sequences.
            objective: computes the loss. Its normalisers must be those of the whole batch; then the gradient does not
                depend on how the batch is divided into micro-batches and over processes.
            rate: the learning rate of this update, in shares of the schedule's. AdamW makes steps of the same length
                whatever the scale of the loss is, so an update is made smaller here, not in the loss.

        Returns:
            `loss`, `grad_norm` before clipping, `lr`, `skipped_updates` so far, and the objective's figures.

        Raises:
            TrainingError: `max_skipped_updates` updates in a row were skipped, or the weights are no longer finite.
        """
        assert self.optimizer is not None, "a frozen model cannot be updated"
        self._activate(moments=True)
        # Sums stay on the device until the end, so that the host waits for it once.
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        for sequences, micro in self._microbatches(batch, flops_factor=3):
            outputs = self._outputs(micro)
            if sequences:
                loss, figures = objective.loss(outputs, micro)
                for name, total in [("loss", loss), *((name, total) for name, (total, _) in figures.items())]:
                    sums[name] = sums.get(name, 0.0) + total.detach().double()
                for name, (_, count) in figures.items():
                    counts[name] += count
            else:
                loss = 0.0 * torch.stack([values.sum() for values in outputs.values()]).sum()
            # FSDP takes the mean of the gradients over the processes, but the loss is a sum over them.
            (loss * self.world.size).backward()
        reshard(self.model)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm)))
        totals = dict(zip(sums, torch.stack([*sums.values()]).tolist(), strict=True)) if sums else {}
        everybodys = self.world.gather([(totals, counts)])
        totals, counts = _added([part for part, _ in everybodys]), _added([part for _, part in everybodys])
        loss_value = totals.pop("loss", 0.0)
        lr = rate * float(self.scheduler.get_last_lr()[0])
        self._apply(loss_value, norm, rate)
        metrics = {"loss": loss_value, "grad_norm": norm, "lr": lr, "skipped_updates": self.num_skipped_updates}
        return metrics | {name: total / counts[name] for name, total in totals.items()}

    def _apply(self, loss: float, norm: float, rate: float) -> None:
        """Step the optimiser if loss and gradient are finite. Raises TrainingError after too many skipped updates, and
        where the weights are not finite after the step."""
        assert self.optimizer is not None
        if math.isfinite(norm) and math.isfinite(loss):
            with scaled_rates(self.optimizer, rate):
                self.optimizer.step()
            self.version += 1
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped_updates += 1
            self.num_skipped_in_a_row += 1
        self.scheduler.step()
        # Free the gradients now, not before the next update: other models need the memory until then.
        self.optimizer.zero_grad(set_to_none=True)
        if self.num_skipped_in_a_row >= self.max_skipped_updates:
            raise TrainingError(
                f"{self.num_skipped_in_a_row} updates in a row of the {self.label} had a loss or gradient that is not "
                f"finite (loss {loss}, gradient norm {norm}) and were skipped: lower its learning rate, or look at the "
                "data; optimizer.max_skipped_updates sets how many are let pass"
            )
        # So that no turn begins, and no checkpoint is written, with weights that nothing can be computed with.
        if not self.num_skipped_in_a_row and (names := self.find_nonfinite()):
            raise TrainingError(
                f"the weights of the {self.label} are no longer finite after its update {self.scheduler.last_epoch} "
                f"(NaN or infinity in {shown(names)}), with a loss of {loss} and a gradient norm of {norm}: lower its "
                "learning rate"
            )


def _added(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of all processes' numbers, by name."""
    total: dict[str, Any] = defaultdict(int)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return total


def enable_checkpointing(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Recompute the activations of each layer in the backward pass instead of keeping them.

    Args:
        model: the model to change.
        offload: keep the inputs of the layers in host memory until the backward pass.

    Raises:
        ConfigError: `offload` needs a newer release of transformers.
    """
    options: dict[str, Any] = {"offload": True} if offload else {}
    # transformers renamed this method: older releases have only the old name, newer ones warn about it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False}, **options)
    except TypeError as error:
        raise ConfigError("activation_offload needs a newer transformers than the one installed here") from error
    recompute_with_casts(model)
