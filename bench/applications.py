"""What a trained PRM is good for, on the study's hard start: choosing among samples, search, localisation, early signal
and test-time training.

    python -m bench.applications                 3 seeds
    python -m bench.applications --seeds 5

For each seed a policy and a PRM are trained (preset `demo`, an exact verifier) on so few prompts that each is sampled
twice. Then the PRM is used on held-out problems, by the functions behind `repirl rerank`, `search`, `localize`,
`signal` and `adapt`, with the start model as policy. What is in the output is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bench.figures import machine, save, spread
from bench.study.runner import load_tests, prepare
from repirl.apps.adapt import AdaptOptions, adapt
from repirl.apps.beams import SearchShape
from repirl.apps.demo import STEP_SEPARATOR, score_solutions
from repirl.apps.localize import judge
from repirl.apps.rerank import rerank
from repirl.apps.sample import sample
from repirl.apps.search import search
from repirl.apps.searcher import CHOICES, SearchOptions
from repirl.apps.signal import signal
from repirl.apps.stop_rule import StopOptions
from repirl.configfile import build_config, load_preset, merge
from repirl.export import export_checkpoint
from repirl.loop import train
from repirl.prm import PRMDescription, load_prm

# Each training prompt is sampled NUM_TURNS * 32 / NUM_TRAINED times.
NUM_TRAINED, NUM_TURNS = 640, 40
NUM_SAMPLES, TEMPERATURE = 16, 0.8
BEAMS, WIDTH = 16, 4
# On the scale of the small model, which learns at 2e-4.
ADAPT_RATE, ADAPT_TURNS = 1e-4, 30

Row = dict[str, Any]


def run_seed(folder: Path, seed: int, turns: int = NUM_TURNS, num_samples: int = NUM_SAMPLES) -> Row:
    """Train, and use the PRM in each way; shares in 0..1."""
    prepare(folder, "hard", seed)
    start, place = folder / "starts" / f"hard_{seed}", folder / "applications" / str(seed)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with open(start / "data" / "train.jsonl", encoding="utf-8") as file:
        (place / "train.jsonl").write_text("".join(itertools.islice(file, NUM_TRAINED)), encoding="utf-8")
    values: Row = {
        "seed": seed,
        "steps": turns,
        "num_threads": 1,
        "output_dir": str(place / "run"),
        "policy": {"model": str(start / "start")},
        "data": {"train": str(place / "train.jsonl"), "eval": str(start / "data" / "eval.jsonl")},
        "eval": {"every": turns},
        "checkpoint": {"every": turns},
        "log": {"tensorboard": False},
    }
    values = merge(load_preset("demo"), values)
    train(build_config(values))
    export_checkpoint(place / "run", place / "out", step_separator=STEP_SEPARATOR)
    model, prm, held_out = start / "start", place / "out" / "prm", start / "data" / "eval.jsonl"

    # With an answer column alone, `sample` and `search` know what is right; the PRM does not.
    sampled = merge(values, {"data": {"train": str(held_out)}, "rollout": {"temperature": TEMPERATURE}})
    sampled["rollout"]["samples_per_prompt"] = num_samples
    sample(build_config(sampled), place / "samples.jsonl")
    shape = SearchShape(beams=BEAMS, width=WIDTH)
    options = SearchOptions(shape=shape, temperature=TEMPERATURE, max_tokens=56, baseline=True, seed=seed)
    searched = search(model, prm, held_out, place / "searched.jsonl", options)
    adapted = adapt(
        model,
        prm,
        held_out,
        place / "adapted",
        AdaptOptions(
            stop=StopOptions(max_turns=ADAPT_TURNS),
            learning_rate=ADAPT_RATE,
            max_tokens=56,
            answer="answer",
            seed=seed,
        ),
    )
    return {
        "seed": seed,
        "rerank": rerank(place / "samples.jsonl", prm=prm)["results"],
        "search": {name: count / searched.judged for name, count in searched.right.items()},
        "search_tokens": searched.tokens_sampled / searched.prompts,
        "baseline_responses": searched.baseline_responses / searched.prompts,
        "localize": {"PRM": _localized(prm, start, None), "start model": _localized(model, start, "logprob")},
        "signal": signal(place / "run", turns=[turns // 2])["results"],
        "adapt": {key: adapted[key] for key in ("accuracy", "prm_reward", "turns", "stopped", "kl")},
    }


def _localized(model: Path, start: Path, reward: str | None) -> Row:
    """How well planted errors are told, by a PRM or by a language model's own log-probabilities."""
    prm = load_prm(model, device="cpu", description=None if reward is None else PRMDescription(reward=reward))
    solutions = load_tests(start / "tests.json")
    return judge([steps for steps, _ in score_solutions(prm, solutions)], [s.error_step for s in solutions])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def page(rows: list[Row], about: Row) -> str:
    """Markdown of the results: means and standard errors over seeds."""
    seeds = ", ".join(str(row["seed"]) for row in rows)
    blocks = [
        "# What a trained PRM is good for",
        f"`python -m bench.applications`: {', '.join(f'{key} {value}' for key, value in about.items())}; one thread.",
        f"The study's hard start, {len(rows)} seeds: {seeds}. Policy and PRM were trained for {NUM_TURNS} turns "
        f"(preset `demo`, exact verifier, {NUM_TRAINED} prompts). Below the PRM is used on 200 held-out problems, with "
        "the start model as policy. Percent, mean ± standard error over seeds.",
        f"## Choosing among N samples (temperature {TEMPERATURE})",
        "\n".join(_rerank_lines(rows)),
        f"## Step-level beam search ({BEAMS} beams of width {WIDTH}) beside whole responses at the same budget",
        f"{spread([row['search_tokens'] for row in rows], 1, 0)} tokens a prompt, which are "
        f"{spread([row['baseline_responses'] for row in rows], 1)} whole responses.",
        "\n".join(_search_lines(rows)),
        "## The first wrong step",
        "Planted errors; F1 as ProcessBench has it, the threshold from one half of the solutions, judged on the other.",
        "\n".join(_localize_lines(rows)),
        "## Early signal: which unsolved prompts will be solved later",
        "AUROC by the PRM's reward of a prompt's failures, and by two scores that need no PRM, over the seeds with "
        "enough prompts of both kinds.",
        "\n".join(_signal_lines(rows)),
        "## Test-time training",
        f"The start model on the held-out prompts, without answers, by the frozen PRM: at most {ADAPT_TURNS} turns at "
        f"rate {ADAPT_RATE:g}.",
        "\n".join(_adapt_lines(rows)),
    ]
    return "\n\n".join(blocks) + "\n"


