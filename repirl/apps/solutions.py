"""Solutions of a file, given as text or as steps, and what a trained PRM says of their tokens and steps."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from repirl.config import ConfigError, RunError
from repirl.data.errors import DataError
from repirl.data.prompts import read_prompt
from repirl.data.sources import read_rows
from repirl.data.split import StepForm, segment
from repirl.data.steps import encode_steps
from repirl.data.text import encode_joined, encode_solution
from repirl.data.values import Place, shown
from repirl.dataconfig import SourceConfig
from repirl.prm import Scorer

# What --split calls the usual separators. Any other separator is the PRM's own.
SEPARATORS = {"newline": "\n", "blank-line": "\n\n"}
TAG = "tag:"


@dataclass(frozen=True)
class Columns:
    """Which columns of a row hold what; "a.b" is the part b of column a.

    Args:
        prompt: text, or messages of a chat.
        response: the response as text. None: `response`, in rows that have it.
        steps: the response as a list of steps. None: `steps`, in rows that have it.
    """

    prompt: str = "prompt"
    response: str | None = None
    steps: str | None = None

    def __post_init__(self) -> None:
        if self.response is not None and self.steps is not None:
            raise ConfigError(
                f"--response-column {self.response} and --steps-column {self.steps} both name what is scored: give one"
            )


@dataclass(frozen=True)
class Solution:
    """A row of the input.

    Args:
        place: where it stands.
        row: all its columns.
        prompt: text or messages.
        response: text, or a list of steps without their separators.
        finished: whether the response ends there, rather than being cut off.
    """

    place: Place
    row: dict[str, Any]
    prompt: Any
    response: str | tuple[str, ...]
    finished: bool


@dataclass(frozen=True)
class EncodedSolution:
    """A solution as tokens. ends: for each step the index of its last token in `response`, increasing."""

    place: Place
    prompt: Sequence[int]
    response: Sequence[int]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class ScoredSolution:
    """rewards: of each token of the response, [R] · steps: of each step, [S] (PRM.step_scores)."""

    rewards: Tensor
    steps: Tensor


def as_source(name: str) -> SourceConfig:
    """A file, a folder or a data set of the hub; of the latter two "name:split" is a split."""
    path, colon, split = name.rpartition(":")
    if colon and not Path(name).exists() and (Path(path).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", path)):
        return SourceConfig(path=path, split=split)
    return SourceConfig(path=name)


def read_solutions(source: SourceConfig, columns: Columns, *, finished: bool = True) -> list[Solution]:
    """The rows of a data set.

    Args:
        source: where it is.
        columns: which hold what.
        finished: whether responses are whole ones, in rows without a column `finished` of their own.

    Raises:
        DataError: for what cannot be read or is not what it should be; it names the row.
    """
    solutions = []
    for _, place, row in read_rows(source, "train"):
        prompt = place.value(row, columns.prompt, "--prompt-column")
        ended = row.get("finished", finished)
        if not isinstance(ended, bool):
            raise place.error(f"'finished' is {shown(ended)}, expected true or false")
        response = _response(row, place, columns)
        solutions.append(Solution(place, row, place.prompt(prompt, columns.prompt), response, ended))
    return solutions


def _response(row: dict[str, Any], place: Place, columns: Columns) -> str | tuple[str, ...]:
    response, steps = columns.response, columns.steps
    if response is None and steps is None:
        response, steps = ("response" if "response" in row else None), ("steps" if "steps" in row else None)
        if response and steps:
            raise place.error("both 'response' and 'steps' are there: say by --response-column or --steps-column which")
        if not response and not steps:
            raise place.error(
                f"there is neither 'response' nor 'steps', but {sorted(map(str, row))}: name the column by "
                "--response-column (text) or --steps-column (a list of steps)"
            )
    if steps is not None:
        values = place.value(row, steps, "--steps-column")
        if not isinstance(values, list) or not values:
            raise place.error(f"{steps!r} holds {shown(values)}, expected a list of steps")
        return tuple(place.text(value, f"{steps}.{number}") for number, value in enumerate(values))
    assert response is not None
    value = place.value(row, response, "--response-column")
    if isinstance(value, str) and not value.strip():
        # A policy may end its response at once.
        return value
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        raise place.error(
            f"{response!r} holds a list of texts: if these are the steps of one response, name it by --steps-column; "
            "if they are several responses, give each a row of its own"
        )
    [text] = place.solutions(value, response)
    return text


def check_split(split: str | None) -> None:
    """ConfigError where `split` is no way to split a response into steps."""
    if split is not None and split not in SEPARATORS and not (split.startswith(TAG) and split != TAG):
        raise ConfigError(
            f"--split is {split!r}, expected {', '.join(SEPARATORS)} or {TAG}TEXT, a text that stands behind each step"
        )


def encode(solution: Solution, prm: Scorer, split: str | None) -> EncodedSolution:
    """A solution as tokens, encoded as in training, and where its steps end.

    Args:
        solution: the row.
        prm: whose tokenizer, prompts, end tokens and separator of steps are used.
        split: a key of SEPARATORS; "tag:" with a text that stands behind each step and is taken out; None for the
            separator in the PRM's description. It is put between steps that are given as a list.

    Raises:
        DataError: for a prompt or response without tokens, and one that is longer than the model's window.
    """
    place, described = solution.place, prm.description
    if not isinstance(solution.prompt, str) and not described.prompt.chat_template:
        raise place.error(
            "the prompt is a list of messages, but this PRM was trained on prompts without a chat template (prompt in "
            "its description): give text"
        )
    if prm.form is not None:
        return _encode_form(solution, prm, prm.form, split)
    prompt = read_prompt({"prompt": solution.prompt}, place, "prompt", "--prompt-column", prm.prompts, prm.tokenizer)
    response, separator = solution.response, SEPARATORS.get(split or "", described.steps.separator)
    if isinstance(response, str) and split is not None and split.startswith(TAG):
        response = _untagged(response, place, split.removeprefix(TAG))
    if isinstance(response, str):
        if solution.finished:
            ids = encode_solution(response, prm.ends, prm.tokenizer)
        else:
            ids = tuple(prm.tokenizer(response, add_special_tokens=False).input_ids)
        if not ids:
            raise place.error("the response has no tokens")
        ends = segment(ids, separator, prm.tokenizer, ended=ids[-1] in prm.ends.ids).ends
    else:
        ids, ends = encode_steps(response, place, separator, prm.ends, prm.tokenizer, finished=solution.finished)
    _check_window(place, prm, len(prompt), len(ids))
    # Arrays take a quarter of the memory, or less.
    return EncodedSolution(place, array("i", prompt), array("i", ids), ends)


def _encode_form(solution: Solution, prm: Scorer, form: StepForm, split: str | None) -> EncodedSolution:
    """A solution as a PRM of others wants it: `split` says what ends a step in a text, a tag of the PRM behind it."""
    place, response = solution.place, solution.response
    if isinstance(response, str):
        if split is not None and split.startswith(TAG):
            response = _untagged(response, place, split.removeprefix(TAG))
        else:
            response = tuple(replace(form, split=SEPARATORS.get(split or "", form.split)).steps(response))
    steps = [step.strip() for step in response]
    if not steps or not all(steps):
        raise place.error("the response has no tokens" if not steps else "a step is empty")
    try:
        prompt, ids = encode_joined(solution.prompt, form.write(steps), prm.prompts, prm.tokenizer)
    except DataError as error:
        raise place.error(str(error)) from error
    if not prompt:
        raise place.error("the prompt has no tokens")
    ends = segment(ids, form.tag, prm.tokenizer, ended=False).ends
    if len(ends) != len(steps):
        raise place.error(
            f"the tag {form.tag!r}, which the PRM scores behind each of the {len(steps)} steps, is read {len(ends)} "
            "times: give steps that do not hold it"
        )
    _check_window(place, prm, len(prompt), len(ids))
    return EncodedSolution(place, array("i", prompt), array("i", ids), ends)


def _untagged(text: str, place: Place, tag: str) -> tuple[str, ...]:
    """The steps of a text with a tag behind each of them, or behind all but the last."""
    *steps, last = text.split(tag)
    if last.strip():
        steps.append(last)
    if not steps or not all(step.strip() for step in steps):
        raise place.error(f"a step before a tag {tag!r} is empty (--split {TAG}{tag})")
    return tuple(step.strip() for step in steps)


def _check_window(place: Place, prm: Scorer, prompt: int, response: int) -> None:
    if prm.window is not None and prompt + response > prm.window:
        raise place.error(
            f"{prompt + response} tokens ({prompt} of the prompt, {response} of the response), but the PRM's window "
            f"has {prm.window} (max_position_embeddings in its config.json): shorten the row, or leave it out"
        )


def chunks(lengths: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
    """Where to cut a sequence of rows: [start, end) of parts that hold `num_tokens` or fewer, or one row."""
    cuts, total = [0], 0
    for number, length in enumerate(lengths):
        if total and total + length > num_tokens:
            cuts.append(number)
            total = 0
        total += length
    return list(pairwise([*cuts, len(lengths)])) if lengths else []


def score_encoded(
    prm: Scorer, solutions: Sequence[EncodedSolution], tokens: int
) -> Iterator[tuple[int, ScoredSolution]]:
    """Score solutions batch by batch, the longest first, so that a batch holds solutions of similar length.

    Args:
        prm: the PRM.
        solutions: what is scored.
        tokens: in one batch at most; a longer solution has one of its own.

    Yields:
        The place of a solution in `solutions`, and its scores.

    Raises:
        RunError: a reward is not finite.
    """
    order = sorted(range(len(solutions)), key=lambda i: -len(solutions[i]))
    for start, end in chunks([len(solutions[i]) for i in order], tokens):
        batch = [(i, solutions[i]) for i in order[start:end]]
        rewards = prm.rewards([(list(s.prompt), list(s.response)) for _, s in batch])
        for (i, solution), reward in zip(batch, rewards, strict=True):
            if not reward.isfinite().all():
                raise RunError(
                    f"{solution.place.source}, {solution.place.row}: the PRM gives rewards that are not finite"
                )
            yield i, ScoredSolution(reward, prm.score_steps(reward, solution.ends))
