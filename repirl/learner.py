"""One trainable model: token streams out of it, gradients into it. It knows no algorithm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedModel, get_scheduler

from repirl.adapters import belongs, is_shared, merged_weights, select_adapter
from repirl.attention import PackedLayout
from repirl.batch import PackedBatch
from repirl.config import ConfigError, OptimizerConfig, RunError
from repirl.distributed.offload import Residency
from repirl.distributed.shard import gathered, reshard, whole
from repirl.distributed.world import World
from repirl.models import forward_flops, ordinary_attention
from repirl.work import Work

# What a model says about each response token of a (micro-)batch: name -> [R] float32.
Outputs = dict[str, Tensor]
# Maps the outputs for a micro-batch and that micro-batch to its share of the loss, a scalar.
LossFunction = Callable[[Outputs, PackedBatch], Tensor]


class TrainingError(RunError):
    """The run cannot go on: what it computes is no longer finite."""


class Learner:
    """A model with its optimiser and schedule.

    model: a fused model (models.fuse), sharded where `world.mesh` says so · optimizer: None for a model that is only
    asked · num_updates: optimiser updates that the schedule is laid out for · tokens_per_microbatch: what one forward
    and backward may hold · temperature: the sampling temperature, at which the model's distribution is read ·
    reads_values: whether the model's one-output head is what is asked, not its distribution; by default where there
    is no other · adapter: which of the adapters of a shared model (adapters.add_adapters) this is, None for its base ·
    world: the processes that share the work; each of them calls the same methods with the same batches · work: counts
    what was computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerConfig | None,
        *,
        num_updates: int = 1,
        tokens_per_microbatch: int,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        reads_values: bool | None = None,
        adapter: str | None = None,
        world: World | None = None,
        work: Work | None = None,
    ) -> None:
        self.model = model
        self.world = world or World(next(model.parameters()).device)
        self.work = work or Work()
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        self.reads_values = not hasattr(model, "lm_head") if reads_values is None else reads_values
        self.adapter, self.shares_model = adapter, is_shared(model)
        self.residency: Residency | None = None
        if gradient_checkpointing:
            enable_checkpointing(model, offload=activation_offload)
        # Training mode everywhere, for checkpointing and because rollouts and updates must be one distribution:
        # dropout would make pi_old differ from itself.
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.trained = self._trained_parameters() if optimizer else {}
        self.num_skipped_updates = self.num_skipped_in_a_row = 0
        # Of the weights: whoever has a copy of them sees by it whether it is the present one.
        self.version = 0
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is None:
            if not self.shares_model:
                model.requires_grad_(False)
            return
        self.max_grad_norm = optimizer.max_grad_norm
        self.max_skipped_updates = optimizer.max_skipped_updates
        self.optimizer = make_optimizer(list(self.trained.values()), optimizer)
        names = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
        self.scheduler = get_scheduler(
            names[optimizer.schedule], self.optimizer, optimizer.warmup_steps, max(num_updates, 1)
        )

    def _trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        named = self.model.named_parameters()
        if self.shares_model:
            return {name: p for name, p in named if self.adapter is not None and belongs(name, self.adapter)}
        return {name: p for name, p in named if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.world.device

    def set_num_updates(self, count: int) -> None:
        """Go on as if `count` updates had been made: the schedule's place, and the rate that belongs to it."""
        assert self.optimizer is not None
        self.scheduler.last_epoch, self.scheduler._step_count = count, count + 1
        rules = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        self.scheduler._last_lr = [float(base) * rule(count) for base, rule in rules]
        for group, rate in zip(self.optimizer.param_groups, self.scheduler._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, whole, by its Hugging Face name, as a sampling engine loads it; where the model is
        sharded, every process has to go through all of them."""
        self._take_place()
        if self.shares_model:
            yield from merged_weights(self.model, self.adapter)
            return
        for name, parameter in self.model.named_parameters():
            yield name, whole(parameter.detach())

    def model_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: all of it, or of a shared one what is trained here."""
        self._take_place()
        state = get_model_state_dict(self.model)
        return {name: state[name] for name in self.trained} if self.shares_model else state

    def load_model_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `model_state` gave."""
        self._take_place()
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=not self.shares_model))
        self.version += 1

    def _take_place(self) -> None:
        """Be the one whose tensors are on the device, and whose adapter is on."""
        if self.residency is not None:
            self.residency.use(self)
        if self.shares_model:
            select_adapter(self.model, self.adapter)

    @contextmanager
    def ordinary_model(self) -> Iterator[PreTrainedModel]:
        """The model for ordinary forward passes (padded batches, KV cache, no gradients) by this process alone."""
        self._take_place()
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), gathered(self.model), ordinary_attention(self.model):
                yield self.model
        finally:
            self.model.train(training)

    def _outputs(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        device = self.device
        layout = PackedLayout(batch.cu_seqlens, device)
        arguments: dict[str, Any] = {
            "input_ids": batch.token_ids.to(device),
            "position_ids": batch.position_ids.to(device),
            "packed_layout": layout,
            "response_index": batch.response_index.to(device),
        }
        if self.reads_values:
            arguments |= {"reads_values": True}
            outputs = {"value": self.model(**arguments)}
        else:
            arguments |= {"targets": batch.response_ids.to(device), "temperature": temperature or self.temperature}
            outputs = self.model(**arguments)._asdict()
        self.work.slots += layout.num_slots
        return outputs

    def _microbatches(self, batch: PackedBatch, flops_factor: int) -> Iterator[tuple[list[int], PackedBatch]]:
        """This process's micro-batches: the sequences' places in `batch`, and a batch of them. Where others have one
        more, the places are empty and the batch is some sequence: sharded models have to be run together."""
        costs = forward_flops(self.model, batch, self.reads_values)
        mine = batch.microbatches(self.tokens_per_microbatch, self.world.size, costs)[self.world.rank]
        for sequences in mine:
            if sequences:
                self.work.flops += flops_factor * sum(costs[i] for i in sequences)
                self.work.tokens += int(batch.lengths[sequences].sum())
            yield sequences, batch.select(sequences or [int(batch.lengths.argmin())])

    @torch.no_grad()
    def score(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        """Outputs for every response token [R], on the CPU, without gradients; at another temperature on request."""
        self._take_place()
        collected: Outputs = {}
        for sequences, micro in self._microbatches(batch, flops_factor=1):
            positions = batch.response_positions(sequences)
            for name, values in self._outputs(micro, temperature).items():
                stream = collected.setdefault(name, torch.zeros(batch.num_response_tokens))
                if sequences:
                    stream[positions] = values.float().cpu()
        reshard(self.model)
        return {name: self.world.sum(stream) for name, stream in collected.items()}

    def update(self, batch: PackedBatch, loss_function: LossFunction) -> dict[str, float]:
        """One update on the whole batch, micro-batch by micro-batch; the loss is the sum over micro-batches.

        Normalisers belong into `loss_function`, computed over the whole batch, so that how the batch is cut and dealt
        out to processes changes nothing. An update whose loss or gradient is not finite is skipped and counted;
        TrainingError after `max_skipped_updates` of them in a row.
        """
        assert self.optimizer is not None, "this model is only asked"
        self._take_place()
        total = torch.zeros(1, dtype=torch.float64)
        for sequences, micro in self._microbatches(batch, flops_factor=3):
            outputs = self._outputs(micro)
            if sequences:
                loss = loss_function(outputs, micro)
                total += float(loss.detach())
            else:
                loss = 0.0 * sum(values.sum() for values in outputs.values())
            # FSDP averages gradients over the processes, here they are to be added.
            (loss * self.world.size).backward()
        reshard(self.model)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_grad_norm)))
        loss_value = float(self.world.sum(total))
        rate = float(self.scheduler.get_last_lr()[0])
        if math.isfinite(norm) and math.isfinite(loss_value):
            self.optimizer.step()
            self.version += 1
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped_updates += 1
            self.num_skipped_in_a_row += 1
        self.scheduler.step()
        # Now and not before the next update: until then other models want the memory.
        self.optimizer.zero_grad(set_to_none=True)
        if self.num_skipped_in_a_row >= self.max_skipped_updates:
            raise TrainingError(
                f"{self.num_skipped_in_a_row} updates in a row had a loss or gradient that is not finite (loss "
                f"{loss_value}, gradient norm {norm}) and were skipped: lower the learning rate, or look at the data; "
                "optimizer.max_skipped_updates sets how many are let pass"
            )
        return {"loss": loss_value, "grad_norm": norm, "lr": rate, "skipped_updates": self.num_skipped_updates}


def make_optimizer(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters; weight decay for matrices only. ConfigError where 8-bit state has no torchao."""
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # Fused: one pass over the parameters, and no copies of them on a GPU.
    factory: Callable[..., torch.optim.Optimizer] = functools.partial(torch.optim.AdamW, fused=True)
    if config.state_bits == 8:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(f"optimizer.state_bits 8 needs the package torchao: {error}") from error
        factory = AdamW8bit
    betas = (config.betas[0], config.betas[1])
    return factory([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps)


def enable_checkpointing(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Recompute each layer's activations in backward; offload: what is kept of a layer waits in host memory."""
    options: dict[str, Any] = {"offload": True} if offload else {}
    # transformers renamed it; the older name warns, the newer one is missing in older releases.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False}, **options)
    except TypeError as error:
        raise ConfigError("activation_offload needs a newer transformers than the one installed here") from error
