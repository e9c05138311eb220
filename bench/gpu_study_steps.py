"""The steps of ``bench.gpu_study`` that train, each in a process of its own: the start model, and one arm."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bench.figures import machine
from bench.gpu_study_data import path_of
from bench.study.cells import ARMS, TASKS
from repirl.config import Config
from repirl.configfile import build_config, load_preset, merge
from repirl.export import export_checkpoint
from repirl.interrupt import Interrupted
from repirl.loop import train
from repirl.report.log import read_metrics

# Held-out accuracy of sampled responses at which the start is good enough: there is room above and below.
START_ACCURACY = 0.4


@dataclass(frozen=True)
class Scale:
    """Sizes of the model, of the warm-up and of a turn. Heads have 64 channels (32 below a width of 256)."""

    width: int
    layers: int
    vocabulary: int
    warm_batch: int
    warm_turns: int
    warm_eval: int
    warm_lr: float
    prompts: int
    samples: int
    response_tokens: int
    turns: int
    eval_every: int
    eval_prompts: int
    lr: float
    microbatch: int


SCALES = {
    # 27 million parameters.
    "full": Scale(512, 8, 4096, 128, 5000, 75, 1e-3, 64, 8, 288, 200, 4, 256, 1e-4, 65536),
    "small": Scale(128, 3, 1024, 12, 5000, 40, 3e-3, 6, 4, 160, 40, 4, 16, 2e-4, 8192),
    "tiny": Scale(64, 2, 320, 8, 4, 2, 3e-3, 3, 2, 24, 2, 1, 4, 2e-4, 2048),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_study_steps", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("step", choices=["start", "arm"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="folder of the start model, which `start` makes")
    parser.add_argument("--run", type=Path, required=True, help="the training's folder")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="no turn begins later; seconds since the epoch")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--task", choices=TASKS)
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    if options.step == "start":
        result = make_start(options.data, options.start, options.run, scale, options.device, options.until)
    else:
        config = arm_config(options.data, options.start, options.run, scale, options.device, options.arm, options.task)
        result = {"ended_by": train_until(config, options.until)}
    options.result.write_text(json.dumps(result))
    return 0


def make_start(data: Path, start: Path, run: Path, scale: Scale, device: str, until: float) -> dict[str, Any]:
    """Train a tokenizer and a model from scratch on the warm-up solutions, into the folder `start`.

    It ends when the accuracy of sampled responses to held-out problems is START_ACCURACY, or at the time `until`.

    Returns:
        What was made: `accuracy` (None if it was never measured), `turns`, `seconds`, `ended_by`, `losses`, ...
    """
    begin = time.perf_counter()
    tokenizer = train_tokenizer(path_of(data, "warm"), scale.vocabulary)
    torch.manual_seed(0)
    model = make_model(scale, tokenizer)
    base = run.with_name("base")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = start_config(data, base, run, scale, device)
    ended_by = train_until(config, until, START_ACCURACY)
    export_checkpoint(run, run / "export")
    (run / "export" / "policy").rename(start)
    lines = read_metrics(run / "metrics.jsonl")
    accuracies = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    losses = [line["policy/loss"] for line in lines if "policy/loss" in line]
    return {
        "accuracy": accuracies[-1] if accuracies else None,
        "turns": lines[-1]["step"],
        "solutions": lines[-1]["step"] * scale.warm_batch,
        "loss": [losses[0], losses[-1]],
        "ended_by": ended_by,
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "eval_prompts": scale.eval_prompts,
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    }


def train_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the problems and solutions of a file. Each digit is a token of its own, and each line break."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex("\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(path), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _texts(path: Path, most: int = 4000) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for _, line in zip(range(most), file, strict=False):
            row = json.loads(line)
            yield row["prompt"] + "\n" + row["solution"]


def make_model(scale: Scale, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A model of Qwen3's architecture with random weights."""
    head_dim = 64 if scale.width >= 256 else 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=scale.width,
        intermediate_size=3 * scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.width // head_dim,
        num_key_value_heads=scale.width // head_dim // 2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # The usual 0.02 suits models ten times as wide (see repirl/apps/start.py).
        initializer_range=scale.width**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def start_config(data: Path, base: Path, run: Path, scale: Scale, device: str) -> Config:
    """Of the warm-up: supervised fine-tuning on worked solutions."""
    changes = {
        "objective": "sft",
        "steps": scale.warm_turns,
        "policy": {"optimizer": {"lr": scale.warm_lr, "warmup_steps": 50}},
        "data": {"train": None, "solution_column": None, "experts": {"path": str(path_of(data, "warm"))}},
        "irl": {"experts_per_step": scale.warm_batch},
        "eval": {"every": scale.warm_eval, "temperature": 1.0},
        # The model is exported from the last checkpoint.
        "checkpoint": {"every": scale.warm_turns, "keep_last": 1},
    }
    return build_config(merge(merge(load_preset("demo"), _common(data, base, run, scale, device)), changes))


