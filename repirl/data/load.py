"""From a configuration to the data that a run learns from, beside its prompts."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.config import Config
from repirl.data import Data
from repirl.data.experts import Expert, Experts, check_matches, load_experts
from repirl.data.pairs import Pairs, load_pairs
from repirl.data.prompts import PromptSet
from repirl.data.steps import LabelledSteps, load_steps
from repirl.data.trajectories import Trajectories, load_trajectories
from repirl.dataconfig import DataConfig
from repirl.distributed.world import World
from repirl.verify.share import judge_all


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> Data:
    """What the system reads of files beside prompts, each in the order of a run.

    Args:
        config: the run's.
        tokenizer: the policy's.
        world: its processes, which share the verification of experts.

    Raises:
        DataError: files or rows that cannot be used.
    """
    data, options, model = Data(), config.data, config.policy.model
    if config.uses("experts"):
        rows = load_chosen_experts(config, tokenizer, world)
        data.experts = Experts(
            rows, seed=config.seed + 1, per_turn=config.experts_per_step, sources=source_names(options)
        )
    if config.uses("pairs"):
        per_turn = config.dpo.pairs_per_step
        data.pairs = Pairs(load_pairs(options, tokenizer, model), seed=config.seed + 2, per_turn=per_turn)
    if config.uses("trajectories"):
        data.trajectories = Trajectories(
            load_trajectories(options, tokenizer, model, config.rollout.temperature),
            seed=config.seed + 3,
            prompts_per_turn=config.rollout.prompts_per_step,
            samples_per_prompt=config.rollout.samples_per_prompt,
        )
        if data.experts is not None and config.matches_experts:
            prompts = dict.fromkeys(row.prompt_ids for row in data.trajectories.rows)
            check_matches(data.experts.rows, [*prompts])
    if config.uses("steps"):
        per_turn = config.step_prm.responses_per_step
        data.steps = LabelledSteps(load_steps(options, tokenizer, "train"), seed=config.seed + 4, per_turn=per_turn)
    if options.eval_steps is not None:
        data.eval_steps = load_steps(options, tokenizer, "eval")
    return data


def load_chosen_experts(config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> list[Expert]:
    """The expert trajectories of all sources that pass `data.verify_experts` and `data.max_experts_per_prompt`."""
    judge = functools.partial(judge_all, config.verifier, world)
    return load_experts(config.data, tokenizer, config.policy.model, judge)


def source_names(options: DataConfig) -> list[str]:
    """A name for each source of experts: that of its file or data set, with a number where it is not the first."""
    counts: Counter[str] = Counter()
    names = []
    for source in options.expert_sources:
        name = Path(source.path).name
        counts[name] += 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names


def rows_by_option(
    prompts: PromptSet | None, held_out: PromptSet | None, data: Data
) -> dict[str, Sequence[Any] | None]:
    """All rows that a run reads, by the option that leads to them; None for what it does not read."""
    return {
        "data.train": None if prompts is None else prompts.prompts,
        "data.eval": None if held_out is None else held_out.prompts,
        "data.experts": None if data.experts is None else data.experts.rows,
        "data.pairs": None if data.pairs is None else data.pairs.rows,
        "data.trajectories": None if data.trajectories is None else data.trajectories.rows,
        "data.steps": None if data.steps is None else data.steps.rows,
        "data.eval_steps": data.eval_steps,
    }
