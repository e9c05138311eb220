"""What a benchmark of answers is made of: its problems, what a model is asked, and what judges the responses."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from repirl.data.errors import DataError
from repirl.data.sources import read_rows
from repirl.data.values import Place
from repirl.dataconfig import SourceConfig
from repirl.verify.canonical import canonical_answer

# The usual way to ask for an answer that can be read.
BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
# What a row says, by the names of `Benchmark.columns`.
Fields: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """A row of a benchmark.

    Args:
        id: as the data names it, else the row's number from 0.
        prompt: what the model is asked, without a chat template.
        answer: the right one, as the grader takes it.
        text: the field `problem` alone, where there is one.
    """

    id: str
    prompt: str
    answer: str
    text: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How a model is asked unless the user says otherwise.

    Args:
        samples: responses to each prompt, beside the greedy one.
        temperature: of these.
        max_response_tokens: a response is cut off after so many.
    """

    samples: int
    temperature: float = 0.8
    max_response_tokens: int = 3000


def answer_text(fields: Fields, place: Place) -> str:
    """The field `answer`: a text, which may be a worked solution that ends with its answer, or a number."""
    return place.answer(fields["answer"], "answer")


def as_it_is(problem: Problem, response: str) -> str:
    return response


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose responses are judged by their final answers, or by running them.

    Args:
        name: on the command line.
        source: the public data sets whose rows it reads.
        columns: for each field the names that its column has in these, of which the first one that is there counts.
        prompt: the text around a problem, with {field} for the text of a field; or a function that makes the prompt of
            the fields.
        grader: what judges (response, answer): "math", "code", or a function as "module:function" (see
            repirl.verify.process).
        sampling: how a model is asked.
        answer: the right answer for the grader, from the fields.
        judged: what of a response is given to the grader, such as a program with its head.
        optional: fields that are None where there is no such column; for others that is an error. `id` always is one.
        stop: texts that end a response; it is cut off before the first of them.
        vote: the form of a response's answer that equal answers share (None: no vote), for majority votes; None where
            responses are not counted by answers.
        unreadable: the kinds of the grader's reasons (what stands before a colon) of answers that it could not read.
    """

    name: str
    source: str
    columns: Mapping[str, tuple[str, ...]]
    prompt: str | Callable[[Fields, Place], str]
    grader: str
    sampling: Sampling
    answer: Callable[[Fields, Place], str] = answer_text
    judged: Callable[[Problem, str], str] = as_it_is
    optional: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    vote: Callable[[str], Hashable | None] | None = field(default=canonical_answer)
    unreadable: tuple[str, ...] = ("no final answer found", "answer not readable", "too long")

    def until_stop(self, response: str) -> tuple[str, bool]:
        """The response up to the first text of `stop`, and whether there was one."""
        ends = [place for text in self.stop if (place := response.find(text)) >= 0]
        return (response[: min(ends)], True) if ends else (response, False)


def read_problems(benchmark: Benchmark, source: SourceConfig) -> Iterator[Problem]:
    """The problems of a data set.

    Args:
        benchmark: whose format the rows have.
        source: where they are; of a folder or the hub's data set the split `test`, where none is named.

    Raises:
        DataError: a row lacks a column, or holds something else there than expected, or two rows have the same id.
    """
    seen: dict[str, Place] = {}
    for number, place, row in read_rows(source, "test"):
        fields = {name: _field(name, row, place, benchmark) for name in benchmark.columns}
        prompt = _prompt(benchmark, fields, place)
        given = fields.get("id")
        name, answer = str(number if given is None else given), benchmark.answer(fields, place)
        problem = Problem(name, prompt, answer, fields.get("problem"))
        if (other := seen.setdefault(problem.id, place)) is not place:
            raise place.error(f"its id {problem.id!r} is that of {other.row}, too: ids tell responses apart")
        yield problem


def _prompt(benchmark: Benchmark, fields: Fields, place: Place) -> str:
    template = benchmark.prompt
    if not isinstance(template, str):
        return template(fields, place)
    # All at once: a problem may hold the name of a field in braces.
    names = "|".join(map(re.escape, benchmark.columns))
    return re.sub(rf"\{{({names})\}}", lambda name: place.text(fields[name[1]], name[1]), template)


def _field(name: str, row: dict[str, Any], place: Place, benchmark: Benchmark) -> Any:
    columns = benchmark.columns[name]
    for column in columns:
        if column in row:
            return row[column]
    if name == "id" or name in benchmark.optional:
        return None
    raise DataError(
        f"{place.source}, {place.row} has no column {' or '.join(map(repr, columns))}, but {sorted(map(str, row))}: "
        f"--benchmark {benchmark.name} reads the format of {benchmark.source}"
    )