def arm_config(data: Path, start: Path, run: Path, scale: Scale, device: str, arm: str, task: str) -> Config:
    """Of an arm of bench/study on a task of it, by which the verifier is exact or fooled."""
    values = merge(load_preset(ARMS[arm].preset), ARMS[arm].options)
    values = merge(values, _common(data, start, run, scale, device))
    verifier = TASKS[task].verifier
    if verifier is not None and ARMS[arm].reads_verdicts:
        flawed = {"kind": "custom", "function": f"repirl.verify.flawed:{verifier}"}
        values = merge(values, {"verifier": flawed, "eval": {"verifier": {"kind": "math"}}})
    if ARMS[arm].reads_experts:
        experts = {"path": str(path_of(data, "few"))}
        values = merge(values, {"data": {"solution_column": None, "experts": experts}})
    return build_config(values)


def _common(data: Path, model: Path, run: Path, scale: Scale, device: str) -> dict[str, Any]:
    optimizer = {"optimizer": {"lr": scale.lr, "warmup_steps": 2}}
    return {
        "output_dir": str(run),
        "steps": scale.turns,
        "device": device,
        "compute_dtype": "bfloat16" if device == "cuda" else None,
        "num_threads": 1 if device == "cpu" else 2,
        "policy": {"model": str(model), **optimizer},
        "prm": optimizer,
        "data": {
            "train": str(path_of(data, "train")),
            "eval": str(path_of(data, "eval")),
            "prompt_template": "{prompt}\n",
            "max_prompt_tokens": 256,
            "max_expert_tokens": 320,
            "overlong": "drop",
        },
        "rollout": {
            "prompts_per_step": scale.prompts,
            "samples_per_prompt": scale.samples,
            "max_response_tokens": scale.response_tokens,
            "max_sequences": 512,
        },
        "batch": {"tokens_per_microbatch": scale.microbatch},
        "eval": {"every": scale.eval_every, "num_prompts": scale.eval_prompts},
        "checkpoint": {"every": 0, "keep_last": 1},
        "log": {"tensorboard": False},
    }


def train_until(config: Config, until: float, accuracy: float | None = None) -> str:
    """Train until a time; the turn that is going on then is finished.

    Args:
        config: of the run. If it saves checkpoints, the last turn is saved.
        until: in seconds since the epoch.
        accuracy: a held-out accuracy that ends the training earlier.

    Returns:
        What ended it: "turns" (all were made), "time" or "accuracy".
    """
    ended, over = [], threading.Event()
    path = Path(config.output_dir) / "metrics.jsonl"

    def watch() -> None:
        while not over.wait(0.5):
            # Before the first line, the loop may not have begun, and would not see a signal.
            lines = read_metrics(path) if path.exists() else []
            enough = accuracy is not None and any(line.get("eval/accuracy", 0) >= accuracy for line in lines)
            if lines and (enough or time.time() >= until):
                ended.append("accuracy" if enough else "time")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    # Outside the loop, which has a handler of its own, the signal must not end the process.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        train(config)
    except Interrupted as interrupted:
        if not interrupted.is_complete or not ended:
            raise
        return ended[0]
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    return "turns"


if __name__ == "__main__":
    sys.exit(main())
