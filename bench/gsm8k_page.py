"""The figures of bench.gsm8k, from scored solutions, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.figures import described

Row = dict[str, Any]
Array = NDArray[np.float64]

RESAMPLES = 1000
LENGTH = "length, shorter is better"
# How the rewards of a response become one number.
AGGREGATES = {
    "mean of tokens": lambda row: fmean(row["rewards"]),
    "mean of steps": lambda row: fmean(row["step_scores"]),
    "worst step": lambda row: min(row["step_scores"]),
    "last step": lambda row: row["step_scores"][-1],
}
HUMAN = "human"


@dataclass(frozen=True)
class Scored:
    """What a model says of solutions, in the order of a file.

    Args:
        name: of the model.
        scores: for each aggregate a number of each solution [S].
        problem, generator: of each solution, numbers from 0 [S].
        right: of each solution [S].
        human: whether a human wrote it [S].
        length: tokens of each response [S].
    """

    name: str
    scores: dict[str, Array]
    problem: NDArray[np.int64]
    generator: NDArray[np.int64]
    right: NDArray[np.bool_]
    human: NDArray[np.bool_]
    length: Array

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> Scored:
        """From rows of `repirl score --token-rewards` with `problem`, `generator` and `right`."""

        def numbers(key: str) -> NDArray[np.int64]:
            return np.unique([str(row[key]) for row in rows], return_inverse=True)[1]

        return cls(
            name,
            {key: np.array([function(row) for row in rows]) for key, function in AGGREGATES.items()},
            numbers("problem"),
            numbers("generator"),
            np.array([bool(row["right"]) for row in rows]),
            np.array([row["generator"] == HUMAN for row in rows]),
            np.array([float(len(row["rewards"])) for row in rows]),
        )


def figures(models: Sequence[Scored], seed: int = 0, resamples: int = RESAMPLES) -> Row:
    """How well scores tell right solutions from wrong ones, and a human's from a model's.

    Args:
        models: scores of the same solutions by several models.
        seed, resamples: of the bootstrap over problems, the same draws for every figure.

    Returns:
        Counts of the solutions, and `rows`: for each model and aggregate, and for length, `auroc` of right against
        wrong in solutions that no human wrote, of all pairs (`pooled`), of pairs of the same problem, then the mean
        over problems (`within`), and of scores minus the mean score of their generator (`pooled_centred`,
        `within_centred`); and `human_first`, the share of pairs of a human's and another solution of the same problem
        in which the human's scores higher. Ties count half. Each figure is {value, low, high}, with the 2.5th and the
        97.5th percentile over the resamples, or None where no pair is there. `length_correlation` is Pearson's, of
        score and length; None where one of them is the same everywhere.
    """
    first = models[0]
    num_problems = int(first.problem.max()) + 1
    drawn = np.random.default_rng(seed).integers(num_problems, size=(resamples, num_problems))
    times = np.stack([np.bincount(one, minlength=num_problems) for one in drawn]).astype(np.float64)
    other = ~first.human
    right = int(first.right[other].sum())
    both = sum(0 < first.right[mine].sum() < mine.sum() for p in range(num_problems) if (mine := _of(first, p)).any())
    rows = []
    for model in [*models, None]:
        source = model or first
        scores = source.scores if model else {"": -source.length}
        for aggregate, values in scores.items():
            centred = values - np.array([values[source.generator == g].mean() for g in source.generator])
            line: Row = {"model": source.name if model else LENGTH, "aggregate": aggregate}
            for name, array in {"": values, "_centred": centred}.items():
                pairs = _pairs(array, source.problem, source.right & other, ~source.right & other, num_problems)
                line |= {f"pooled{name}": _pooled(*pairs, times), f"within{name}": _within(*pairs, times)}
            human = _pairs(values, source.problem, source.human, other, num_problems)
            line["human_first"] = _within(*human, times)
            line["length_correlation"] = _correlation(values[other], source.length[other])
            rows.append(line)
    counts = {
        "problems": num_problems,
        "solutions": int(other.sum()),
        "right": right,
        "mixed_problems": int(both),
        "human": int(first.human.sum()),
        "tokens_a_solution": float(first.length[other].mean()),
    }
    return counts | {"rows": rows}


def _of(scored: Scored, problem: int) -> NDArray[np.bool_]:
    return (scored.problem == problem) & ~scored.human


def _pairs(
    values: Array, problem: NDArray[np.int64], above: NDArray[np.bool_], below: NDArray[np.bool_], num_problems: int
) -> tuple[Array, Array]:
    """For each two problems, how many pairs of a solution of the first that shall score higher and one of the second
    do so, ties counted half, and how many pairs there are: both [P, P]."""
    high, low = values[above][:, None], values[below][None, :]
    wins = (high > low) + 0.5 * (high == low)
    rows, columns = (np.eye(num_problems)[problem[side]] for side in (above, below))
    return rows.T @ wins @ columns, np.outer(rows.sum(0), columns.sum(0))


def _pooled(wins: Array, pairs: Array, times: Array) -> Row | None:
    """The share of all pairs; times: how often a resample has each problem [R, P]."""
    if not pairs.sum():
        return None
    spread = [((t @ wins @ t), (t @ pairs @ t)) for t in times]
    return _interval(wins.sum() / pairs.sum(), [w / p for w, p in spread if p])


def _within(wins: Array, pairs: Array, times: Array) -> Row | None:
    """The mean over problems of the share of their own pairs."""
    wins, pairs = wins.diagonal(), pairs.diagonal()
    there = pairs > 0
    if not there.any():
        return None
    shares, often = wins[there] / pairs[there], times[:, there]
    return _interval(shares.mean(), [t @ shares / t.sum() for t in often if t.sum()])


def _correlation(one: Array, other: Array) -> float | None:
    constant = not one.size or np.ptp(one) == 0 or np.ptp(other) == 0
    return None if constant else float(np.corrcoef(one, other)[0, 1])


def _interval(value: float, spread: Sequence[float]) -> Row:
    low, high = np.percentile(spread, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def page(content: Row) -> str:
    """Markdown of the results."""
    sizes, account, figure = content["sizes"], content["account"], content["figures"]
    own, others, sft = figure["own"], figure["others"], account["sft"]
    sampled = account["sampled"]["problems"]
    blocks = [
        "# A PRM trained on GSM8K",
        f"`{content['command']}`: {described(content['machine'])}; one seed ({sizes['seed']}).",
        "## What was trained",
        f"SmolLM2-135M-Instruct, in float32. SFT on human solutions: {sft['updates']} updates of {sizes['sft_batch']} "
        f"solutions of {sizes['sft_solutions']}, rate {sizes['sft_rate']:g}, {sft['tokens']} tokens, {_minutes(sft)}. "
        f"It then gave {sampled['responses']} responses to {sizes['problems']} other problems, at temperature 1 "
        f"({sampled['tokens']} tokens; {sampled['right']} right, {sampled['unfinished']} cut off). The PRM starts from "
        "the SFT model and learns from these and the human solutions of the same problems (objective `prm-offline`, "
        f"uniform importance weights), {sizes['problems_per_update']} problems an update, rate {sizes['prm_rate']:g}, "
        f"that of a new value head {sizes['head_rate']:g}. It is not told which responses are right, unless the arm is "
        "called `outcomes`. Times are of the clock, on a machine that may have done other work meanwhile.",
        "\n".join(_training(account["prm"])),
        "## Solutions of other models to test problems",
        f"{others['solutions']} solutions of four other models to {others['problems']} test problems, "
        f"{others['right']} right, {others['mixed_problems']} problems with both kinds, "
        f"{others['tokens_a_solution']:.0f} tokens a solution on average; {content['left_out']} more do not end with "
        "an answer and are left out. AUROC of right against wrong, with 95% intervals by bootstrap over problems; 0.5 "
        "is chance. `within`: pairs of the same problem, the mean over problems. `centred`: of each score the mean of "
        "its generator is subtracted, so that it does not help to know who wrote a solution.",
        "\n".join(_table(others, ("pooled", "pooled_centred", "within", "within_centred"), correlation=True)),
        "## Own responses to held-out training problems",
        f"{own['solutions']} responses of the SFT model to {own['problems']} training problems that nothing was "
        f"trained on, {own['right']} right ({own['mixed_problems']} problems with both kinds), and the human solution "
        "of each. `human first`: the share of pairs of a human solution and a response to the same problem in which "
        "the human's scores higher; `pooled` and `within`: AUROC of right against wrong responses. `-`: there is no "
        "such pair.",
        "\n".join(_table(own, ("human_first", "pooled", "within"), correlation=False)),
        "## What the figures do not say",
        "The intervals are of the choice of problems, not of another training with another seed. The PRM learns to "
        "tell a human's solutions from those of a small model, which it may do by what has nothing to do with right "
        "and wrong, such as responses that are cut off. What a longer training or a larger model would reach is not "
        "measured here.",
    ]
    return "\n\n".join(blocks) + "\n"


def _minutes(run: Row) -> str:
    return f"{run['seconds'] / 60:.0f} minutes"


def _training(runs: dict[str, Row]) -> list[str]:
    lines = [
        "| PRM | passes over the problems' data | tokens | time | reward of human minus own, a token |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        gap = f"{run['reward_gap']:.4f}" if "reward_gap" in run else "-"
        lines.append(f"| {name} | {run['passes']:.2f} | {run['tokens']} | {_minutes(run)} | {gap} |")
    return lines


def _table(figure: Row, columns: Sequence[str], *, correlation: bool) -> list[str]:
    heads = ["score", "of a solution", *(name.replace("_", " ") for name in columns)]
    heads += ["correlation with length"] * correlation
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in figure["rows"]:
        cells = [row["model"], row["aggregate"] or "-", *(_cell(row[name]) for name in columns)]
        with_length = row["length_correlation"]
        cells += ["-" if with_length is None else f"{with_length:+.2f}"] * correlation
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(figure: Row | None) -> str:
    return "-" if figure is None else f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
