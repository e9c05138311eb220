"""One trainable model: token streams out of it, gradients into it. It knows no algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from repirl.attention import PackedLayout
from repirl.batch import PackedBatch
from repirl.config import OptimizerConfig

# What a model says about each response token of a (micro-)batch: name -> [R] float32.
Outputs = dict[str, Tensor]
# Maps the outputs for a micro-batch and that micro-batch to its share of the loss, a scalar.
LossFunction = Callable[[Outputs, PackedBatch], Tensor]


class Learner:
    """A model with its optimiser and schedule.

    model: a fused model (models.fuse) · num_updates: optimiser updates that the schedule is laid out for ·
    tokens_per_microbatch: what one forward and backward may hold · temperature: the sampling temperature,
    at which the model's distribution is read.
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
    ) -> None:
        self.model = model
        self.tokens_per_microbatch = tokens_per_microbatch
        self.temperature = temperature
        self.max_grad_norm = optimizer.max_grad_norm
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
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

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, whole, by its Hugging Face name, as a sampling engine loads it."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def _outputs(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        device = self.device
        arguments: dict[str, Any] = {
            "input_ids": batch.token_ids.to(device),
            "position_ids": batch.position_ids.to(device),
            "packed_layout": PackedLayout(batch.cu_seqlens, device),
            "response_index": batch.response_index.to(device),
        }
        if hasattr(self.model, "lm_head"):
            arguments |= {"targets": batch.response_ids.to(device), "temperature": temperature or self.temperature}
            return self.model(**arguments)._asdict()
        return {"value": self.model(**arguments)}

    @torch.no_grad()
    def score(self, batch: PackedBatch, temperature: float | None = None) -> Outputs:
        """Outputs for every response token [R], on the CPU, without gradients; at another temperature on request."""
        collected: Outputs = {}
        for sequences in batch.microbatches(self.tokens_per_microbatch):
            positions = batch.response_positions(sequences)
            for name, values in self._outputs(batch.select(sequences), temperature).items():
                stream = collected.setdefault(name, torch.zeros(batch.num_response_tokens))
                stream[positions] = values.float().cpu()
        return collected

    def step(self, batch: PackedBatch, loss_function: LossFunction) -> dict[str, float]:
        """One update on the whole batch, micro-batch by micro-batch; the loss is the sum over micro-batches.

        Normalisers belong into `loss_function`, computed over the whole batch, so that how the batch is cut
        changes nothing. An update whose gradient is not finite is skipped and counted.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for sequences in batch.microbatches(self.tokens_per_microbatch):
            micro = batch.select(sequences)
            loss = loss_function(self._outputs(micro), micro)
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        rate = self.scheduler.get_last_lr()[0]
        if math.isfinite(norm) and math.isfinite(total):
            self.optimizer.step()
        else:
            self.num_skipped_updates += 1
        self.scheduler.step()
        return {"loss": total, "grad_norm": norm, "lr": rate, "skipped_updates": self.num_skipped_updates}
