"""Early signal: do a PRM's rewards of failures tell which prompts the policy will solve later in the run?

At a turn the unsolved prompts are those that were sampled up to then without any correct response. Of those that are
sampled again, some are solved later and some are not. AUROC is the chance that a solved one had the higher score at the
last turn up to then in which it was sampled. Its length and the policy's own log-probability stand beside the rewards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from repirl.apps.lines import write_json
from repirl.config import ConfigError
from repirl.evaluate import auroc
from repirl.output_path import JSON, check_file
from repirl.report.history import read_history

# Column of history.jsonl -> (name of the score, sign with which the higher value is expected of prompts that are solved
# later). The first is the PRM's; the others are the baselines.
SCORES = {
    "reward_failed": ("PRM's mean reward", 1.0),
    "logprob": ("log-probability", 1.0),
    "length": ("shortness", -1.0),
}
# Fewest prompts of each kind, solved later and not, for an AUROC.
FEWEST = 5


@dataclass(frozen=True)
class Unsolved:
    """A prompt without a correct response up to a turn, and sampled again after it.

    Args:
        solved: whether it had a correct response later.
        scores: by column of `SCORES`.
        centred: the same minus the mean over the prompts of the turn that the score is from.
    """

    solved: bool
    scores: dict[str, float]
    centred: dict[str, float]


def signal(
    run: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    turns: Sequence[int] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """How well rewards of failures tell which prompts of a run are solved later.

    Args:
        run: the run's folder, with history.jsonl.
        output: JSON file to write, with what is returned.
        turns: up to which prompts have to be unsolved; by default a quarter, half and three quarters of the run.
        resamples: of the bootstrap over prompts.
        seed: of these.

    Returns:
        `turns`, how many the run has; `has_rewards`, whether a PRM scored failures; and `results`, for each of `turns`:
        `turn`; `unsolved`, the prompts without a correct response up to it; `not_sampled_again` of them;
        `without_rewards` of the others; `solved_later` and `never_solved`, which make up the rest; `too_few`, whether
        these are too few for an AUROC. `auroc` has for each score `value`, `low` and `high` (the 2.5th and the 97.5th
        percentile over the resamples), `above_baseline` the same for the PRM's AUROC minus that of each baseline,
        and `auroc_centred` is of scores minus the mean over all prompts of their turn, as the scale of rewards moves
        during a run. Shorter responses count as the better ones. Empty where there are too few.

    Raises:
        ConfigError: no history, no outcomes in it, a turn that is not in the run, or an output that exists.
        RunError: the history cannot be read, or the output cannot be written.
    """
    if output is not None:
        check_file(output, JSON)
    if resamples < 1:
        raise ConfigError(f"--resamples is {resamples}, expected at least 1")
    rows = _verified(run)
    last = max(row["step"] for row in rows)
    chosen = list(dict.fromkeys(turns)) or sorted({max(1, last * quarter // 4) for quarter in (1, 2, 3)})
    for turn in chosen:
        if not 1 <= turn < last:
            raise ConfigError(f"--turns has {turn}, expected 1 to {last - 1}: the run in {str(run)!r} has {last} turns")
    has_rewards = any(row["reward_failed"] is not None for row in rows)
    columns = [column for column in SCORES if has_rewards or column != "reward_failed"]
    results = [_at(turn, rows, columns, resamples, seed) for turn in chosen]
    result = {"run": str(run), "turns": last, "has_rewards": has_rewards, "resamples": resamples, "results": results}
    if output is not None:
        write_json(output, result)
    return result


def _verified(run: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's history whose responses were verified."""
    if not Path(run).is_dir():
        raise ConfigError(f"--run {str(run)!r} is not a folder; expected the output_dir of a run")
    history = read_history(run)
    if not history:
        path = Path(run) / "history.jsonl"
        if path.exists() and path.stat().st_size:
            raise ConfigError(f"{str(path)!r} has no row that can be read: is it the file that the run wrote?")
        raise ConfigError(f"{str(path)!r} has no rows: runs that sample keep it, unless log.history is false")
    rows = [row for row in history if row["correct"] is not None]
    if not rows:
        raise ConfigError(f"no response of the run in {str(run)!r} was verified: which prompts it solves is not known")
    if max(row["step"] for row in rows) < 2:
        raise ConfigError(f"the run in {str(run)!r} has one turn so far: nothing is solved later")
    return rows


