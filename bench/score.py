"""``python -m bench.score``: tokens/s of ``repirl score`` beside the PRM's scoring pass in training.

Both score the same solutions of the demo's task with the same PRM, in turns, on one thread. The pass is what a turn of
training does: outputs of the PRM for a batch that is there as tokens, and rewards from them. ``repirl score`` reads the
file, encodes texts, sorts them into batches, scores tokens and steps, and writes the rows with the rewards of all
tokens; the model is loaded already. Tokens are those of prompts and responses. Seconds are the process's own on a CPU,
so that other programs on the machine do not count, and of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.figures import described, machine, save
from bench.plan_check import SMOLLM2_135M
from repirl.apps.score import ScoreOptions, score
from repirl.apps.trained import Placed
from repirl.batch import pack
from repirl.data.tasks.arithmetic import build_tokenizer, expert_solution, problems
from repirl.models import load_model, quiet_transformers, save_tokenizer
from repirl.options import BatchConfig, PRMConfig
from repirl.prm import PRM, PRMDescription, StepRule, load_prm
from repirl.rewards import read_rewards
from repirl.value_head import head_name

PASS, COMMAND = "scoring pass in training", "repirl score"


def make_files(folder: Path, layers: int, rows: int, solutions: int) -> None:
    """Write a random model of SmolLM2-135M's width as folder/model, and rows of several solutions of arithmetic each,
    as in.jsonl."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = SMOLLM2_135M | {"num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(**shape, **ids)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    stream = problems(0, (2, 4))
    with open(folder / "in.jsonl", "w") as file:
        for number in range(rows):
            # Of different lengths, as responses are.
            solved = [expert_solution(problem) for problem in islice(stream, 1 + number % (2 * solutions - 1))]
            text = "".join(one.text.replace("#### ", "") + "; " for one in solved)
            file.write(json.dumps({"prompt": solved[0].problem.prompt, "response": text}) + "\n")


def load(folder: Path, reward: str, device: str) -> PRM:
    """The PRM, of one kind of reward."""
    path = folder / "model"
    if reward == "value" and not (path := folder / "value").exists():
        model = load_model(str(folder / "model"), kind="value", dtype=torch.float32, device=torch.device("cpu"))
        torch.nn.init.normal_(model.get_parameter(f"{head_name(model)}.weight"))
        model.save_pretrained(path)
        save_tokenizer(build_tokenizer(), path)
    rule = StepRule(rule="separator", separator="; ")
    return load_prm(path, device=device, description=PRMDescription(reward=reward, steps=rule))


def scoring_pass(prm: PRM, pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """What a turn of training does with its PRM before it updates it: the rewards of all responses, end to end."""
    batch = pack(pairs)
    prm.learner.tokens_per_microbatch = BatchConfig().tokens_per_microbatch
    return read_rewards(prm.learner.score(batch), batch, PRMConfig(reward=prm.description.reward))


def scored(prm: PRM, folder: Path, device: str) -> int:
    """Score the file; returns the tokens."""
    options = ScoreOptions(token_rewards=True, placed=Placed(device=device))
    prm.learner.tokens_per_microbatch = options.placed.tokens

    @contextmanager
    def loaded(*_: object) -> Iterator[tuple[PRM, dict[str, str]]]:
        yield prm, {}

    for name in ("out.jsonl", "out.jsonl.meta.json"):
        (folder / name).unlink(missing_ok=True)
    with mock.patch("repirl.apps.score.trained_prm", loaded):
        return score("loaded", folder / "in.jsonl", folder / "out.jsonl", options).tokens


def seconds(work: Callable[[], object], device: str) -> float:
    """What it takes."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    begun = clock()
    work()
    return clock() - begun


def measure(folder: Path, prm: PRM, rounds: int, device: str) -> dict[str, Any]:
    """Tokens, and seconds of each round by contender, after one round that warms up.

    ValueError if the two do not give the same rewards.
    """
    rows = [json.loads(line) for line in (folder / "in.jsonl").read_text().splitlines()]
    pairs = prm.encode([(row["prompt"], row["response"]) for row in rows])
    tokens = sum(len(prompt) + len(response) for prompt, response in pairs)
    expected = scoring_pass(prm, pairs)
    scored(prm, folder, device)
    written = [json.loads(line)["rewards"] for line in (folder / "out.jsonl").read_text().splitlines()]
    off = (torch.tensor([reward for row in written for reward in row]) - expected).abs().max()
    if not off <= 1e-3 * expected.abs().max():
        raise ValueError(f"the rewards of repirl score are off by up to {float(off)}")
    taken: dict[str, list[float]] = {PASS: [], COMMAND: []}
    for _ in range(rounds):
        passed = seconds(lambda: scoring_pass(prm, pairs), device)
        commanded = seconds(lambda: scored(prm, folder, device), device)
        taken[PASS].append(passed)
        taken[COMMAND].append(commanded)
    return {"tokens": tokens, "rows": len(rows), "seconds": taken}


def table(result: dict[str, Any]) -> list[str]:
    """Median tokens/s with the slowest and the fastest round, and the median of the rounds' ratios."""
    tokens, taken = result["tokens"], result["seconds"]
    ratios = [a / b for a, b in zip(taken[PASS], taken[COMMAND], strict=True)]
    lines = ["| | tokens/s | share of the pass |", "|---|---:|---:|"]
    for name, values in taken.items():
        speeds = sorted(tokens / value for value in values)
        share = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if name == COMMAND else "1"
        speed = f"{statistics.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})"
        lines += [f"| {name} | {speed} | {share} |"]
    return lines


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# `repirl score` beside the scoring pass in training", "", *(__doc__ or "").splitlines()[2:], ""]
    lines += [
        f"Made by `{result['command']}`; {described(result['machine'])}. "
        f"Medians of {result['rounds']} rounds, with their range.",
        "range.",
        "",
    ]
    for reward, part in result["rewards"].items():
        lines += [f"`{reward}`, {result['layers']} layers, {part['rows']} rows, {part['tokens']} tokens:", ""]
        lines += [*table(part), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.score", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="of the model; SmolLM2-135M has 30")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--solutions", type=int, default=8, help="in a row, in the mean")
    parser.add_argument("--rewards", nargs="+", default=["value", "logprob"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON, and beside them as Markdown")
    options = parser.parse_args(arguments)
    quiet_transformers()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "bench.score", *(arguments or sys.argv[1:])]),
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device != "cpu" else {}),
        "rounds": options.rounds,
        "layers": options.layers,
        "rewards": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, options.layers, options.rows, options.solutions)
        for reward in options.rewards:
            prm = load(folder, reward, options.device)
            result["rewards"][reward] = measure(folder, prm, options.rounds, options.device)
            print(reward, *table(result["rewards"][reward]), sep="\n", flush=True)
    if options.output:
        save(options.output, result, page(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
