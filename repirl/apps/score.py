"""`repirl score`: what a trained PRM says of the solutions in a file, row by row."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from statistics import fmean
from typing import Any, TypeAlias

import rich.progress
from rich.console import Console
from torch import Tensor

from repirl.apps.output import ResumableOutput, encoded
from repirl.apps.server import Server, served_prm
from repirl.apps.solutions import (
    Columns,
    EncodedSolution,
    ScoredSolution,
    Solution,
    as_source,
    check_split,
    chunks,
    encode,
    read_solutions,
    score_encoded,
)
from repirl.apps.trained import Placed, trained_prm
from repirl.config import ConfigError
from repirl.data.values import Place
from repirl.prm import Scorer

Aggregate: TypeAlias = Callable[[Sequence[float]], float]
AGGREGATES: dict[str, Aggregate] = {
    "mean": fmean,
    "sum": math.fsum,
    "min": min,
    "last": lambda scores: scores[-1],
    "prod": math.prod,
}
# A part of the output, which is written at once, holds so many batches or fewer.
BATCHES_PER_PART = 8


@dataclass(frozen=True)
class ScoreOptions:
    """How solutions are read and scored.

    Args:
        columns: which columns hold prompt and response.
        finished: whether responses are whole ones, which get an end token. Rows with a column `finished` say it.
        split: how a response is split into steps: "newline", "blank-line", or "tag:TEXT" for a text that stands behind
            each step and is taken out; None for the separator in the PRM's description.
        aggregate: how step scores become the score of a response, a key of AGGREGATES; None for what the PRM's
            description says.
        token_rewards: whether the rewards of all tokens are written.
        prefix: stands before the names of the columns that are added.
        placed: how the PRM is loaded, and how many tokens a batch may hold.
        server: the vLLM server that computes the rewards of a PRM of kind `value`; None to compute them here. Then
            `placed.dtype` is the type in which the server computes.
    """

    columns: Columns = field(default_factory=Columns)
    finished: bool = True
    split: str | None = None
    aggregate: str | None = None
    token_rewards: bool = False
    prefix: str = ""
    placed: Placed = field(default_factory=Placed)
    server: Server | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.aggregate is not None and self.aggregate not in AGGREGATES:
            raise ConfigError(f"--aggregate is {self.aggregate!r}, expected one of {', '.join(AGGREGATES)}")

    @property
    def added(self) -> list[str]:
        """The columns that are added to each row."""
        names = ["rewards"] * self.token_rewards + ["step_scores", "score"]
        return [self.prefix + name for name in names]


@dataclass
class ScoreCounts:
    """What was scored so far, earlier calls included. tokens: of prompts and responses; seconds: of scoring."""

    rows: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def score(
    prm: str | os.PathLike | None,
    source: str | os.PathLike,
    output: str | os.PathLike,
    options: ScoreOptions | None = None,
    *,
    resume: bool = False,
) -> ScoreCounts:
    """Score every row of a data set by a trained PRM.

    Each line of the output is a row of the input, in its order, with all its columns and `rewards` (with
    `token_rewards`; the reward of each token of the response, its end token included), `step_scores` (as
    PRM.step_scores) and `score` (their aggregate, in float64). OUTPUT.meta.json holds the counts and how the file was
    made. Progress and tokens/s go to standard error.

    Args:
        prm: an exported PRM, or a run's folder or step_N folder. With a server an exported PRM, of which no weights are
            loaded, or None for the name by which the server found it.
        source: JSON lines, CSV, Parquet, a folder of them, or a data set of the hub ("name:split" for a split of it).
        output: the file to write.
        options: how; None for the defaults.
        resume: go on with the file: rows that are done are kept, and the result is that of an uninterrupted call.

    Raises:
        ConfigError: rows, models or options that cannot be used, or an output that exists and may not be replaced.
        RunError: the output cannot be written, a reward is not finite, or the server does not answer as it should.
    """
    options = options or ScoreOptions()
    with ResumableOutput(output, "repirl score", resume=resume, inputs=[source]) as file:
        solutions = read_solutions(as_source(os.fspath(source)), options.columns, finished=options.finished)
        made_with = _made_with(solutions, options)
        with _opened(prm, options) as (loaded, prints):
            aggregate = aggregate_by(loaded, options.aggregate)
            tokens = [encode(solution, loaded, options.split) for solution in solutions]
            file.begin(made_with | prints, len(solutions))
            return _score_all(loaded, list(zip(solutions, tokens, strict=True)), aggregate, file, options)


@contextmanager
def _opened(prm: str | os.PathLike | None, options: ScoreOptions) -> Iterator[tuple[Scorer, dict[str, str]]]:
    if options.server is not None:
        yield served_prm(prm, options.server, options.placed)
    elif prm is None:
        raise ConfigError("give a trained PRM by --prm DIR, or a server by --server URL")
    else:
        with trained_prm(prm, options.placed) as opened:
            yield opened


def _score_all(
    prm: Scorer,
    rows: Sequence[tuple[Solution, EncodedSolution]],
    aggregate: Aggregate,
    file: ResumableOutput,
    options: ScoreOptions,
) -> ScoreCounts:
    """Score part by part, always the same ones: a reward depends, by rounding, on what is scored with it."""
    counts = ScoreCounts(file.num_rows)
    if file.num_rows:
        counts.steps, counts.tokens = int(file.counts["steps"]), int(file.counts["tokens"])
        counts.seconds = file.counts["seconds"]
    lengths, budget = [len(one) for _, one in rows], options.placed.tokens
    with Progress("score", sum(lengths), sum(lengths[: file.num_rows])) as progress:
        for start, end in chunks(lengths, BATCHES_PER_PART * budget):
            if end <= file.num_rows:
                continue
            begun = time.perf_counter()
            scored: dict[int, ScoredSolution] = {}
            for i, one in score_encoded(prm, [tokens for _, tokens in rows[start:end]], budget):
                scored[start + i] = one
                progress.add(lengths[start + i])
            lines = [_line(rows[i][0], scored[i], aggregate, options) for i in range(start, end)]
            counts.rows += end - start
            counts.steps += sum(len(one.steps) for one in scored.values())
            counts.tokens += sum(lengths[start:end])
            counts.seconds += time.perf_counter() - begun
            figures = asdict(counts)
            del figures["rows"]
            file.write(lines, figures)
    return counts


def aggregate_of(prm: Scorer) -> str:
    """How the PRM's description puts step scores together, a key of AGGREGATES."""
    name = prm.description.steps.aggregate
    return "prod" if name == "product" else name


