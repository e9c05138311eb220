"""`repirl search`: step-level search by a trained PRM, beside best-of-N at the same budget of tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from repirl.apps.beams import METHODS, Beam, SearchResult
from repirl.apps.best_of import mean_and_error, shown_mean
from repirl.apps.label import Progress
from repirl.apps.output import ResumableOutput, encoded
from repirl.apps.prompt_rows import PromptRow, fitted_config, prompts_of, read_prompt_rows
from repirl.apps.score import aggregate_by, dump
from repirl.apps.searcher import CHOICES, Searcher, SearchOptions, shown_number
from repirl.apps.solutions import as_source
from repirl.apps.trained import policy_options, trained_policy, trained_prm
from repirl.config import Config, ConfigError
from repirl.configfile import merge
from repirl.data.text import find_end_tokens
from repirl.distributed.world import World, join_world
from repirl.models import load_tokenizer
from repirl.prm import PRM
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import Sampling
from repirl.rollout.steps import StepSampler
from repirl.run import build_learners, set_up_process
from repirl.verify.choose import make_verifier
from repirl.work import Work

ADDED = ("response", "finished", "score", "right", "tokens", "chosen", "beams", "baseline")


@dataclass
class SearchCounts:
    """What was searched so far, earlier calls included.

    Args:
        prompts: that are done.
        steps: rounds, of all prompts.
        responses: finished beams.
        tokens_sampled: by the search, in beams that were dropped, too.
        baseline_responses, baseline_tokens: whole responses that were sampled beside it, and their tokens.
        seconds: of all that.
        judged: prompts with an answer.
        right: of these, by "search" or "baseline" and a key of CHOICES: where the response that is chosen is right.
    """

    prompts: int = 0
    steps: int = 0
    responses: int = 0
    tokens_sampled: int = 0
    baseline_responses: int = 0
    baseline_tokens: int = 0
    seconds: float = 0.0
    judged: int = 0
    right: dict[str, int] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All counts by name."""
        values = dataclasses.asdict(self)
        return {**{k: v for k, v in values.items() if k != "right"}, **{f"right/{k}": v for k, v in self.right.items()}}

    @classmethod
    def from_flat(cls, values: Mapping[str, float]) -> SearchCounts:
        """What `flat` gave."""
        right = {name.removeprefix("right/"): int(n) for name, n in values.items() if name.startswith("right/")}
        plain: dict[str, Any] = {name: n for name, n in values.items() if not name.startswith("right/")}
        return cls(**plain, right=right)


