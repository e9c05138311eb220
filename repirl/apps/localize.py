"""Where does a solution go wrong? Step scores from token rewards, judged against known first errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from repirl import evaluate


def step_scores(reward: Tensor, step_lens: Sequence[int], aggregate: str = "min") -> list[float]:
    """Token rewards [R] of one response -> one score a step; step_lens: tokens of each step, R or fewer in all.

    aggregate: "min" (a chain is as good as its worst token), "mean", "sum" or "last".
    """
    if sum(step_lens) > reward.numel():
        raise ValueError(f"steps of {list(step_lens)} tokens do not fit into {reward.numel()} token rewards")
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "min": torch.amin,
        "mean": torch.mean,
        "sum": torch.sum,
        "last": lambda part: part[-1],
    }
    if aggregate not in functions:
        raise ValueError(f"aggregate is {aggregate!r}, expected one of {sorted(functions)}")
    parts = reward[: sum(step_lens)].split(list(step_lens))
    return [float(functions[aggregate](part)) for part in parts]


def auroc(wrong: Sequence[float], right: Sequence[float]) -> float:
    """Probability that a wrong step scores below a right one, ties counted half (Mann-Whitney)."""
    if not wrong or not right:
        raise ValueError(f"AUROC needs steps of both kinds, got {len(wrong)} wrong and {len(right)} right")
    return evaluate.auroc(torch.tensor(right, dtype=torch.float64), torch.tensor(wrong, dtype=torch.float64))


def first_error(scores: Sequence[float], threshold: float) -> int | None:
    """Index of the first step that scores below the threshold, None if no step does."""
    return next((index for index, score in enumerate(scores) if score < threshold), None)


def first_error_f1(scores: Sequence[Sequence[float]], errors: Sequence[int | None], threshold: float) -> float:
    """ProcessBench's F1 (Zheng et al. 2025): harmonic mean of the accuracy of the predicted first error
    on the solutions that have one, and of "no error" on those that have none."""
    right = [first_error(s, threshold) == e for s, e in zip(scores, errors, strict=True)]
    wrong_part = [r for r, e in zip(right, errors, strict=True) if e is not None]
    clean_part = [r for r, e in zip(right, errors, strict=True) if e is None]
    if not wrong_part or not clean_part:
        raise ValueError("first-error F1 needs solutions with and without an error")
    a, b = sum(wrong_part) / len(wrong_part), sum(clean_part) / len(clean_part)
    return 2 * a * b / (a + b) if a + b else 0.0


def best_threshold(scores: Sequence[Sequence[float]], errors: Sequence[int | None]) -> float:
    """The threshold with the best first-error F1 on these (calibration) solutions."""
    values = sorted({score for sequence in scores for score in sequence})
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    candidates = [values[0] - 1.0, *middles[:: max(1, len(middles) // 200)], values[-1] + 1.0]
    return max(candidates, key=lambda threshold: first_error_f1(scores, errors, threshold))


def judge(scores: Sequence[Sequence[float]], errors: Sequence[int | None]) -> dict[str, float]:
    """AUROC over steps and first-error F1.

    A step after the first error is neither right nor wrong and is left out of the AUROC. The threshold for F1
    comes from every second solution of either kind and is judged on the others.
    """
    wrong: list[float] = []
    right: list[float] = []
    for sequence, error in zip(scores, errors, strict=True):
        right += sequence[: len(sequence) if error is None else error]
        if error is not None:
            wrong.append(sequence[error])
    order = sorted(range(len(errors)), key=lambda i: errors[i] is None)
    calibration, held_out = order[::2], order[1::2]
    threshold = best_threshold([scores[i] for i in calibration], [errors[i] for i in calibration])
    f1 = first_error_f1([scores[i] for i in held_out], [errors[i] for i in held_out], threshold)
    return {"auroc": auroc(wrong, right), "first_error_f1": f1}
