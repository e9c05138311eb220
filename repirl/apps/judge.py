"""`repirl judge`: what a verifier says of responses that are there already, and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import ValidationError

from repirl.apps.lines import LinesFile
from repirl.apps.solutions import as_source
from repirl.config import ConfigError
from repirl.data.answers import answer_of
from repirl.data.sources import read_rows
from repirl.data.values import Place
from repirl.options import VerifierConfig
from repirl.output_path import LINES, check_file
from repirl.verify.choose import make_verifier

# Rows that are in memory at a time.
_CHUNK = 1024
ADDED = ("verdict", "reason")


@dataclass
class JudgeCounts:
    """What was judged. right: responses with a verdict above 0.5. reasons: by kind, which is what stands before the
    first colon. total: sum of the verdicts."""

    responses: int = 0
    right: int = 0
    total: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)


def verifier_config(
    verifier: str, processes: int = 1, timeout_seconds: float = 20.0, code: Mapping[str, Any] | None = None
) -> VerifierConfig:
    """The options of the verifier that a command line names.

    Args:
        verifier: "math", "code", or a function of your own as "module:function".
        processes: worker processes.
        timeout_seconds: the longest time for one response.
        code: of repirl.codeconfig.CodeConfig, what is not to be as by default, for "code".

    Raises:
        ConfigError: there is no such verifier, or a number is out of range.
    """
    if verifier not in ("math", "code") and ":" not in verifier:
        raise ConfigError(f"--verifier is {verifier!r}, expected math, code or module:function")
    function = None if verifier in ("math", "code") else verifier
    kind = "custom" if function else verifier
    try:
        values = {"kind": kind, "function": function, "processes": processes, "timeout_seconds": timeout_seconds}
        config = VerifierConfig.model_validate(values | ({"code": code} if code else {}))
        config.check("verifier")
    except ValidationError as error:
        first = error.errors()[0]
        options = {"processes": "--processes", "timeout_seconds": "--timeout"}
        option = options.get(str(first["loc"][0]), f"--{str(first['loc'][-1]).replace('_', '-')}")
        raise ConfigError(f"{option} is {first['input']!r}: {first['msg'].lower()}") from error
    except ValueError as error:
        raise ConfigError(f"--verifier is {verifier!r}, expected math, code or module:function ({error})") from error
    return config


def judge(
    verifier: VerifierConfig,
    rows: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    response_column: str = "response",
    answer_column: str = "answer",
) -> JudgeCounts:
    """Judge the responses of a file, in worker processes with a limit of time and memory.

    Each line of the output is a row of the file, with two more columns: `verdict`, the number that the verifier returns
    (1 right, 0 wrong), and `reason`. Of math these are "equal", "differs: ANSWER vs RIGHT ANSWER", "no final answer
    found", "answer not readable: ...", "right answer not readable: ...", "too long: ..."; of code "passed", "no code
    found", "compile error: ...", "wrong answer: ...", "timed out: ...", "out of memory: ...", "too much output: ...",
    "crashed: ..." (repirl.verify.code); of a function of your own the
    attribute `reason` of the number that it returns, else "right" (1), "wrong" (0), "partly right: VERDICT" or "outside
    0 to 1: VERDICT"; of both "timed out: LIMIT" and "out of memory, or its process died", which count as wrong. The
    file appears under its name when it is complete.

    Args:
        verifier: what judges; see `verifier_config`.
        rows: a file (JSON lines, CSV or Parquet), or a data set of the hub ("owner/name:split").
        output: the file to write; None to count only.
        response_column, answer_column: where the texts are; "a.b" is part b of column a.

    Raises:
        ConfigError: a row without these columns, one that has `verdict` or `reason` already, an output that exists, or
            a function that cannot be loaded.
        RunError: the function fails on a response, or the output cannot be written.
    """
    if output is not None:
        check_file(output, LINES, [rows])
    counts = JudgeCounts()
    with closing(make_verifier(verifier, explain=True)) as judging:
        tests = verifier.kind == "code"
        read = _rows(rows, response_column, answer_column, adds=output is not None, tests=tests)
        file = None
        while chunk := list(islice(read, _CHUNK)):
            if output is not None and file is None:
                file = LinesFile(output)
            verdicts = judging.judge([pair for _, pair in chunk])
            written = []
            for number, ((row, _), verdict) in enumerate(zip(chunk, verdicts, strict=True)):
                reason = judging.reasons.get(number) or _reason(verdict)
                counts.reasons[reason.partition(":")[0]] += 1
                counts.right += verdict > 0.5
                counts.total += verdict
                written.append(row | {"verdict": verdict, "reason": reason})
            counts.responses += len(chunk)
            if file is not None:
                file.write(written)
        if file is not None:
            file.finish()
    return counts


def _rows(
    source: str | os.PathLike, response_column: str, answer_column: str, *, adds: bool, tests: bool
) -> Iterator[tuple[dict[str, Any], tuple[str, str]]]:
    """(row, (response, right answer)) of a file.

    Args:
        source: the file.
        response_column, answer_column: where the texts are.
        adds: verdict and reason are to be added.
        tests: answers are tests of programs.
    """
    for _, place, row in read_rows(as_source(os.fspath(source)), "train"):
        if adds and (twice := [name for name in ADDED if name in row]):
            raise place.error(f"there is a column {twice[0]!r} already, which the output adds: rename or remove it")
        response = response_text(place, place.value(row, response_column, "--response-column"), response_column)
        answer = answer_of(row, place, answer_column, "--answer-column", tests=tests)
        yield row, (response, answer)


def response_text(place: Place, value: Any, column: str) -> str:
    """A model's text, which may be empty. DataError for anything else."""
    return value if isinstance(value, str) and not value.strip() else place.text(value, column)


def _reason(verdict: float) -> str:
    """The reason where a function gave none."""
    if verdict in (0.0, 1.0):
        return "right" if verdict else "wrong"
    return f"{'partly right' if 0 < verdict < 1 else 'outside 0 to 1'}: {verdict:g}"


def print_counts(counts: JudgeCounts) -> None:
    """The table of reasons, the most frequent one first."""
    from repirl.report.display import print_table

    rows = [[reason, n, f"{n / counts.responses:.1%}"] for reason, n in counts.reasons.most_common()]
    print_table("What the verifier says", ["reason", "responses", "share"], rows)
    mean = f", mean verdict {counts.total / counts.responses:.4f}" if counts.total != counts.right else ""
    print(f"{counts.responses} responses, {counts.right / counts.responses:.1%} right{mean}")
