"""How often a way to choose one of N responses chooses a right one, from n >= N responses to a prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from itertools import combinations


def best_of_n(scores: Sequence[float], right: Sequence[bool], size: int) -> float:
    """The mean over all subsets of `size` responses of whether the one with the highest score is right; of equal scores
    the first one's counts.

    sum_i right_i C(rank_i - 1, N - 1) / C(n, N), with rank_i from 1, that of the lowest score: C(rank_i - 1, N - 1)
    subsets have response i as their best one.
    """
    ascending = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    chosen = sum(math.comb(rank, size - 1) for rank, i in enumerate(ascending) if right[i])
    return chosen / math.comb(len(scores), size)


def pass_at_n(num_right: int, count: int, size: int) -> float:
    """The mean over all subsets of `size` of `count` responses of whether any is right: 1 - C(n - c, N) / C(n, N), c =
    `num_right` (Chen et al. 2021)."""
    return 1.0 - math.comb(count - num_right, size) / math.comb(count, size)


def vote(answers: Sequence[Hashable | None], weights: Sequence[float]) -> int:
    """The first response with the answer that has the largest sum of weights; of equal sums the first answer's.

    Args:
        answers: of each response, equal where they say the same; None does not vote.
        weights: of each response, at least 0.

    Returns:
        An index; 0 where nobody votes.
    """
    totals: dict[Hashable, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return answers.index(max(totals, key=totals.__getitem__)) if totals else 0


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """exp(score / temperature) of each score, scaled so that their sum is 1."""
    highest = max(scores)
    exponentials = [math.exp((score - highest) / temperature) for score in scores]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def choose(scores: Sequence[float], answers: Sequence[Hashable | None], temperature: float) -> dict[str, int]:
    """What each way to choose takes of all responses: the index of the response.

    Args:
        scores: of each response; of equal ones the first counts.
        answers: of each response; see `vote`.
        temperature: of the weighted vote; see `softmax`.
    """
    return {
        "best_of_n": max(range(len(scores)), key=lambda i: scores[i]),
        "majority": vote(answers, [1.0] * len(scores)),
        "weighted": vote(answers, softmax(scores, temperature)),
    }


def subsets(count: int, size: int, limit: int, seed: str) -> list[tuple[int, ...]]:
    """Subsets of `size` of the numbers below `count`, each in ascending order: all, where there are no more than
    `limit`, else `limit` of them, drawn independently, each as likely as any other."""
    if math.comb(count, size) <= limit:
        return list(combinations(range(count), size))
    draw = random.Random(seed)
    return [tuple(sorted(draw.sample(range(count), size))) for _ in range(limit)]


def votes(
    answers: Sequence[Hashable | None],
    scores: Sequence[float],
    right: Sequence[bool],
    chosen: Sequence[Sequence[int]],
    temperature: float,
) -> tuple[float, float]:
    """The mean over subsets of whether the response that a vote chooses is right.

    Args:
        answers, scores, right: of each response; see `vote`.
        chosen: the subsets; see `subsets`.
        temperature: of the weights.

    Returns:
        For the majority vote, and for the vote weighted by the softmax of the subset's scores.
    """
    # Numbers in place of answers: fractions and texts take long to hash.
    numbers: dict[Hashable, int] = {}
    numbered = [None if answer is None else numbers.setdefault(answer, len(numbers)) for answer in answers]
    majority = weighted = 0
    for subset in chosen:
        of_subset = [numbered[i] for i in subset]
        majority += right[subset[vote(of_subset, [1.0] * len(subset))]]
        weighted += right[subset[vote(of_subset, softmax([scores[i] for i in subset], temperature))]]
    return majority / len(chosen), weighted / len(chosen)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, from the spread of the values (divisor n - 1); None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def shown_mean(mean: float, error: float | None) -> str:
    """A mean and its standard error as text."""
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
