"""Responses of a run that are kept for people to read: OUTPUT_DIR/samples.jsonl.

A row has these columns:

    step            turn in which it was sampled, from 1; 0 for the evaluation before the first turn
    kind            "train" or "eval"
    index           row of the prompt in its file, from 0
    prompt          as the policy saw it, special tokens included
    response        as the verifier saw it
    token_texts     of each token of the response, the end token included; "" for a token that only begins a character
    token_rewards   the PRM's reward of each token, null where the PRM did not score the response
    token_logprobs  of each token under the weights that sampled it, in nats, at its temperature (greedy ones: 1)
    outcome         the verifier's number, null where nothing was verified
    length          number of tokens
    end_reason      "end" with an end token, "length" where the response was cut off at the length limit
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from repirl.data.prompts import Prompt
from repirl.data.split import decode
from repirl.data.text import response_text
from repirl.report.log import RowFile, as_lines, explained, is_count, keep_until, read_rows
from repirl.rollout.engine import Response

Kind = Literal["train", "eval"]

# Files beside samples.jsonl that are kept; then the oldest is removed.
OLDER_FILES = 4
# In TensorBoard: rows of each kind and step, and characters of a text.
SHOWN_ROWS, SHOWN_CHARACTERS = 2, 4000

_WHAT = "sampled responses"
_NAME = re.compile(r"samples(?:\.([1-9][0-9]*))?\.jsonl")


@dataclass(frozen=True)
class Scored:
    """A response with what was made of it.

    Args:
        response: as it was sampled.
        outcome: the verifier's number; NaN where nothing was verified.
        rewards: the PRM's, of each token; None where it did not score the response.
    """

    response: Response
    outcome: float
    rewards: Sequence[float] | None


class SampleFiles:
    """Appends rows to samples.jsonl. When that would grow too large it becomes samples.1.jsonl, which was before it
    samples.2.jsonl, and so on.

    Args:
        output_dir: the run's folder.
        max_mb: of one file, in 10^6 bytes. A file with the rows of one step alone may be larger.
        start_step: the number of finished steps of a resumed run; 0 for a new one. Rows of later steps are removed.

    Raises:
        LogError: here and in `append`, where a file cannot be read or written.
    """

    def __init__(self, output_dir: str | os.PathLike, *, max_mb: float, start_step: int) -> None:
        self._path = Path(output_dir) / "samples.jsonl"
        self._max_bytes = max_mb * 1e6
        self._file: RowFile | None = None
        files = sample_files(output_dir)
        for file in files or [self._path]:
            keep_until(file, start_step, _WHAT, is_sample)
        with explained(self._path, _WHAT):
            for file in files:
                if not file.stat().st_size:
                    file.unlink()
            # The newest file that has rows is samples.jsonl again, as when its last row was written.
            for number, file in enumerate(reversed(sample_files(output_dir))):
                file.rename(self._numbered(number))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the rows of one step. They are on disk when this returns."""
        if not rows:
            return
        content = as_lines(rows)
        if self._file is None:
            self._file = RowFile(self._path, _WHAT)
        if self._file.size and self._file.size + len(content) > self._max_bytes:
            self._file.close()
            self._file = None
            self._rotate()
            self._file = RowFile(self._path, _WHAT)
        self._file.append(content)

    def _rotate(self) -> None:
        with explained(self._path, _WHAT):
            for number in range(OLDER_FILES, -1, -1):
                with suppress(FileNotFoundError):
                    if number == OLDER_FILES:
                        self._numbered(number).unlink()
                    else:
                        self._numbered(number).rename(self._numbered(number + 1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"samples.{number}.jsonl") if number else self._path

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def sample_files(output_dir: str | os.PathLike) -> list[Path]:
    """The files with samples in a run's folder, oldest first."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in Path(output_dir).glob("samples*.jsonl")]
    numbered = [(int(match[1] or 0), path) for path, match in matches if match is not None]
    return [path for _, path in sorted(numbered, reverse=True)]


def read_samples(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows that a run has kept, in the order in which they were written; none where it has kept none.

    Lines that are no rows are left out, and a warning says which.

    Raises:
        LogError: a file cannot be read.
    """
    return [row for file in sample_files(output_dir) for row in read_rows(file, _WHAT, is_sample)]


def is_sample(row: Mapping[str, Any]) -> bool:
    """Whether an object has the columns of a row; `step` is not looked at."""
    count = row.get("length")
    return (
        row.get("kind") in ("train", "eval")
        and is_count(row.get("index"))
        and is_count(count)
        and all(isinstance(row.get(name), str) for name in ("prompt", "response", "end_reason"))
        and all(
            isinstance(values := row.get(n), list) and len(values) == count for n in ("token_texts", "token_logprobs")
        )
        and ((values := row.get("token_rewards")) is None or (isinstance(values, list) and len(values) == count))
    )


def sample_row(
    step: int, kind: Kind, prompt: Prompt, scored: Scored, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The row of one response."""
    response, ids = scored.response, scored.response.token_ids
    return {
        "step": step,
        "kind": kind,
        "index": prompt.index,
        "prompt": decode(prompt.token_ids, tokenizer),
        "response": response_text(ids, tokenizer, ended=response.ended),
        "token_texts": token_texts(ids, tokenizer),
        "token_rewards": None if scored.rewards is None else [rounded(x) for x in scored.rewards],
        "token_logprobs": [rounded(x) for x in response.logprobs],
        "outcome": rounded(scored.outcome),
        "length": len(ids),
        "end_reason": "end" if response.ended else "length",
    }


def rounded(value: float | None) -> float | None:
    """A number with six significant digits; None, which JSON has, for one that is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds to those before it; joined, they are the text of all tokens.

    A character of several tokens belongs to the last of them. Some tokenizers write a token differently at the start
    of a text, so each is decoded together with the tokens before it.
    """
    texts: list[str] = []
    # Decoding from `begin` shows how the tokens from `new` on continue the text. No character has more than 4 tokens.
    begin = new = 0
    for end in range(1, len(token_ids) + 1):
        before, text = (decode(token_ids[begin:stop], tokenizer) for stop in (new, end))
        if text.endswith("\ufffd") and end < len(token_ids) and end - new < 4:
            texts.append("")
            continue
        texts.append(text[len(before) :])
        begin, new = new, end
    return texts


def as_texts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A few rows of one step as Markdown for TensorBoard, by name."""
    texts: dict[str, str] = {}
    for kind in ("train", "eval"):
        for number, row in enumerate([row for row in rows if row["kind"] == kind][:SHOWN_ROWS]):
            about = f"outcome {row['outcome']}, {row['length']} tokens, end: {row['end_reason']}"
            parts = (about, row["prompt"][:SHOWN_CHARACTERS], row["response"][:SHOWN_CHARACTERS])
            # Indented lines are shown as they are.
            blocks = [part if part is about else _indented(part) for part in parts]
            texts[f"samples/{kind}_{number}"] = "\n\n".join(blocks)
    return texts


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "
