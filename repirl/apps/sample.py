"""`repirl sample`: fixed rollouts, for the systems that train on them without sampling (`data.trajectories`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.apps.lines import LinesFile, refuse_existing
from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import resolve_checkpoint
from repirl.config import Config, ConfigError
from repirl.data.prompts import Prompt, load_prompts
from repirl.data.responses import decode_response
from repirl.data.sources import read_rows
from repirl.data.text import find_end_tokens
from repirl.distributed.world import join_world
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import Response, sequence_seed
from repirl.rollout.sampler import Sampler
from repirl.run import build_learners, set_up_process
from repirl.sources import check_sources
from repirl.verify.choose import make_verifier
from repirl.work import PhaseTimer


@dataclass
class SampleCounts:
    """What was sampled. judged: responses with an outcome; right: of these, the right ones."""

    prompts: int = 0
    responses: int = 0
    judged: int = 0
    right: int = 0


def sample(
    config: Config, output: str | os.PathLike, *, checkpoint: str | None = None, num_prompts: int | None = None
) -> SampleCounts:
    """Sample `rollout.samples_per_prompt` responses to each prompt of `data.train`, judge them, and write them.

    Each line of the output holds a response: `prompt` as it is in the data, `answer` (the right one, as text),
    `response` (text), `finished` (whether it has an end, or was cut off), `response_ids` and `logprobs` (of each token,
    at `temperature`), `temperature`, `outcome` (1 right, 0 wrong; null, as `answer`, without `data.answer_column`).
    `data.trajectories`, `repirl judge`, `repirl score` and `repirl rerank` read it. The file appears under its name
    when it is complete.

    With torchrun all processes call this.

    Args:
        config: `data`, `policy.model`, `rollout`, `verifier` and `seed` are used, whatever the objective is.
        output: the file to write.
        checkpoint: whose policy samples: a run's folder or a step_N folder; None for `policy.model`.
        num_prompts: the first prompts; None for all.

    Raises:
        ConfigError: data, models or options that cannot be used, or an output that exists.
        RunError: the output cannot be written, or the engine or the verifier fails.
    """
    if config.data.train is None:
        raise ConfigError("sampling needs prompts: set data.train")
    refuse_existing(output)
    folder = resolve_checkpoint(checkpoint) if checkpoint is not None else None
    config = set_up_process(config, samples=True)
    tokenizer = check_sources(config)
    prompts = load_prompts(config.data, tokenizer, "train").prompts[:num_prompts]
    counts = SampleCounts(prompts=len(prompts))
    with policy_sampler(config, tokenizer, folder) as sampler:
        file = LinesFile(output) if sampler.world.is_main else None
        texts = _prompt_values(config, {prompt.index for prompt in prompts})
        ends = find_end_tokens(config.data, tokenizer, config.policy.model)
        for rows in _sampled(config, sampler, prompts):
            lines = []
            for prompt, response, outcome in rows:
                lines.append(
                    {
                        "prompt": texts[prompt.index],
                        "answer": prompt.answer,
                        "response": decode_response(response.token_ids, ends, tokenizer),
                        "finished": response.token_ids[-1] in ends.ids,
                        "response_ids": response.token_ids,
                        "logprobs": response.logprobs,
                        "temperature": config.rollout.temperature,
                        "outcome": outcome,
                    }
                )
                counts.judged += outcome is not None
                counts.right += (outcome or 0.0) > 0.5
            counts.responses += len(lines)
            if file is not None:
                file.write(lines)
        if file is not None:
            file.finish()
    return counts


@contextmanager
def policy_sampler(config: Config, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> Iterator[Sampler]:
    """A sampler of the policy as it is in `policy.model`, or in a checkpoint's folder."""
    world, timer = join_world(config), PhaseTimer()
    # A function of the user's that cannot be loaded shows here, before the model is.
    verifier = make_verifier(config.verifier)
    try:
        policy = build_learners(config, world, timer.work, ("policy",))["policy"]
        engine = make_engine(config, policy, tokenizer)
    except BaseException:
        verifier.close()
        raise
    sampler = Sampler(config, policy, tokenizer, engine, verifier, prompts=None, timer=timer)
    try:
        if folder is not None:
            load_weights(folder, "policy", policy)
        yield sampler
    finally:
        sampler.close()
        if policy.residency is not None:
            policy.residency.close()


def _prompt_values(config: Config, rows: set[int]) -> dict[int, Any]:
    """What the prompt column holds in the rows of these numbers."""
    assert config.data.train is not None
    column = config.data.prompt_column
    return {
        number: place.value(row, column, "data.prompt_column")
        for number, place, row in read_rows(config.data.train, "train")
        if number in rows
    }


def _sampled(
    config: Config, sampler: Sampler, prompts: list[Prompt]
) -> Iterator[list[tuple[Prompt, Response, float | None]]]:
    """The responses to `rollout.prompts_per_step` prompts at a time. Seeds depend on the prompt's row only."""
    rollout = config.rollout
    for start in range(0, len(prompts), rollout.prompts_per_step):
        part = prompts[start : start + rollout.prompts_per_step]
        asked = [prompt for prompt in part for _ in range(rollout.samples_per_prompt)]
        seeds = [
            sequence_seed(config.seed, "sample", prompt.index, i)
            for prompt in part
            for i in range(rollout.samples_per_prompt)
        ]
        judged = sampler.ask(asked, seeds, rollout.temperature)
        yield [(prompt, *answer) for prompt, answer in zip(asked, judged, strict=True)]