def search(
    model: str | os.PathLike,
    prm: str | os.PathLike,
    source: str | os.PathLike,
    output: str | os.PathLike,
    options: SearchOptions | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> SearchCounts:
    """Search for a response to each prompt, step by step, by the scores of a PRM (repirl.apps.beams).

    Each line of the output is a row of the input, in its order, with all its columns and `response`, the finished beam
    with the highest score; `finished`, whether it has an end, or was cut off; `score`; `tokens`, how many were sampled
    for the prompt; `beams`, all finished beams with `response`, `finished`, `score`, `step_scores` and `tree`. With
    answers `right`, and `chosen`: what is right of what the PRM and votes choose among the beams (CHOICES; `oracle`:
    whether any is). With `options.baseline` `baseline`: `responses` and `tokens`, how many whole responses were sampled
    and their tokens, and `response`, `score`, `right` and `chosen` as above. The last one of these crosses the budget,
    so that the baseline has at least as many tokens as the search.

    A prefix is computed anew in each round by the engine `transformers` (once for all beams that share it); the vLLM
    engines have a prefix cache, which keeps it from round to round. OUTPUT.meta.json holds the counts and how the file
    was made.

    Args:
        model: the policy: an exported one, any causal language model, or a run's folder or step_N folder.
        prm: an exported PRM, or a run's folder or step_N folder.
        source: JSON lines, CSV, Parquet, a folder of them, or a data set of the hub ("name:split" for a split of it).
        output: the file to write.
        options: how; None for the defaults.
        values: options of the configuration that are not to be as by default, such as {"rollout": {"engine": "vllm"}}.
        resume: go on with the file: rows that are done are kept, and the result is that of an uninterrupted call.

    Raises:
        ConfigError: rows, models or options that cannot be used, or an output that exists and may not be replaced.
        RunError: the output cannot be written, the engine or the verifier fails, or a reward is not finite.
    """
    options = options or SearchOptions()
    with (
        ResumableOutput(output, "repirl search", resume=resume, inputs=[source]) as file,
        trained_policy(model) as (policy, policy_print),
    ):
        config, rows = _read(policy, os.fspath(prm), os.fspath(source), options, values or {})
        config = set_up_process(config)
        world = join_world(config)
        if world.size > 1:
            raise ConfigError("repirl search works in one process: start it without torchrun, for a part of the data")
        made_with = _made_with(config, rows, options) | {"policy": policy_print}
        with trained_prm(prm, options.placed) as (loaded, prints):
            aggregate_by(loaded, options.aggregate)  # refused before anything is written
            separator = options.separator or loaded.description.steps.separator
            steps = loaded.description.steps.model_copy(update={"separator": separator})
            described = loaded.description.model_copy(update={"steps": steps})
            loaded = dataclasses.replace(loaded, description=described)
            file.begin(made_with | prints | {"step separator": separator}, len(rows))
            counts = SearchCounts.from_flat(file.counts) if file.num_rows else SearchCounts()
            if file.num_rows < len(rows):
                with _searcher(config, world, loaded, options) as searcher:
                    _search_all(searcher, rows, file, counts, world)
    return counts


def _read(
    policy: str, prm: str, source: str, options: SearchOptions, values: Mapping[str, Any]
) -> tuple[Config, list[PromptRow]]:
    """The configuration by which the policy samples, and the rows."""
    device = options.placed.device
    given = as_source(source)
    prompts_of(given, options.prompt)  # its errors name --prompt-column
    plain: dict[str, Any] = {
        # Of the systems with a policy, the one that needs neither answers nor experts. Nothing is trained; the rate is
        # one that weights in bfloat16 may have.
        "objective": "rloo-prm",
        "output_dir": ".",
        "steps": 1,
        "seed": options.seed,
        "device": "auto" if device is None else device.partition(":")[0],
        "dtype": "bfloat16" if options.placed.dtype == "bfloat16" else "float32",
        "policy": {"model": policy, "optimizer": {"lr": 1e-3}},
        "prm": {"model": prm},
        "loss": {"outcome_coefficient": 0.0},
        "data": policy_options(policy)
        | {"train": given.model_dump(), "prompt_column": options.prompt, "answer_column": None},
        "rollout": {"temperature": options.temperature},
        "verifier": options.verifier.model_dump(),
    }
    config, prompts = fitted_config(merge(plain, dict(values)), options.max_tokens)
    tests = config.verifier.kind == "code"
    rows = read_prompt_rows(given, prompts, options.prompt, options.answer, tests=tests)
    for row in rows:
        if taken := [name for name in ADDED if name in row.row]:
            raise row.place.error(f"there is a column {taken[0]!r} already, which the output adds: rename or remove it")
    return config, rows


def _made_with(config: Config, rows: Sequence[PromptRow], options: SearchOptions) -> dict[str, Any]:
    """What the output depends on besides models."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(encoded(dump(row.row, row.place)) + b"\n" + json.dumps(row.token_ids).encode())
    made_with = dataclasses.asdict(options)
    placed, verifier, shape = (made_with.pop(name) for name in ("placed", "verifier", "shape"))
    rollout = config.rollout.model_dump(include={"engine", "temperature", "max_response_tokens"})
    return {
        **{name: value for name, value in made_with.items() if name not in ("temperature", "max_tokens", "separator")},
        **shape,
        **{f"rollout.{name}": value for name, value in rollout.items()},
        **{f"verifier.{name}": getattr(verifier, name) for name in ("kind", "function")},
        "seed": config.seed,
        "tokens": placed["tokens"],
        "dtype": placed["dtype"],
        "input": f"{len(rows)} rows, digest {digest.hexdigest()}",
    }


@contextmanager
def _searcher(config: Config, world: World, prm: PRM, options: SearchOptions) -> Iterator[Searcher]:
    """Load the policy and its engine."""
    # A function of the user's that cannot be loaded shows here, before the model is.
    verifier = make_verifier(config.verifier)
    try:
        tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)
        ends = find_end_tokens(config.data, tokenizer, config.policy.model)
        policy = build_learners(config, world, Work(), ("policy",))["policy"]
        engine = make_engine(config, policy, tokenizer)
        try:
            engine.wake()
            engine.update_weights(policy)
            sampling = Sampling(config.rollout.max_response_tokens, config.rollout.temperature, ends.ids)
            separator = prm.description.steps.separator
            yield Searcher(
                StepSampler(engine, tokenizer, separator, sampling, config.seed), prm, verifier, ends, options
            )
        finally:
            engine.close()
    finally:
        verifier.close()


def _search_all(
    searcher: Searcher, rows: Sequence[PromptRow], file: ResumableOutput, counts: SearchCounts, world: World
) -> None:
    """Search part by part, always the same ones: what is sampled depends, by rounding, on what is sampled with it."""
    size = searcher.options.prompts
    with Progress(len(rows), world, "search") as progress:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            if start + len(part) <= file.num_rows:
                continue
            begun = time.perf_counter()
            results = searcher.search(part)
            samples: list[list[Beam]] = [[] for _ in part]
            if searcher.options.baseline:
                samples = searcher.baseline(part, [result.tokens for result in results])
            lines = [_line(searcher, *one, counts) for one in zip(part, results, samples, strict=True)]
            counts.seconds += time.perf_counter() - begun
            file.write(lines, counts.flat())
            progress.show(counts.prompts, f"{counts.steps} steps, {counts.tokens_sampled} tokens sampled")


def _line(
    searcher: Searcher, row: PromptRow, result: SearchResult, samples: Sequence[Beam], counts: SearchCounts
) -> str:
    """A line of the output; what is in it is counted."""
    line, right = searcher.judged(row, result.beams)
    counts.prompts += 1
    counts.steps += result.rounds
    counts.responses += len(result.beams)
    counts.tokens_sampled += result.tokens
    counts.judged += row.answer is not None
    beams = [
        {
            "response": searcher.text(beam),
            "finished": beam.ended,
            "score": shown_number(beam.score),
            "step_scores": list(beam.steps),
            "tree": beam.tree,
        }
        for beam in result.beams
    ]
    line = row.row | line | {"tokens": result.tokens, "beams": beams}
    of_all = {"search": right}
    if samples:
        best, of_all["baseline"] = searcher.judged(row, samples)
        used = sum(len(beam.token_ids) for beam in samples)
        line["baseline"] = {"responses": len(samples), "tokens": used} | best
        counts.baseline_responses += len(samples)
        counts.baseline_tokens += used
    for side, choices in of_all.items():
        for name, value in choices.items():
            counts.right[f"{side} {name}"] = counts.right.get(f"{side} {name}", 0) + value
    return dump(line, row.place)


def print_counts(counts: SearchCounts, method: str) -> None:
    """A table of what is right by each choice, if that is known, and what it cost in tokens."""
    from repirl.report.display import print_table

    sides = {"search": METHODS[method]} | ({"baseline": "whole responses"} if counts.baseline_responses else {})
    rows = []
    for choice, label in CHOICES.items() if counts.judged else ():
        rows.append([label])
        for side in sides:
            num_right = counts.right.get(f"{side} {choice}", 0)
            verdicts = [1.0] * num_right + [0.0] * (counts.judged - num_right)
            rows[-1].append(shown_mean(*mean_and_error(verdicts)))
    for label, names in {
        "responses": ("responses", "baseline_responses"),
        "tokens sampled": ("tokens_sampled", "baseline_tokens"),
    }.items():
        rows.append([label, *(str(getattr(counts, name)) for name in names[: len(sides)])])
    title = "Share of prompts answered right" if counts.judged else "No answers: what is right is not known"
    print_table(title, ["", *sides.values()], rows)