def _at(turn: int, rows: list[dict[str, Any]], columns: list[str], resamples: int, seed: int) -> dict[str, Any]:
    before: dict[int, list[dict[str, Any]]] = {}
    after: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        (before if row["step"] <= turn else after).setdefault(row["index"], []).append(row)
    unsolved = [index for index, mine in before.items() if not any(row["correct"] for row in mine)]
    again = [index for index in unsolved if index in after]
    means = _means(rows, columns)
    prompts = []
    for index in again:
        # A prompt that a filter dropped has no rewards of that turn.
        scored = [row for row in before[index] if all(row[column] is not None for column in columns)]
        if scored:
            newest = max(scored, key=lambda row: row["step"])
            scores = {column: SCORES[column][1] * newest[column] for column in columns}
            centred = {column: scores[column] - SCORES[column][1] * means[newest["step"], column] for column in columns}
            prompts.append(Unsolved(any(row["correct"] for row in after[index]), scores, centred))
    solved = sum(prompt.solved for prompt in prompts)
    few = min(solved, len(prompts) - solved) < FEWEST
    return {
        "turn": turn,
        "unsolved": len(unsolved),
        "not_sampled_again": len(unsolved) - len(again),
        "without_rewards": len(again) - len(prompts),
        "solved_later": solved,
        "never_solved": len(prompts) - solved,
        "too_few": few,
        **({"auroc": {}, "above_baseline": {}, "auroc_centred": {}} if few else _figures(prompts, resamples, seed)),
    }


def _means(rows: list[dict[str, Any]], columns: list[str]) -> dict[tuple[int, str], float]:
    """The mean of a column over the prompts of a turn, by (turn, column)."""
    values: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        for column in columns:
            if row[column] is not None:
                values.setdefault((row["step"], column), []).append(row[column])
    return {key: fmean(some) for key, some in values.items()}


def _figures(prompts: list[Unsolved], resamples: int, seed: int) -> dict[str, Any]:
    """AUROC of each score, with intervals; prompts: at least one of each kind."""
    columns = list(prompts[0].scores)
    solved = np.array([prompt.solved for prompt in prompts])
    values = {column: np.array([prompt.scores[column] for prompt in prompts]) for column in columns}
    centred = {column: np.array([prompt.centred[column] for prompt in prompts]) for column in columns}
    # The same draws for every score, so that scores can be compared. A draw of one kind alone has no AUROC.
    drawn = np.random.default_rng(seed).integers(len(prompts), size=(resamples, len(prompts)))
    drawn = drawn[solved[drawn].any(1) & ~solved[drawn].all(1)]
    spread = {column: np.array([_auroc(values[column][d], solved[d]) for d in drawn]) for column in columns}
    whole = {column: _auroc(values[column], solved) for column in columns}
    prm = "reward_failed"
    return {
        "auroc": {column: _interval(whole[column], spread[column]) for column in columns},
        "above_baseline": {
            column: _interval(whole[prm] - whole[column], spread[prm] - spread[column])
            for column in columns
            if prm in columns and column != prm
        },
        "auroc_centred": {column: _auroc(centred[column], solved) for column in columns},
    }


def _auroc(values: np.ndarray, solved: np.ndarray) -> float:
    return auroc(torch.from_numpy(values[solved]), torch.from_numpy(values[~solved]))


def _interval(value: float, spread: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(spread, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def print_signal(result: dict[str, Any]) -> None:
    """A table with a row for each turn and score, and what the figures are of."""
    from repirl.report.display import print_table

    rows = []
    for line in result["results"]:
        for column, figure in line["auroc"].items():
            counts = [line["turn"], line["solved_later"], line["never_solved"]]
            interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
            name, centred = SCORES[column][0], line["auroc_centred"][column]
            rows.append([name, *counts, f"{figure['value']:.3f}", interval, f"{centred:.3f}"])
    if rows:
        title = f"Which unsolved prompts are solved later? AUROC over {result['turns']} turns"
        heads = ["score of failures", "up to turn", "solved later", "not", "AUROC", "95% interval", "centred by turn"]
        print_table(title, heads, rows)
    for line in result["results"]:
        print(_said(line))
    if not result["has_rewards"]:
        print("no PRM scored failures in this run: only the baselines are there")


def _said(line: dict[str, Any]) -> str:
    """One sentence or two on the prompts of a turn."""
    parts = [f"turn {line['turn']}: {line['unsolved']} prompts without a correct response"]
    if line["not_sampled_again"]:
        parts.append(f"{line['not_sampled_again']} of them were not sampled again")
    if line["without_rewards"]:
        parts.append(f"{line['without_rewards']} have no rewards")
    parts.append(f"{line['solved_later']} are solved later, {line['never_solved']} are not")
    few = f". Too few for an AUROC, which needs {FEWEST} of each" if line["too_few"] else ""
    return ", ".join(parts) + few
