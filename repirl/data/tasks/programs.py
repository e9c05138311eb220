r"""Small programs over lists, texts and numbers, with an exact expert that writes them line by line, and tests.

    prompt    # list: sort, last 3, add 2, sum
    response  def f(x):
               x = sorted(x)
               x = x[-3:]
               x = [v + 2 for v in x]
               x = sum(x)
               return x

The expert never errs. The sloppy student, whose notes warm the demo's policy up, has misconceptions: it often takes
`last 3` for `first 3`, `skip 2` for `first 2`, `above 4` for 4 and more, and `minus 3` for `add 3`. `planted_error`
changes one line, so that the first wrong step is known exactly, and at least one test fails for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from repirl.verify.code_tests import Tests

NUM_TESTS = 6
HEAD, END = "def f(x):\n", " return x"


class Operation(NamedTuple):
    """What can be done with a value. code: an expression of `x`, with {k} for the number, if there is one. apply: of
    (value, number), the same. result: the kind of the value. mistaken: the name of the operation that a sloppy student
    takes it for."""

    code: str
    apply: Callable[[Any, int], Any]
    result: str
    mistaken: str | None = None

    @property
    def takes_number(self) -> bool:
        return "{k}" in self.code


# Kind of a value -> name of an operation.
OPERATIONS: dict[str, dict[str, Operation]] = {
    "list": {
        "sort": Operation("sorted(x)", lambda x, k: sorted(x), "list"),
        "reverse": Operation("x[::-1]", lambda x, k: x[::-1], "list"),
        "first": Operation("x[:{k}]", lambda x, k: x[:k], "list"),
        "last": Operation("x[-{k}:]", lambda x, k: x[-k:], "list", "first"),
        "skip": Operation("x[{k}:]", lambda x, k: x[k:], "list", "first"),
        "add": Operation("[v + {k} for v in x]", lambda x, k: [v + k for v in x], "list"),
        "minus": Operation("[v - {k} for v in x]", lambda x, k: [v - k for v in x], "list", "add"),
        "times": Operation("[v * {k} for v in x]", lambda x, k: [v * k for v in x], "list"),
        "from": Operation("[v for v in x if v >= {k}]", lambda x, k: [v for v in x if v >= k], "list"),
        "above": Operation("[v for v in x if v > {k}]", lambda x, k: [v for v in x if v > k], "list", "from"),
        "sum": Operation("sum(x)", lambda x, k: sum(x), "number"),
        "count": Operation("len(x)", lambda x, k: len(x), "number"),
    },
    "text": {
        "reverse": Operation("x[::-1]", lambda x, k: x[::-1], "text"),
        "upper": Operation("x.upper()", lambda x, k: x.upper(), "text"),
        "first": Operation("x[:{k}]", lambda x, k: x[:k], "text"),
        "last": Operation("x[-{k}:]", lambda x, k: x[-k:], "text", "first"),
        "skip": Operation("x[{k}:]", lambda x, k: x[k:], "text", "first"),
        "times": Operation("x * {k}", lambda x, k: x * k, "text"),
        "count": Operation("len(x)", lambda x, k: len(x), "number"),
    },
    "number": {
        "add": Operation("x + {k}", lambda x, k: x + k, "number"),
        "minus": Operation("x - {k}", lambda x, k: x - k, "number", "add"),
        "times": Operation("x * {k}", lambda x, k: x * k, "number"),
        "digits": Operation("str(x)", lambda x, k: str(x), "text"),
    },
}


@dataclass(frozen=True)
class Step:
    """An operation on a value of a kind; number: 0 where the operation takes none."""

    kind: str
    name: str
    number: int

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.kind][self.name]

    @property
    def words(self) -> str:
        return f"{self.name} {self.number}" if self.operation.takes_number else self.name

    @property
    def line(self) -> str:
        return f" x = {self.operation.code.format(k=self.number)}\n"


@dataclass(frozen=True)
class Problem:
    """A kind of input, the steps, and the inputs of the tests as their texts."""

    kind: str
    steps: tuple[Step, ...]
    inputs: tuple[Any, ...]

    @property
    def prompt(self) -> str:
        return f"# {self.kind}: {', '.join(step.words for step in self.steps)}\n"

    @property
    def answer(self) -> str:
        """The tests, as the verifier of programs takes them."""
        inputs = [list(value) if isinstance(value, tuple) else value for value in self.inputs]
        outputs = results(self.steps, self.inputs)
        tests = [
            {"args": [value], "kwargs": {}, "outputs": [output]} for value, output in zip(inputs, outputs, strict=True)
        ]
        return Tests("function", tuple(tests), "f").text()


@dataclass(frozen=True)
class Solution:
    """lines: the head, a line for each step, then the one that returns. error_step: index of the first wrong line, or
    None."""

    problem: Problem
    lines: tuple[str, ...]
    error_step: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.lines)


def solution_from(row: dict[str, Any]) -> Solution:
    """The solution of which `dataclasses.asdict` made a JSON object."""
    problem = row["problem"]
    inputs = (tuple(value) if isinstance(value, list) else value for value in problem["inputs"])
    steps = tuple(Step(**step) for step in problem["steps"])
    return Solution(Problem(problem["kind"], steps, tuple(inputs)), tuple(row["lines"]), row["error_step"])


def results(steps: tuple[Step, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """What a program of these steps returns for each input."""
    outputs = []
    for value in inputs:
        value = list(value) if isinstance(value, tuple) else value
        for step in steps:
            value = step.operation.apply(value, step.number)
        outputs.append(value)
    return outputs


def problems(seed: int, num_steps: tuple[int, int]) -> Iterator[Problem]:
    """Endless distinct problems; num_steps: fewest and most steps."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        kind = start = rng.choice(["list", "list", "text", "number"])
        steps: list[Step] = []
        for _ in range(rng.randint(*num_steps)):
            name = rng.choice([*OPERATIONS[kind]])
            operation = OPERATIONS[kind][name]
            steps.append(Step(kind, name, rng.randint(2, 4) if operation.takes_number else 0))
            kind = operation.result
        problem = Problem(start, tuple(steps), tuple(_input(start, rng) for _ in range(NUM_TESTS)))
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            yield problem


