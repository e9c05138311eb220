"""Which sequences a turn computes, at their longest, and the micro-batches that are made of them."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from repirl.attention import PackedLayout
from repirl.batch import deal_out
from repirl.config import Config
from repirl.plan.activations import Micro, Shape


class Sequences(NamedTuple):
    """Sequences of one length: tokens of the prompt, and of the response."""

    number: int
    prompt: int
    response: int


def rollouts(config: Config) -> Sequences:
    """A turn's rollouts, every prompt and response at its longest."""
    number = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return Sequences(number, config.data.max_prompt_tokens, config.rollout.max_response_tokens)


def of_data(config: Config) -> tuple[Sequences, ...]:
    """A turn's sequences that are not sampled, at their longest."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_expert_tokens
    numbers = {
        "experts": config.experts_per_step,
        "pairs": 2 * config.dpo.pairs_per_step,
        "trajectories": config.rollout.prompts_per_step * config.rollout.samples_per_prompt,
        "steps": config.step_prm.responses_per_step,
    }
    return tuple(Sequences(number, prompt, response) for kind, number in numbers.items() if config.uses(kind))


def trained_on(config: Config, name: str) -> tuple[Sequences, ...]:
    """What an update of a learner is made on: policy and critic on rollouts where there are any, a PRM on all there
    is."""
    online = [rollouts(config)] * config.system.online
    offline = of_data(config)
    return (*offline, *online) if name == "prm" else (tuple(online) or offline)


def micro_batches(
    config: Config, ranks: int, shape: Shape, reads_values: bool, sequences: tuple[Sequences, ...]
) -> list[Micro]:
    """The micro-batches of the first process, which has the costliest ones, in the order in which it computes them."""
    # Operations as models.forward_flops counts them, by which sequences are dealt out.
    costs = (
        2 * shape.num_layers * shape.layer_values,
        2 * shape.num_layers * shape.query,
        2 * shape.hidden * (1 if reads_values else shape.vocab),
    )
    return _micro_batches(sequences, config.batch.tokens_per_microbatch, ranks, costs)


@functools.cache
def _micro_batches(
    sequences: tuple[Sequences, ...], budget: int, ranks: int, costs: tuple[int, int, int]
) -> list[Micro]:
    """costs: operations of a token, of a pair of tokens, and of a response token."""
    pairs = [(prompt + response, response) for number, prompt, response in sequences for _ in range(number)]
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
