"""The start of the demo and of the study: a small model with a bad habit, and the problems to unlearn it on.

A small model learns a task from neat notes, then picks up a bad habit from a sloppy student's. In `arithmetic` the
student loses a ten with probability `slip` at every step that carries or borrows; in `code` it takes an operation for
another one (repirl.data.tasks.programs).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from repirl.config import Config
from repirl.configfile import build_config, load_preset, merge
from repirl.data.tasks import arithmetic, programs
from repirl.data.tasks.arithmetic import Problem, Solution
from repirl.export import export_checkpoint
from repirl.loop import train

# Their modules have the same functions.
TASKS: dict[str, ModuleType] = {"arithmetic": arithmetic, "code": programs}
# Fewest and most steps of a problem.
NUM_STEPS = {"arithmetic": (4, 5), "code": (3, 4)}
# Whose options the warm-ups have.
PRESETS = {"arithmetic": "demo", "code": "demo-code"}


@dataclass(frozen=True)
class Start:
    """How many problems each data file has, how long each warm-up is, and how sloppy the student is.

    num_experts: for each number a file data/experts_NUMBER.jsonl gets the first that many training problems.
    """

    num_warm: int = 4000
    num_sloppy: int = 2000
    num_train: int = 4000
    num_held_out: int = 200
    num_planted: int = 200
    num_experts: tuple[int, ...] = (16,)
    warm_turns: int = 800
    sloppy_turns: int = 150
    slip: float = 0.6


def make_data(folder: Path, seed: int, start: Start, task: str = "arithmetic") -> list[Solution]:
    """Write `folder`/data/{warm,sloppy,train,eval}.jsonl, all of distinct problems, and the files of few experts.

    Args:
        folder: gets them.
        seed: of the problems, and of the student's slips.
        start: how many.
        task: a name in TASKS.

    Returns:
        Solutions to judge PRMs on: the first half has a planted error each, the other half is right.
    """
    module = TASKS[task]
    expert_solution = module.expert_solution
    rng, stream = random.Random(seed), module.problems(seed, NUM_STEPS[task])
    (folder / "data").mkdir(parents=True)

    def write(name: str, solutions: Iterable[Solution]) -> None:
        with open(folder / "data" / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for s in solutions:
                row = {"prompt": s.problem.prompt, "answer": s.problem.answer, "solution": s.text}
                file.write(json.dumps(row) + "\n")

    write("warm", map(expert_solution, islice(stream, start.num_warm)))
    write("sloppy", (module.sloppy_solution(p, rng, start.slip) for p in islice(stream, start.num_sloppy)))
    experts = [expert_solution(problem) for problem in islice(stream, start.num_train)]
    write("train", experts)
    for number in start.num_experts:
        write(f"experts_{number}", experts[:number])
    write("eval", map(expert_solution, islice(stream, start.num_held_out)))
    judged: list[Problem] = list(islice(stream, start.num_planted))
    half = len(judged) // 2
    return [module.planted_error(p, rng) for p in judged[:half]] + [expert_solution(p) for p in judged[half:]]


def make_base(folder: Path, seed: int, task: str = "arithmetic") -> None:
    """Save a two-layer model of Qwen3's architecture with random weights, and the task's own tokenizer."""
    tokenizer = TASKS[task].build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        # The usual 0.02 suits models ten times as wide; at this width learning starts much later with it.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_start(folder: Path, seed: int, start: Start, task: str = "arithmetic") -> list[Solution]:
    """Make the data, and in `folder`/start the model with the bad habit; `make_data` says what is returned."""
    tests = make_data(folder, seed, start, task)
    make_base(folder / "base", seed, task)

    def warm_up(name: str, model: Path, turns: int, lr: float) -> None:
        train(_warm_up_config(folder, seed, PRESETS[task], name, model, turns=turns, lr=lr))
        export_checkpoint(folder / name, folder / name / "export")

    warm_up("warm", folder / "base", start.warm_turns, 3e-3)
    warm_up("sloppy", folder / "warm" / "export" / "policy", start.sloppy_turns, 1e-3)
    (folder / "sloppy" / "export" / "policy").rename(folder / "start")
    return tests


def _warm_up_config(folder: Path, seed: int, preset: str, name: str, model: Path, *, turns: int, lr: float) -> Config:
    values: dict[str, Any] = {
        "objective": "sft",
        "seed": seed,
        "output_dir": str(folder / name),
        "steps": turns,
        "policy": {"model": str(model), "optimizer": {"lr": lr, "schedule": "cosine", "warmup_steps": 20}},
        "data": {"experts": {"path": str(folder / "data" / f"{name}.jsonl")}, "eval": None},
        "irl": {"experts_per_step": 20},
        "eval": {"every": 0},
        "checkpoint": {"every": turns},
        "log": {"tensorboard": False},
    }
    return build_config(merge(load_preset(preset), values))