def _input(kind: str, rng: random.Random) -> Any:
    if kind == "list":
        return tuple(rng.randint(0, 9) for _ in range(rng.randint(5, 9)))
    if kind == "text":
        return "".join(rng.choice("abcde") for _ in range(rng.randint(5, 9)))
    return rng.randint(1, 99)


def _solution(problem: Problem, steps: list[Step], error_step: int | None = None) -> Solution:
    return Solution(problem, (HEAD, *(step.line for step in steps), END), error_step)


def expert_solution(problem: Problem) -> Solution:
    return _solution(problem, [*problem.steps])


def sloppy_solution(problem: Problem, rng: random.Random, slip: float) -> Solution:
    """A student's program: each step that can be mistaken for another one is, with probability `slip`."""
    steps, error_step = [], None
    for index, step in enumerate(problem.steps, 1):
        mistaken = step.operation.mistaken
        if mistaken is not None and rng.random() < slip:
            step = Step(step.kind, mistaken, step.number)
            error_step = error_step or index
        steps.append(step)
    return _solution(problem, steps, error_step)


def planted_error(problem: Problem, rng: random.Random) -> Solution:
    """The expert's program with one wrong line, for which a test fails."""
    right = results(problem.steps, problem.inputs)
    order = list(range(len(problem.steps)))
    rng.shuffle(order)
    for index in order:
        step = problem.steps[index]
        same_kind = [
            Step(step.kind, name, number)
            for name, operation in OPERATIONS[step.kind].items()
            if operation.result == step.operation.result
            for number in ((2, 3, 4) if operation.takes_number else (0,))
        ]
        rng.shuffle(same_kind)
        for wrong in same_kind:
            steps = [*problem.steps[:index], wrong, *problem.steps[index + 1 :]]
            if results(tuple(steps), problem.inputs) != right:
                return _solution(problem, steps, error_step=index + 1)
    raise ValueError(f"no single wrong line of {problem.prompt!r} fails a test")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of a prompt, and one for each short piece of Python that a line is made of."""
    words = [*OPERATIONS, *dict.fromkeys(name for kind in OPERATIONS.values() for name in kind)]
    code = [HEAD, END, " x = ", "sorted(x)", "sum(x)", "len(x)", "str(x)", "x.upper()", "x[", "::-1", ":", "]", "-"]
    code += ["[v", " for v in x", " if v", " + ", " - ", " * ", " > ", " >= ", "x", "\n"]
    pieces = [*(f" {word}" for word in words), "#", ",", " ", *code, *"234"]
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(pieces)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    longest_first = sorted(dict.fromkeys(pieces), key=len, reverse=True)
    escaped = "|".join(_escaped(piece) for piece in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{escaped}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _escaped(piece: str) -> str:
    return "".join(f"\\{character}" if character in "()[]+*.|?^$-\\" else character for character in piece)
