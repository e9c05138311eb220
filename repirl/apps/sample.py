"""`repirl sample`: fixed rollouts, for the systems that train on them without sampling (`data.trajectories`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.apps.label import Progress
from repirl.apps.output import ResumableOutput
from repirl.checkpoint.fingerprints import fingerprint_model
from repirl.checkpoint.load import load_weights
from repirl.checkpoint.manifest import checksum, resolve_checkpoint
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
    """What was sampled so far, earlier calls included.

    Args:
        prompts: that are done.
        responses: to them.
        tokens: in these.
        judged: responses with an outcome.
        right: of these, the right ones.
    """

    prompts: int = 0
    responses: int = 0
    tokens: int = 0
    judged: int = 0
    right: int = 0


def sample(
    config: Config,
    output: str | os.PathLike,
    *,
    checkpoint: str | None = None,
    num_prompts: int | None = None,
    resume: bool = False,
) -> SampleCounts:
    """Sample `rollout.samples_per_prompt` responses to each prompt of `data.train`, judge them, and write them.

    Each line of the output holds a response: `prompt` as it is in the data, `answer` (the right one, as text),
    `response` (text), `finished` (whether it has an end, or was cut off), `response_ids` and `logprobs` (of each token,
    at `temperature`), `temperature`, `outcome` (1 right, 0 wrong; null, as `answer`, without `data.answer_column`).
    `data.trajectories`, `repirl judge`, `repirl score` and `repirl rerank` read it. OUTPUT.meta.json holds the counts
    and how the file was made.

    With torchrun all processes call this.

    Args:
        config: `data`, `policy.model`, `rollout`, `verifier` and `seed` are used, whatever the objective is.
        output: the file to write.
        checkpoint: whose policy samples: a run's folder or a step_N folder; None for `policy.model`.
        num_prompts: the first prompts; None for all.
        resume: go on with the file: prompts that are done are kept, and the result is that of an uninterrupted call.

    Raises:
        ConfigError: data, models or options that cannot be used, or an output that exists and may not be replaced.
        RunError: the output cannot be written, or the engine or the verifier fails.
    """
    if config.data.train is None:
        raise ConfigError("sampling needs prompts: set data.train")
    inputs = [config.data.train.path]
    folder = resolve_checkpoint(checkpoint) if checkpoint is not None else None
    config = set_up_process(config, samples=True)
    with ExitStack() as stack:
        file, world = None, join_world(config)
        if world.is_main:
            output_file = ResumableOutput(output, "repirl sample", resume=resume, inputs=inputs, unit="prompts")
            file = stack.enter_context(output_file)
        tokenizer = check_sources(config)
        prompts = load_prompts(config.data, tokenizer, "train").prompts[:num_prompts]
        if file is not None:
            file.begin(_made_with(config, prompts, folder), len(prompts))
        [before] = world.gather([] if file is None else [file.counts])
        counts = SampleCounts(**before)
        if counts.prompts < len(prompts):
            sampler = stack.enter_context(policy_sampler(config, tokenizer, folder))
            progress = stack.enter_context(Progress(len(prompts), world, "sample"))
            _sample_all(config, sampler, prompts, counts, file, progress)
    return counts


def _sample_all(
    config: Config,
    sampler: Sampler,
    prompts: list[Prompt],
    counts: SampleCounts,
    file: ResumableOutput | None,
    progress: Progress,
) -> None:
    """Sample part by part, always the same ones: a response depends, by rounding, on those sampled with it."""
    texts = _prompt_values(config, {prompt.index for prompt in prompts})
    ends = find_end_tokens(config.data, sampler.tokenizer, config.policy.model)
    for part, answers in _sampled(config, sampler, prompts[counts.prompts :]):
        rows = []
        for prompt, response, outcome in answers:
            rows.append(
                {
                    "prompt": texts[prompt.index],
                    "answer": prompt.answer,
                    "response": decode_response(response.token_ids, ends, sampler.tokenizer),
                    "finished": response.token_ids[-1] in ends.ids,
                    "response_ids": response.token_ids,
                    "logprobs": response.logprobs,
                    "temperature": config.rollout.temperature,
                    "outcome": outcome,
                }
            )
            counts.tokens += len(response.token_ids)
            counts.judged += outcome is not None
            counts.right += (outcome or 0.0) > 0.5
        counts.prompts += part
        counts.responses += len(rows)
        if file is not None:
            lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
            file.write(lines, asdict(counts), part)
        progress.show(counts.prompts, f"{counts.responses} responses, {counts.tokens} tokens")


def _made_with(config: Config, prompts: Sequence[Prompt], folder: Path | None) -> dict[str, Any]:
    """What the rows depend on, as far as it can be written down."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(json.dumps([prompt.index, prompt.token_ids, prompt.answer]).encode() + b"\n")
    names = {"engine", "temperature", "max_response_tokens", "samples_per_prompt", "prompts_per_step"}
    policy = fingerprint_model(config.policy.model, config.policy.gguf_file)
    if folder is not None:
        policy = f"checkpoint, digest {checksum(folder / 'manifest.json'):08x}"
    return {
        **{f"rollout.{name}": value for name, value in config.rollout.model_dump(include=names).items()},
        **{f"verifier.{name}": getattr(config.verifier, name) for name in ("kind", "function")},
        "seed": config.seed,
        "dtype": config.dtype,
        "compute_dtype": config.computes_in,
        "policy": policy,
        "data.train": f"{len(prompts)} prompts, digest {digest.hexdigest()}",
    }


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
) -> Iterator[tuple[int, list[tuple[Prompt, Response, float | None]]]]:
    """The number of prompts of a part, `rollout.prompts_per_step` or what is left, and the responses to them. Seeds
    depend on the prompt's row only."""
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
        yield len(part), [(prompt, *answer) for prompt, answer in zip(asked, judged, strict=True)]
