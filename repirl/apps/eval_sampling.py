"""How a model is asked the problems of a benchmark: the configuration of that, and its responses part by part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from repirl.apps.prompt_rows import response_tokens
from repirl.apps.solutions import as_source
from repirl.checkpoint.fingerprints import fingerprint_model
from repirl.config import Config, ConfigError
from repirl.configfile import build_config, merge
from repirl.data.prompts import Prompt
from repirl.data.responses import decode_response
from repirl.data.text import encode_prompt, find_end_tokens
from repirl.evals.benchmark import BOXED, Benchmark, Problem, read_problems
from repirl.model_files import read_model_config
from repirl.models import load_tokenizer
from repirl.rollout.engine import sequence_seed
from repirl.rollout.sampler import Sampler

# Options of the configuration that the command has by other names, or sets itself.
OTHER_NAMES = {
    "objective": None,
    "preset": None,
    "output_dir": "--output",
    "policy.model": "--model",
    "data.train": "--data",
    "data.eval": "--data",
    "data.prompt_column": None,
    "data.answer_column": None,
    "rollout.samples_per_prompt": "--samples",
    "rollout.temperature": "--temperature",
    "rollout.max_response_tokens": "--max-response-tokens",
}


@dataclass(frozen=True)
class Given:
    """A response that is to be judged.

    Args:
        problem: what it responds to.
        sample: its number among the sampled ones; None for a greedy one.
        temperature: at which it was sampled, 0 for greedy; None where that is not known.
        text: the response.
        finished: whether it has an end, rather than being cut off; None where that is not known.
        tokens: how many it has; None where that is not known.
    """

    problem: Problem
    sample: int | None
    temperature: float | None
    text: str
    finished: bool | None
    tokens: int | None


@dataclass(frozen=True)
class Asked:
    """What a model is asked, and how.

    Args:
        config: of sampling.
        tokenizer: the model's.
        benchmark: with the prompt that is used.
        problems: each with its prompt in `prompts`.
        samples: to each problem, beside the greedy one.
    """

    config: Config
    tokenizer: PreTrainedTokenizerBase
    benchmark: Benchmark
    problems: list[Problem]
    prompts: list[Prompt]
    samples: int

    @property
    def problems_at_once(self) -> int:
        """Of a part; a part is always the same, as a response depends, by rounding, on those that are sampled with
        it."""
        return max(1, self.config.rollout.max_sequences // (self.samples + 1))

    @property
    def num_responses(self) -> int:
        return len(self.problems) * (self.samples + 1)

    def made_with(self) -> dict[str, Any]:
        """What the responses depend on, by name."""
        config, digest = self.config, hashlib.blake2b(digest_size=8)
        for problem, prompt in zip(self.problems, self.prompts, strict=True):
            digest.update(json.dumps([problem.id, problem.answer, prompt.token_ids]).encode())
        return {
            "benchmark": self.benchmark.name,
            "data": f"{len(self.problems)} problems, digest {digest.hexdigest()}",
            "model": fingerprint_model(config.policy.model, config.policy.gguf_file),
            "seed": config.seed,
            "samples": self.samples,
            "temperature": config.rollout.temperature,
            "max_response_tokens": config.rollout.max_response_tokens,
            "engine": config.rollout.engine,
            "max_sequences": config.rollout.max_sequences,
            "dtype": config.dtype,
            "compute_dtype": config.computes_in,
            "prompt": self.benchmark.prompt if isinstance(self.benchmark.prompt, str) else "of the benchmark",
            "chat_template": config.data.chat_template,
        }


@dataclass(frozen=True)
class AskOptions:
    """How a model is asked; None for what the benchmark says.

    Args:
        samples: responses to each problem, beside the greedy one; 0 for none.
        temperature: of these.
        max_response_tokens: a response is cut off after so many. Where it is None, the model's window may make it
            smaller than the benchmark says.
        problems: the first ones only; None for all.
        prompt: a text around the problem, with {problem}.
        changes: options of the configuration, such as {"seed": 1, "rollout": {"engine": "vllm"}}.
    """

    samples: int | None = None
    temperature: float | None = None
    max_response_tokens: int | None = None
    problems: int | None = None
    prompt: str | None = None
    changes: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, least in {"samples": 0, "max_response_tokens": 1, "problems": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ConfigError(f"--temperature is {self.temperature}, expected a number above 0")
        if self.prompt is not None and "{problem}" not in self.prompt:
            raise ConfigError(
                f"--prompt is {self.prompt!r}, expected a text with {{problem}} where the problem belongs"
            )
        for name, option in OTHER_NAMES.items():
            value = self.changes or {}
            *parents, last = name.split(".")
            for parent in parents:
                value = value.get(parent) or {}
            if isinstance(value, Mapping) and last in value:
                raise ConfigError(f"--{name} is not for benchmarks" + (f": use {option}" if option else ""))


def ask(benchmark: Benchmark, data: str, model: str, output_dir: str, options: AskOptions) -> Asked:
    """What a model is asked. Of the model only configuration and tokenizer are read.

    A model that repirl exported gets prompts as it was trained: inside the prompt_template or chat template that its
    config.json names, and where the benchmark's prompt is BOXED the problem alone. Any other model gets the benchmark's
    prompt, inside its chat template where its tokenizer has one.

    Raises:
        ConfigError: for data, a model or options that cannot be used.
    """
    changes = dict(options.changes or {})
    policy = changes.get("policy")
    gguf_file = policy.get("gguf_file") if isinstance(policy, dict) else None
    described, tokenizer = read_model_config(model, gguf_file), load_tokenizer(model, gguf_file)
    trained = _trained_prompt(described)
    template = options.prompt
    if template is None and trained is not None and benchmark.prompt == BOXED:
        template = "{problem}"
    if template is not None:
        benchmark = replace(benchmark, prompt=template)
    problems = list(islice(read_problems(benchmark, as_source(data)), options.problems))
    base = {
        "objective": "rloo",
        "output_dir": output_dir,
        "steps": 1,
        "policy": {"model": model},
        "data": {"train": data, **(trained or {"chat_template": bool(tokenizer.chat_template)})},
        "rollout": {"temperature": options.temperature or benchmark.sampling.temperature},
    }
    config = build_config(merge(base, changes))
    prompts = [
        Prompt(number, tuple(encode_prompt(problem.prompt, config.data, tokenizer)), None)
        for number, problem in enumerate(problems)
    ]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    tokens = options.max_response_tokens
    asked = {} if tokens is None else {"--max-response-tokens": tokens}
    limit = response_tokens(described, model, longest, asked, benchmark.sampling.max_response_tokens)
    lengths = {"data": {"max_prompt_tokens": longest}, "rollout": {"max_response_tokens": limit}}
    config = build_config(merge(merge(base, lengths), changes))
    samples = benchmark.sampling.samples if options.samples is None else options.samples
    return Asked(config, tokenizer, benchmark, problems, prompts, samples)


def _trained_prompt(described: PretrainedConfig) -> dict[str, Any] | None:
    """What an exported policy says of its prompts; None for any other model."""
    value = getattr(described, "repirl", None)
    if not isinstance(value, dict) or value.get("role") != "policy":
        return None
    prompt: dict[str, Any] | None = value.get("prompt")
    return prompt


def sampled(asked: Asked, sampler: Sampler, start: int) -> Iterator[list[Given]]:
    """The responses, part by part: of each problem the greedy one, then the sampled ones.

    Args:
        asked: what to ask.
        sampler: of the model.
        start: the first responses that are there already; the end of a part.
    """
    config, at_once = asked.config, asked.problems_at_once
    ends = find_end_tokens(config.data, asked.tokenizer, config.policy.model)
    numbers = [None, *range(asked.samples)]
    first = start // len(numbers)
    for place in range(first, len(asked.problems), at_once):
        part = range(place, min(place + at_once, len(asked.problems)))
        responses = {}
        for greedy in (True, False):
            wanted = [(i, number) for i in part for number in numbers if (number is None) == greedy]
            if not wanted:
                continue
            seeds = [
                sequence_seed(config.seed, "benchmark", asked.problems[i].id, -1 if number is None else number)
                for i, number in wanted
            ]
            temperature = 0.0 if greedy else config.rollout.temperature
            answers = sampler.ask([asked.prompts[i] for i, _ in wanted], seeds, temperature)
            for key, (response, _) in zip(wanted, answers, strict=True):
                text = decode_response(response.token_ids, ends, asked.tokenizer)
                problem, number = asked.problems[key[0]], key[1]
                responses[key] = Given(problem, number, temperature, text, response.ended, len(response.token_ids))
        yield [responses[i, number] for i in part for number in numbers]
