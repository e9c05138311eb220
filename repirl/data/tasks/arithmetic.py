"""Multi-step arithmetic, worked from left to right, with an exact expert that writes its steps.

    prompt    8+7-3+9=
    response  8+7=15; 15-3=12; 12+9=21; #### 21

The expert never errs. The sloppy student, whose notes warm the demo's policy up, often forgets to carry or
borrow: a misconception such as a pretrained model brings along. `planted_error` changes one step's result and
goes on consistently from the wrong number, so that the first wrong step is known exactly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LARGEST = 29


@dataclass(frozen=True)
class Problem:
    """A start value and its steps: (operator, operand), worked from left to right."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return str(self.start) + "".join(f"{op}{operand}" for op, operand in self.steps) + "="

    @property
    def answer(self) -> str:
        return str(run(self.start, self.steps)[-1])


@dataclass(frozen=True)
class Solution:
    """lines: one string a step, then the line with the answer. error_step: index of the first wrong line, or None."""

    problem: Problem
    lines: tuple[str, ...]
    error_step: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.lines)


def solution_from(row: dict[str, Any]) -> Solution:
    """The solution of which `dataclasses.asdict` made a JSON object."""
    problem = row["problem"]
    steps = tuple((op, operand) for op, operand in problem["steps"])
    return Solution(Problem(problem["start"], steps), tuple(row["lines"]), row["error_step"])


def apply(value: int, op: str, operand: int) -> int:
    return value + operand if op == "+" else value - operand


def run(start: int, steps: tuple[tuple[str, int], ...]) -> list[int]:
    """The value after each step."""
    values = [start]
    for op, operand in steps:
        values.append(apply(values[-1], op, operand))
    return values[1:]


def problems(seed: int, num_steps: tuple[int, int]) -> Iterator[Problem]:
    """Endless distinct problems whose values all stay in [0, 99]; num_steps: fewest and most steps."""
    rng = random.Random(seed)
    seen: set[Problem] = set()
    while True:
        start = value = rng.randint(1, LARGEST)
        steps: list[tuple[str, int]] = []
        length = rng.randint(*num_steps)
        while len(steps) < length:
            op, operand = rng.choice("+-"), rng.randint(1, 9)
            if 0 <= apply(value, op, operand) <= LARGEST:
                steps.append((op, operand))
                value = apply(value, op, operand)
        problem = Problem(start, tuple(steps))
        if problem not in seen:
            seen.add(problem)
            yield problem


def _lines(problem: Problem, values: list[int]) -> tuple[str, ...]:
    before = [problem.start, *values[:-1]]
    work = [f"{b}{op}{n}={after}; " for b, (op, n), after in zip(before, problem.steps, values, strict=True)]
    return (*work, f"#### {values[-1]}")


def expert_solution(problem: Problem) -> Solution:
    return Solution(problem, _lines(problem, run(problem.start, problem.steps)))


def sloppy_solution(problem: Problem, rng: random.Random, slip: float) -> Solution:
    """A student's solution: each step that carries or borrows loses its ten with probability `slip`.

    Slips that would later leave 0..99 are not made.
    """
    values: list[int] = []
    value, error_step = problem.start, None
    for index, (op, operand) in enumerate(problem.steps):
        after = apply(value, op, operand)
        if after // 10 != value // 10 and rng.random() < slip:
            slipped = after - 10 if op == "+" else after + 10
            if all(0 <= v <= LARGEST for v in (slipped, *run(slipped, problem.steps[index + 1 :]))):
                after = slipped
                error_step = index if error_step is None else error_step
        values.append(after)
        value = after
    return Solution(problem, _lines(problem, values), error_step)


def planted_error(problem: Problem, rng: random.Random) -> Solution:
    """The expert's solution with one step's result wrong by a little, and right steps from there on."""
    values = run(problem.start, problem.steps)
    order = list(range(len(values)))
    rng.shuffle(order)
    for step in order:
        shifts = [-10, -2, -1, 1, 2, 10]
        rng.shuffle(shifts)
        for shift in shifts:
            wrong = values[step] + shift
            changed = [*values[:step], wrong, *run(wrong, problem.steps[step + 1 :])]
            if all(0 <= v <= LARGEST for v in changed):
                return Solution(problem, _lines(problem, changed), error_step=step)
    raise ValueError(f"no single wrong step of {problem.prompt!r} keeps every value within 0..{LARGEST}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, but one for '; ' and one for '#### '."""
    symbols = ["<pad>", "<eos>", "<unk>", *"0123456789", "+", "-", "=", "; ", "#### "]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("#### |; |."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
