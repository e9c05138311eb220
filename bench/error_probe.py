"""What linear probes read off a model's hidden states: whether a token is a wrong result (Alain and Bengio 2016).

A head of `value` is linear in the last state at the token. A probe says how much any such head could see, in each layer
or in several at once, if it were told which tokens are wrong; and whether it then sees errors of another kind.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from repirl.data.tasks.arithmetic import Solution, expert_solution
from repirl.evaluate import auroc

# Of the probe's loss, on standardised features.
L2 = 1e-3


def first_difference(lines: list[list[int]], other: list[list[int]]) -> int:
    """Where two responses, given as token ids of their lines, first differ."""
    return next(i for i, (a, b) in enumerate(zip(chain(*lines), chain(*other), strict=False)) if a != b)


@torch.no_grad()
def states(model_folder: Path, solutions: list[Solution]) -> tuple[Tensor, Tensor]:
    """Hidden states at the first wrong token of each solution, and at the right token in its place.

    Args:
        model_folder: of a model of transformers, whatever its head is.
        solutions: wrong ones, N of them.

    Returns:
        Two tensors [N, 2, L + 1, D] float64, of wrong and of right tokens: of the token before and of the token itself,
        the embedding and each layer's output, the last one as a head reads it.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModel.from_pretrained(model_folder)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for solution in solutions:
        prompt = tokenizer(solution.problem.prompt).input_ids
        responses = [
            [tokenizer(line).input_ids for line in lines]
            for lines in (solution.lines, expert_solution(solution.problem).lines)
        ]
        place = len(prompt) + first_difference(*responses)
        # Padding is not needed: no token looks at what comes after it.
        ids = torch.tensor([[*prompt, *chain(*lines)][: place + 1] for lines in responses])
        layers = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states, dim=2)
        for side, part in zip(sides, layers[:, -2:].double(), strict=True):
            side.append(part)
    wrong, right = (torch.stack(side) for side in sides)
    return wrong, right


def readings(hidden: Tensor) -> dict[str, Tensor]:
    """What a probe is given, by name: features [N, F] of states [N, 2, L + 1, D] (see `states`)."""
    before, own = hidden[:, 0], hidden[:, 1]
    last = own.shape[1] - 1
    parts = {f"layer {index}" if index else "embedding": own[:, index] for index in range(last)}
    return parts | {
        f"layer {last}, the last": own[:, last],
        "all layers": own.flatten(1),
        "all layers, and those of the token before": torch.cat([own, before], dim=1).flatten(1),
    }


def fit(wrong: Tensor, right: Tensor) -> Tensor:
    """The weights [F] of a logistic regression that gives right ones [N, F] higher scores than wrong ones [M, F]."""
    x = torch.cat([wrong, right])
    scale = x.std(0).clamp(min=1e-6)
    x = (x - x.mean(0)) / scale
    sign = torch.cat([-torch.ones(len(wrong)), torch.ones(len(right))]).double()
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        margin = sign * (x @ weights[:-1] + weights[-1])
        total = torch.nn.functional.softplus(-margin).mean() + L2 * weights[:-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weights[:-1].detach() / scale


def probe(
    model_folder: Path, solutions: dict[str, list[Solution]], taught: dict[str, list[str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """AUROC of first wrong tokens against the right ones in their places, by what a linear probe reads.

    Args:
        model_folder: the model's.
        solutions: wrong ones by kind. Every second one of each kind is for fitting, the others are judged.
        taught: name -> the kinds of errors that the probe of this name is fitted on.

    Returns:
        Reading -> name -> kind -> AUROC; 0.5 is chance.
    """
    halves = []
    for half in (0, 1):
        sides = {kind: states(model_folder, part[half::2]) for kind, part in solutions.items()}
        halves.append({kind: (readings(wrong), readings(right)) for kind, (wrong, right) in sides.items()})
    train, test = halves
    result: dict[str, dict[str, dict[str, float]]] = {}
    for reading in next(iter(train.values()))[0]:
        for name, kinds in taught.items():
            wrong, right = (torch.cat([train[kind][side][reading] for kind in kinds]) for side in (0, 1))
            weights = fit(wrong, right)
            scores = {kind: [side[reading] @ weights for side in test[kind]] for kind in solutions}
            result.setdefault(reading, {})[name] = {kind: auroc(r, w) for kind, (w, r) in scores.items()}
    return result
