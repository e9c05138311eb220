"""A tiny model, its tokenizer and a data set on disk, shared by the trainer's tests."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from repirl.batch import PackedBatch
from repirl.config import Config
from repirl.configfile import build_config, merge
from repirl.data.tasks.arithmetic import (
    Solution,
    build_tokenizer,
    expert_solution,
    planted_error,
    problems,
)
from repirl.distributed.shard import whole
from repirl.export import describe_prm
from repirl.learner import Learner, Loss
from repirl.models import load_model, save_tokenizer
from repirl.systems import SYSTEMS


def make_model(folder: Path, *, tied: bool = True, architecture: str = "qwen3", head_dim: int = 8) -> Path:
    """Save a random two-layer model with the arithmetic tokenizer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path, count: int = 24) -> dict[str, Any]:
    """Write train.jsonl, eval.jsonl, and of the training problems pairs.jsonl and trajectories.jsonl, a right and a
    wrong response to each, and steps.jsonl, solutions with labelled steps; returns the options of `data`."""
    stream = problems(0, (2, 3))
    for name in ("train", "eval"):
        chosen = list(islice(stream, count))
        solutions = [expert_solution(problem).text for problem in chosen]
        rows = [
            {"prompt": p.prompt, "answer": p.answer, "solution": text}
            for p, text in zip(chosen, solutions, strict=True)
        ]
        _write(folder / f"{name}.jsonl", rows)
        if name == "train":
            wrong = [text[: len(text) // 2] for text in solutions]
            texts = [(p.prompt, right, bad) for p, right, bad in zip(chosen, solutions, wrong, strict=True)]
            _write(folder / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in texts])
            _write(
                folder / "trajectories.jsonl",
                [{"prompt": p, "response": t, "outcome": o} for p, a, b in texts for t, o in ((a, 1), (b, 0))],
            )
            rng = random.Random(0)
            solved = [s for p in chosen for s in (expert_solution(p), planted_error(p, rng))]
            _write(folder / "steps.jsonl", [labelled(s) for s in solved])
    return {
        "train": str(folder / "train.jsonl"),
        "eval": str(folder / "eval.jsonl"),
        "pairs": str(folder / "pairs.jsonl"),
        "trajectories": str(folder / "trajectories.jsonl"),
        "steps": str(folder / "steps.jsonl"),
        "step_separator": "; ",
        "solution_column": "solution",
    }


def labelled(solution: Solution) -> dict[str, Any]:
    """A solution in TRL's format: steps are right up to the planted error."""
    count, error = len(solution.lines), solution.error_step
    return {
        "prompt": solution.problem.prompt,
        "completions": [line.removesuffix("; ") for line in solution.lines],
        "labels": [error is None or i < error for i in range(count)],
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def objective(loss: Callable[[dict[str, torch.Tensor], PackedBatch], torch.Tensor]) -> Loss:
    """What an update needs of an objective, made of a loss alone."""
    return SimpleNamespace(loss=lambda outputs, micro: (loss(outputs, micro), {}))


def gradients(learner: Learner, batch: PackedBatch, loss: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole gradients, by parameter, of the update that `update` is about to make; it is not made."""
    actual: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        actual.update({name: whole(p.grad).clone() for name, p in learner.trained.items() if p.grad is not None})

    step, learner.optimizer.step = learner.optimizer.step, keep
    learner.update(batch, objective(loss))
    learner.optimizer.step = step
    return actual


def tiny_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a configuration that trains in a second."""
    model = folder / "model"
    if not model.exists():
        make_model(model)
    values = {
        "output_dir": str(folder / "run"),
        "steps": 4,
        "device": "cpu",
        "policy": {"model": str(model), "optimizer": {"lr": 1e-3}},
        "prm": {"optimizer": {"lr": 1e-3}},
        "data": make_data(folder),
        "rollout": {"prompts_per_step": 3, "samples_per_prompt": 3, "max_response_tokens": 12},
        "eval": {"every": 2, "num_prompts": 4},
        "checkpoint": {"every": 1},
        "log": {"tensorboard": False},
    }
    system = SYSTEMS.get(changes.get("objective", "repirl"))
    for kind in ("pairs", "trajectories"):
        if system is None or kind not in system.data:
            del values["data"][kind]
    return merge(values, changes)


def tiny_config(folder: Path, **changes: Any) -> Config:
    return build_config(tiny_values(folder, **changes))


def make_step_prm(folder: Path) -> Path:
    """Save a PRM that scores steps, with a head that was drawn, as `repirl export` would."""
    config = tiny_config(folder, objective="math-shepherd", data={"eval": None})
    model = load_model(config.policy.model, kind="value", dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    model.config.repirl = describe_prm(config).model_dump(mode="json")
    model.save_pretrained(folder / "prm")
    save_tokenizer(build_tokenizer(), folder / "prm")
    return folder / "prm"