def aggregate_by(prm: Scorer, name: str | None) -> Aggregate:
    """How a PRM's step scores are put together: by `name`, a key of AGGREGATES, or else as its description says.

    Raises:
        ConfigError: it is a product, and step scores are no chances.
    """
    name = name or aggregate_of(prm)
    if name == "prod" and prm.description.steps.score != "end":
        raise ConfigError(
            "--aggregate prod multiplies chances, and the step scores of this PRM are mean rewards of tokens, which "
            "may be of any size and sign (steps.score in its config.json is not `end`): give --aggregate mean, min or "
            "last"
        )
    return AGGREGATES[name]


def _line(solution: Solution, scored: ScoredSolution, aggregate: Aggregate, options: ScoreOptions) -> str:
    steps = _short(scored.steps)
    values: list[Any] = [_short(scored.rewards)] if options.token_rewards else []
    values += [steps, aggregate(steps)]
    return dump(solution.row | dict(zip(options.added, values, strict=True)), solution.place)


def _short(values: Tensor) -> list[float]:
    """float32 numbers as the shortest decimals that are read back as the same float32."""
    return [float(str(value)) for value in values.numpy()]


def dump(row: dict[str, Any], place: Place) -> str:
    """A row as a line of JSON. Times and decimals, of tables, become text; DataError for what JSON cannot hold."""

    def text(value: Any) -> str:
        if isinstance(value, datetime.date | datetime.time):
            return value.isoformat()
        if isinstance(value, Decimal):
            return str(value)
        raise place.error(f"a {type(value).__name__} ({value!r:.40}) cannot be written to JSON lines: leave it out")

    return json.dumps(row, ensure_ascii=False, default=text)


def _made_with(solutions: Sequence[Solution], options: ScoreOptions) -> dict[str, Any]:
    """What the output depends on besides models. DataError where a row has a column that would be replaced."""
    digest = hashlib.blake2b(digest_size=8)
    for solution in solutions:
        if taken := [name for name in options.added if name in solution.row]:
            raise solution.place.error(
                f"there is a column {taken[0]!r} already, which would be replaced: give the added columns other names "
                "by --prefix TEXT"
            )
        digest.update(encoded(dump(solution.row, solution.place)) + b"\n")
    made_with = asdict(options)
    placed, columns, _ = made_with.pop("placed"), made_with.pop("columns"), made_with.pop("server")
    made_with |= {f"{name} column": column for name, column in columns.items()}
    made_with |= {"tokens": placed["tokens"], "dtype": placed["dtype"]}
    if placed["convention"] is not None:
        made_with["convention"] = placed["convention"]
    return made_with | {"input": f"{len(solutions)} rows, digest {digest.hexdigest()}"}


class Progress:
    """Shows on standard error how many tokens are done: a bar on a terminal, elsewhere a line now and then; at the end
    a line with tokens/s.

    Args:
        name: what is done.
        total: tokens in all.
        done: tokens that are done already.
    """

    def __init__(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.total, self._start, self._done, self._shown = name, total, done, done, done
        self.console = Console(stderr=True)
        columns = (
            rich.progress.TextColumn(name),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
            rich.progress.TimeRemainingColumn(),
        )
        self._bar = rich.progress.Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        self._begun = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is not None:
            return
        seconds, tokens = time.perf_counter() - self._begun, self._done - self._start
        speed = f"{tokens / seconds:.0f} tokens/s" if seconds > 0 else "-"
        self._print(f"{self.name}: {tokens} tokens in {seconds:.1f} s, {speed}")

    def add(self, tokens: int) -> None:
        """Count what was done."""
        self._done += tokens
        self._bar.update(self._task, completed=self._done)
        if not self.console.is_terminal and self._done - self._shown >= self.total / 20:
            self._print(f"{self.name} {self._done}/{self.total} tokens")
            self._shown = self._done

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)
