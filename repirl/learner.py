"""One trainable model: token streams out of it, gradients into it. It knows no algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from repirl.attention import PackedLayout
from repirl.batch import PackedBatch
from repirl.config import OptimizerConfig, RunError
from repirl.dist.shard import gathered, reshard, whole
from repirl.dist.world import World
from repirl.models import forward_flops, ordinary_attention
from repirl.report.metrics import Work

# What a model says about each response token of a (micro-)batch: name -> [R] float32.
Outputs = dict[str, Tensor]
# Maps the outputs for a micro-batch and that micro-batch to its share of the loss, a scalar.
LossFunction = Callable[[Outputs, PackedBatch], Tensor]


class TrainingError(RunError):
    """The run cannot go on: what it computes is no longer finite."""


class Learner:
    """A model with its optimiser and schedule.

    model: a fused model (models.fuse), sharded where `world.mesh` says so · num_updates: optimiser updates that the
    schedule is laid out for · tokens_per_microbatch: what one forward and backward may hold · temperature: the
    sampling temperature, at which the model's distribution is read · world: the processes that share the work; each
    of them calls the same methods with the same batches · work: counts what was computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerConfig,
        *,
        num_updates: int,
        tokens_per_microbatch: int,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        world: World | None = None,
        work: Work | None = None,
    ) -> None:
        self.model = model
        self.world = world or World(next(model.parameters()).device)
        self.work = work or Work()
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        self.max_grad_norm = optimizer.max_grad_norm
        self.max_skipped_updates = optimizer.max_skipped_updates
        if gradient_checkpointing:
            enable_checkpointing(model)
        # Training mode everywhere, for checkpointing and because rollouts and updates must be one distribution:
        # dropout would make pi_old differ from itself.
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=optimizer.lr,
            betas=tuple(optimizer.betas),
            eps=optimizer.eps,
        )
        names = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
        self.scheduler = get_scheduler(
            names[optimizer.schedule], self.optimizer, optimizer.warmup_steps, max(num_updates, 1)
        )
        self.num_skipped_updates = 0
        self.num_skipped_in_a_row = 0

    @property
    def device(self) -> torch.device:
        return self.world.device

    def set_num_updates(self, count: int) -> None:
        """Go on as if `count` updates had been made: the schedule's place, and the rate that belongs to it."""
        self.scheduler.last_epoch, self.scheduler._step_count = count, count + 1
        rules = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        rates = [base * rule(count) for base, rule in rules]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, whole, by its Hugging Face name, as a sampling engine loads it; where the model is
        sharded, every process has to go through all of them."""
        for name, parameter in self.model.named_parameters():
            yield name, whole(parameter.detach())

    @contextmanager
    def ordinary_model(self) -> Iterator[PreTrainedModel]:
        """The model for ordinary forward passes (padded batches, KV cache, no gradients) by this process alone."""
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
        if hasattr(self.model, "lm_head"):
            arguments |= {"targets": batch.response_ids.to(device), "temperature": temperature or self.temperature}
            outputs = self.model(**arguments)._asdict()
        else:
            outputs = {"value": self.model(**arguments)}
        self.work.slots += layout.num_slots
        return outputs

    def _microbatches(self, batch: PackedBatch, flops_factor: int) -> Iterator[tuple[list[int], PackedBatch]]:
        """This process's micro-batches: the sequences' places in `batch`, and a batch of them. Where others have one
        more, the places are empty and the batch is some sequence: sharded models have to be run together."""
        costs = forward_flops(self.model, batch)
        mine = batch.microbatches(self.tokens_per_microbatch, self.world.size, costs)[self.world.rank]
        for sequences in mine:
            if sequences:
                self.work.flops += flops_factor * sum(costs[i] for i in sequences)
                self.work.tokens += int(batch.lengths[sequences].sum())
            yield sequences, batch.select(sequences or [int(batch.lengths.argmin())])

    @torch.no_grad()
    def score(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        """Outputs for every response token [R], on the CPU, without gradients; at another temperature on request."""
        collected: Outputs = {}
        for sequences, micro in self._microbatches(batch, flops_factor=1):
            positions = batch.response_positions(sequences)
            for name, values in self._outputs(micro, temperature).items():
                stream = collected.setdefault(name, torch.zeros(batch.num_response_tokens))
                if sequences:
                    stream[positions] = values.float().cpu()
        reshard(self.model)
        return {name: self.world.sum(stream) for name, stream in collected.items()}

    def step(self, batch: PackedBatch, loss_function: LossFunction) -> dict[str, float]:
        """One update on the whole batch, micro-batch by micro-batch; the loss is the sum over micro-batches.

        Normalisers belong into `loss_function`, computed over the whole batch, so that how the batch is cut and dealt
        out to processes changes nothing. An update whose loss or gradient is not finite is skipped and counted;
        TrainingError after `max_skipped_updates` of them in a row.
        """
        self.optimizer.zero_grad(set_to_none=True)
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
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)))
        loss_value = float(self.world.sum(total))
        rate = self.scheduler.get_last_lr()[0]
        if math.isfinite(norm) and math.isfinite(loss_value):
            self.optimizer.step()
            self.num_skipped_in_a_row = 0
        else:
            self.num_skipped_updates += 1
            self.num_skipped_in_a_row += 1
        self.scheduler.step()
        if self.num_skipped_in_a_row >= self.max_skipped_updates:
            raise TrainingError(
                f"{self.num_skipped_in_a_row} updates in a row had a loss or gradient that is not finite (loss "
                f"{loss_value}, gradient norm {norm}) and were skipped: lower the learning rate, or look at the data; "
                "optimizer.max_skipped_updates sets how many are let pass"
            )
        return {"loss": loss_value, "grad_norm": norm, "lr": rate, "skipped_updates": self.num_skipped_updates}


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in backward."""
    # transformers renamed it; the older name warns, the newer one is missing in older releases.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