def _rerank_lines(rows: list[Row]) -> list[str]:
    lines = [
        _line("N", "best of N by the PRM", "majority", "weighted vote", "any right (oracle)"),
        "|---|---|---|---|---|",
    ]
    for index, first in enumerate(rows[0]["rerank"]):
        cells = [spread([row["rerank"][index][name]["mean"] for row in rows]) for name in CHOICES]
        lines.append(_line(str(first["n"]), *cells))
    return lines


def _search_lines(rows: list[Row]) -> list[str]:
    lines = [_line("", "by the PRM", "majority", "weighted vote", "any right (oracle)"), "|---|---|---|---|---|"]
    for side, name in {"search": "beam search", "baseline": "whole responses"}.items():
        lines.append(_line(name, *(spread([row["search"][f"{side} {key}"] for row in rows]) for key in CHOICES)))
    return lines


def _localize_lines(rows: list[Row]) -> list[str]:
    lines = [_line("", "F1", "AUROC of steps"), "|---|---|---|"]
    for name in ("PRM", "start model"):
        mine = [row["localize"][name] for row in rows]
        f1, auroc = ([line[key] for line in mine] for key in ("first_error_f1", "auroc"))
        lines.append(_line(name, spread(f1), spread(auroc, 1, 3)))
    return lines


def _signal_lines(rows: list[Row]) -> list[str]:
    heads = ("after turn", "seeds", "solved later / never", "PRM's reward", "log-probability", "shorter length")
    lines = [_line(*heads), "|---|---|---|---|---|---|"]
    for index, first in enumerate(rows[0]["signal"]):
        mine = [row["signal"][index] for row in rows]
        counts = ", ".join(f"{line['solved_later']} / {line['never_solved']}" for line in mine)
        enough = [line for line in mine if not line["too_few"]]
        cells = [
            spread([line["auroc"][name]["value"] for line in enough], 1, 2)
            for name in ("reward_failed", "logprob", "length")
        ]
        lines.append(_line(str(first["turn"]), f"{len(enough)} of {len(mine)}", counts, *cells))
    return lines


def _adapt_lines(rows: list[Row]) -> list[str]:
    accuracies = [
        spread([row["adapt"]["accuracy"][key]["mean"] for row in rows]) for key in ("before", "after", "gain")
    ]
    turns = ", ".join(f"{row['adapt']['turns']} ({row['adapt']['stopped']})" for row in rows)
    return [
        _line("accuracy before", "after", "gain in points", "turns, and why it stopped"),
        "|---|---|---|---|",
        _line(*accuracies, turns),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--folder", type=Path, default=Path("runs/applications"), help="starts, runs and files")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu/applications.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for seed in range(options.seeds):
        if seed not in [row["seed"] for row in rows]:
            rows.append(run_seed(options.folder, seed))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            save(options.output, {"machine": about, "rows": rows}, page(rows, about))
    print(page(rows, about))


if __name__ == "__main__":
    main()
