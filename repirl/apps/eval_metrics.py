"""Figures of a benchmark of answers, with confidence intervals over its problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from repirl.apps.best_of import pass_at_n, subsets, vote

# Subsets of k responses to a problem that a majority vote is averaged over, where there are more.
NUM_SUBSETS = 200


@dataclass(frozen=True)
class Answered:
    """What the figures need to know of a response.

    Args:
        right: whether the grader says so.
        vote: equal for responses with the same answer; None for one that does not vote.
        finished: whether it has an end, rather than being cut off; None where that is not known.
        reason: the kind of what the grader says.
    """

    right: bool
    vote: Hashable | None
    finished: bool | None
    reason: str


@dataclass
class Responses:
    """Those to one problem: at temperature 0, and sampled ones."""

    greedy: list[Answered] = field(default_factory=list)
    sampled: list[Answered] = field(default_factory=list)


def figures(problems: Sequence[Responses], *, votes: bool, seed: int, resamples: int) -> dict[str, dict[str, Any]]:
    """The figures of the problems that have responses, by name: `value`, `low` and `high`.

    `greedy pass@1` is the share of right responses at temperature 0. Of n sampled responses, the fewest that any
    problem has, there are `avg@n`, the share of right ones of each problem, averaged; for k = 2, 4, ..., n `pass@k`,
    1 - C(n - c, k) / C(n, k) with c right ones (Chen et al. 2021, unbiased), and `maj@k`, the share of subsets of k
    responses whose most frequent answer is right, over all of them or NUM_SUBSETS drawn ones. Of equally frequent
    answers that of the first response counts. A figure is the mean over the problems.

    Args:
        problems: each with at least one response.
        votes: whether responses have answers that can be counted.
        seed: of subsets and resamples.
        resamples: of the bootstrap: `low` and `high` are the 2.5th and the 97.5th percentile of the figure over so many
            draws of as many problems, with replacement; None for one problem.
    """
    values: dict[str, list[float]] = {}
    if all(problem.greedy for problem in problems):
        values["greedy pass@1"] = [_share(problem.greedy) for problem in problems]
    fewest = min(len(problem.sampled) for problem in problems)
    if fewest:
        values[f"avg@{fewest}"] = [_share(problem.sampled) for problem in problems]
    for k in sizes(fewest)[1:]:
        counts = [(sum(one.right for one in problem.sampled), len(problem.sampled)) for problem in problems]
        values[f"pass@{k}"] = [pass_at_n(right, count, k) for right, count in counts]
    for k in sizes(fewest)[1:] if votes else []:
        values[f"maj@{k}"] = [
            _majority(problem.sampled, k, f"{seed} {number} {k}") for number, problem in enumerate(problems)
        ]
    return _with_intervals(values, len(problems), seed, resamples)


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... up to a number, and the number itself; nothing for 0."""
    powers = [1 << i for i in range(count.bit_length())]
    return powers + [count] * (count not in powers) if count else []


def _share(responses: Sequence[Answered]) -> float:
    return sum(one.right for one in responses) / len(responses)


def _majority(responses: Sequence[Answered], k: int, seed: str) -> float:
    answers, chosen = _numbered(responses), subsets(len(responses), k, NUM_SUBSETS, seed)
    right = sum(responses[subset[vote([answers[i] for i in subset], [1.0] * k)]].right for subset in chosen)
    return right / len(chosen)


def _numbered(responses: Sequence[Answered]) -> list[int | None]:
    """Numbers in place of answers: fractions and texts take long to hash."""
    numbers: dict[Hashable, int] = {}
    return [None if one.vote is None else numbers.setdefault(one.vote, len(numbers)) for one in responses]


def num_tied(problems: Sequence[Responses]) -> int:
    """The problems whose most frequent answer is not the only one, among all sampled responses."""
    tied = 0
    for problem in problems:
        counts = sorted(Counter(one.vote for one in problem.sampled if one.vote is not None).values())
        tied += len(counts) > 1 and counts[-1] == counts[-2]
    return tied


def _with_intervals(
    values: dict[str, list[float]], num_problems: int, seed: int, resamples: int
) -> dict[str, dict[str, Any]]:
    if num_problems < 2:
        return {name: {"value": column[0], "low": None, "high": None} for name, column in values.items()}
    # The same draws for every figure, so that figures can be compared.
    drawn = np.random.default_rng(seed).integers(num_problems, size=(resamples, num_problems))
    result = {}
    for name, column in values.items():
        array = np.array(column, dtype=np.float64)
        low, high = np.percentile(array[drawn].mean(1), [2.5, 97.5])
        result[name] = {"value": float(array.mean()), "low": float(low), "high": float(high)}
    return result


def shares(responses: Sequence[Answered], unreadable: Sequence[str]) -> dict[str, Any]:
    """What else is reported of responses.

    Args:
        responses: all greedy ones, or all sampled ones.
        unreadable: the kinds of reasons of answers that could not be read.

    Returns:
        `responses`; `truncated`, the share that was cut off, None where that is not known; `unreadable`, how many
        answers could not be read; `reasons`, how often each kind of reason was given.
    """
    reasons = Counter(one.reason for one in responses)
    known = [one.finished for one in responses if one.finished is not None]
    return {
        "responses": len(responses),
        "truncated": known.count(False) / len(known) if known else None,
        "unreadable": sum(reasons[name] for name in unreadable),
        "reasons": dict(reasons.most_common()),
    }
