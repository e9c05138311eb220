"""How each prompt went in each turn: OUTPUT_DIR/history.jsonl.

A row is one prompt in one turn, with these columns (a mean is over its responses; tokens have equal shares of one):

    step           the turn, from 1
    index          row of the prompt in its file, from 0
    samples        number of responses
    correct        number of responses with an outcome above 0.5; null where nothing was verified
    outcome_mean   mean outcome; null likewise
    outcome_max    largest outcome; null likewise
    reward         mean reward of a token; null where the PRM did not score the responses
    reward_failed  the same over the responses that are not correct; null where there are none, or no rewards
    logprob        mean log-probability of a token under the weights and at the temperature that sampled it, in nats
    length         mean number of tokens
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from repirl.report.log import RowFile, as_lines, is_count, keep_until, read_rows
from repirl.report.samples import Scored, rounded

_WHAT = "outcomes of prompts"
_NUMBERS = ("outcome_mean", "outcome_max", "reward", "reward_failed", "logprob", "length")


class HistoryFile:
    """Appends rows to history.jsonl, which is made with the first one.

    Args:
        output_dir: the run's folder.
        start_step: the number of finished steps of a resumed run; 0 for a new one. Rows of later steps are removed.

    Raises:
        LogError: here and in `append`, where the file cannot be read or written.
    """

    def __init__(self, output_dir: str | os.PathLike, *, start_step: int) -> None:
        self._path = Path(output_dir) / "history.jsonl"
        self._file: RowFile | None = None
        keep_until(self._path, start_step, _WHAT, is_history)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of one step. They are on disk when this returns."""
        if rows:
            self._file = self._file or RowFile(self._path, _WHAT)
            self._file.append(as_lines(rows))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_history(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run, in the order of its turns; none where it has no history.

    Lines that are no rows are left out, and a warning says which.

    Raises:
        LogError: the file cannot be read.
    """
    path = Path(output_dir) / "history.jsonl"
    return read_rows(path, _WHAT, is_history) if path.exists() else []


def is_history(row: Mapping[str, Any]) -> bool:
    """Whether an object has the columns of a row; `step` is not looked at."""
    return (
        is_count(row.get("index"))
        and is_count(row.get("samples"))
        and (row.get("correct", -1) is None or is_count(row.get("correct")))
        and all(_is_number(row.get(name, "")) for name in _NUMBERS)
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number, or null."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and math.isfinite(value))


def history_rows(step: int, responses: Mapping[int, Sequence[Scored]]) -> list[dict[str, Any]]:
    """The rows of one turn; responses: by the prompt's row in its file, at least one each."""
    return [_row(step, index, scored) for index, scored in responses.items()]


def _row(step: int, index: int, scored: Sequence[Scored]) -> dict[str, Any]:
    outcomes = [x.outcome for x in scored]
    verified = not any(map(math.isnan, outcomes))
    rewards = [(x.outcome, fmean(x.rewards)) for x in scored if x.rewards]
    failed = [reward for outcome, reward in rewards if outcome <= 0.5]
    return {
        "step": step,
        "index": index,
        "samples": len(scored),
        "correct": sum(outcome > 0.5 for outcome in outcomes) if verified else None,
        "outcome_mean": rounded(fmean(outcomes)),
        "outcome_max": rounded(max(outcomes)) if verified else None,
        "reward": rounded(fmean(reward for _, reward in rewards)) if rewards else None,
        "reward_failed": rounded(fmean(failed)) if failed else None,
        "logprob": rounded(fmean(fmean(x.response.logprobs) for x in scored if x.response.logprobs)),
        "length": rounded(fmean(len(x.response.token_ids) for x in scored)),
    }
