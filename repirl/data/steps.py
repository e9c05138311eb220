"""Responses whose steps are labelled right or wrong: files of three formats, and the order in which a run uses them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.batch import PackedBatch, pack
from repirl.data.errors import DataError
from repirl.data.prompts import LengthLimit, Ordered, read_prompt
from repirl.data.sources import read_rows
from repirl.data.split import char_ends, join_steps, token_ends
from repirl.data.text import EndTokens, encode_solution, find_end_tokens
from repirl.data.values import Place, shown
from repirl.dataconfig import DataConfig, StepFileConfig

logger = logging.getLogger(__name__)

# PRM800K's ratings as labels. A neutral step is no error (Lightman et al. 2023 count it as right, too).
_RATINGS = {1: 1.0, 0: 1.0, -1: 0.0}


@dataclass(frozen=True)
class StepRow:
    """A response as a file holds it.

    Args:
        prompt: text or messages.
        steps: the steps' texts, without their separators.
        labels: of each step: the chance that it is right, in [0, 1], or None.
        finished: whether the last step is the last of the solution.
    """

    prompt: Any
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    finished: bool


@dataclass(frozen=True)
class LabelledResponse:
    """A response for training.

    Args:
        prompt_ids: the prompt's tokens.
        response_ids: the response's; a finished one ends with the end token.
        ends: indices into response_ids: the last token of each labelled step.
        labels: of these steps, each in [0, 1].
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    ends: tuple[int, ...]
    labels: tuple[float, ...]


class LabelledSteps(Ordered):
    """Labelled responses in the order of a run.

    Args:
        rows: all of them.
        seed: of the order.
        per_turn: how many `next` gives.
    """

    what = "labelled steps"

    def __init__(self, rows: list[LabelledResponse], *, seed: int, per_turn: int) -> None:
        self.rows, self.per_turn = rows, per_turn
        super().__init__(len(rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def next(self) -> PackedBatch:
        """The next responses, with the stream `step_label`."""
        return pack_steps([self.rows[i] for i in self._cursor.next(self.per_turn)])


def pack_steps(rows: Sequence[LabelledResponse]) -> PackedBatch:
    """A batch with the stream `step_label`: at the last token of each labelled step its label, elsewhere NaN."""
    streams = []
    for row in rows:
        stream = [math.nan] * len(row.response_ids)
        for end, label in zip(row.ends, row.labels, strict=True):
            stream[end] = label
        streams.append(stream)
    return pack([(row.prompt_ids, row.response_ids) for row in rows], streams={"step_label": streams})


def load_steps(data: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str) -> list[LabelledResponse]:
    """Labelled responses of `data.steps` or `data.eval_steps` (split "train" or "eval").

    Args:
        data: the options.
        tokenizer: the model's.
        split: which file.

    Raises:
        DataError: for files, rows, steps, labels and lengths that cannot be used; it names the row.
    """
    source = data.steps if split == "train" else data.eval_steps
    assert source is not None
    limit, ends = LengthLimit(data), find_end_tokens(data, tokenizer)
    rows, num_unlabelled = [], 0
    for place, row in _read(source, "train" if split == "train" else "test"):
        if all(label is None for label in row.labels):
            num_unlabelled += 1
            continue
        column = source.prompt_column
        prompt_ids = read_prompt({column: row.prompt}, place, column, "data.steps.prompt_column", data, tokenizer)
        labelled = _encode(row, prompt_ids, place, data.step_separator, ends, tokenizer)
        fits = limit.allows(
            len(prompt_ids), place, "prompt", "data.max_prompt_tokens", data.max_prompt_tokens
        ) and limit.allows(
            len(labelled.response_ids), place, "response", "data.max_expert_tokens", data.max_expert_tokens
        )
        if fits:
            rows.append(labelled)
    if num_unlabelled:
        logger.warning("%s: left out %d responses without a single label", source.path, num_unlabelled)
        if not rows and not limit.num_dropped:
            raise DataError(f"{source.path}: no step of any response has a label")
    limit.report(source.path, len(rows))
    return rows


def _encode(
    row: StepRow,
    prompt_ids: tuple[int, ...],
    place: Place,
    separator: str,
    ends: EndTokens,
    tokenizer: PreTrainedTokenizerBase,
) -> LabelledResponse:
    ids, last = encode_steps(row.steps, place, separator, ends, tokenizer, finished=row.finished)
    pairs = [(end, label) for end, label in zip(last, row.labels, strict=True) if label is not None]
    return LabelledResponse(prompt_ids, ids, tuple(end for end, _ in pairs), tuple(label for _, label in pairs))


def encode_steps(
    steps: Sequence[str],
    place: Place,
    separator: str,
    ends: EndTokens,
    tokenizer: PreTrainedTokenizerBase,
    *,
    finished: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A response that is given as steps, as tokens.

    Args:
        steps: the steps' texts, without their separators.
        place: of their row, for messages.
        separator: what is put behind each step, but not behind the last one of a finished response.
        ends: what ends a response.
        tokenizer: the model's.
        finished: whether the last step is the last of the response, which then ends with an end token.

    Returns:
        The response's token ids, and for each step the index of its last token in them, increasing.

    Raises:
        DataError: a step holds an end token, or two steps end with the same token.
    """
    text = join_steps(steps, separator, finished=finished)
    if finished:
        ids = encode_solution(text, ends, tokenizer)
    else:
        ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    if inner := set(ids[: len(ids) - finished]).intersection(ends.ids):
        raise place.error(
            f"a step has the end token {tokenizer.decode([min(inner)])!r}, which ends a response: take it out, or set "
            "data.end_tokens"
        )
    # Each step but the last has its separator.
    places = char_ends([step + separator for step in steps[:-1]])
    last = [*token_ends(text, places, ids[: len(ids) - finished], tokenizer), len(ids) - 1]
    for number, (one, two) in enumerate(pairwise(last)):
        if one >= two:
            raise place.error(f"steps {number} and {number + 1} (from 0) end with the same token: make them one step")
    return ids, tuple(last)


def _read(source: StepFileConfig, split: str) -> Iterator[tuple[Place, StepRow]]:
    """The rows of a file, whatever its format."""
    parse: Callable[[dict[str, Any], Place, StepFileConfig], list[StepRow]] | None = None
    for _, place, row in read_rows(source, split):
        if parse is None:
            parse = _FORMATS[_format_of(row) if source.format == "auto" else source.format]
        for parsed in parse(row, place, source):
            yield place, parsed


def _format_of(row: dict[str, Any]) -> str:
    if isinstance(row.get("input"), str) and isinstance(row.get("label"), str):
        return "math_shepherd"
    if isinstance(row.get("question"), dict) and isinstance(row.get("label"), dict):
        return "prm800k"
    return "trl"


def _trl(row: dict[str, Any], place: Place, source: StepFileConfig) -> list[StepRow]:
    """TRL's stepwise supervision: a prompt, a list of steps, and a label for each of them."""
    prompt = place.value(row, source.prompt_column, "data.steps.prompt_column")
    steps = place.value(row, source.steps_column, "data.steps.steps_column")
    labels = place.value(row, source.labels_column, "data.steps.labels_column")
    for name, values in ((source.steps_column, steps), (source.labels_column, labels)):
        if not isinstance(values, list) or not values:
            raise place.error(f"{name!r} holds {shown(values)}, expected a list with an entry for each step")
    if len(steps) != len(labels):
        raise place.error(
            f"{source.steps_column!r} has {len(steps)} steps, but {source.labels_column!r} has {len(labels)} labels"
        )
    texts = tuple(place.text(step, f"{source.steps_column}.{i}") for i, step in enumerate(steps))
    chances = tuple(_label(label, place, f"{source.labels_column}.{i}") for i, label in enumerate(labels))
    finished = row.get("finished", source.finished)
    if not isinstance(finished, bool):
        raise place.error(f"'finished' is {shown(finished)}, expected true or false")
    return [StepRow(prompt, texts, chances, finished)]


def _label(value: Any, place: Place, name: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise place.error(
            f"{name!r} is {shown(value)}, expected true, false, a number from 0 to 1, or null where a step has no label"
        )
    return float(value)


def _math_shepherd(row: dict[str, Any], place: Place, source: StepFileConfig) -> list[StepRow]:
    """Math-Shepherd's files: `input` is the question and the steps, each followed by a tag; `label` is the same text
    with + or - in place of each tag."""
    tag = source.tag
    text = place.text(place.value(row, "input", "data.steps.format"), "input")
    labelled = place.text(place.value(row, "label", "data.steps.format"), "label")
    *parts, rest = text.split(tag)
    if not parts:
        raise place.error(f"'input' has no tag {tag!r} behind its steps (data.steps.tag)")
    if rest.strip():
        raise place.error(f"'input' goes on after the last tag {tag!r}: {shown(rest.strip())}")
    labels, position = [], 0
    for number, part in enumerate(parts):
        position += len(part)
        sign = labelled[position : position + 1]
        if labelled[position - len(part) : position] != part or sign not in ("+", "-"):
            raise place.error(
                f"'label' is not 'input' with + or - in place of each {tag!r}: they differ at step {number} (from 0), "
                f"where 'label' goes on with {shown(labelled[max(0, position - len(part)) : position + 1][-20:])}"
            )
        labels.append(float(sign == "+"))
        position += 1
    if labelled[position:].strip() != rest.strip():
        raise place.error(f"'label' goes on after the last sign: {shown(labelled[position:].strip())}")
    start = parts[0].rfind("Step 1:")
    if start < 0 or not parts[0][:start].strip():
        raise place.error(
            "'input' has no question with 'Step 1:' behind it, so that question and steps are not told apart"
        )
    question, steps = parts[0][:start].strip(), [parts[0][start:], *parts[1:]]
    if empty := [i for i, step in enumerate(steps) if not step.strip()]:
        raise place.error(f"step {empty[0]} (from 0) of 'input' is empty")
    return [StepRow(question, tuple(step.strip() for step in steps), tuple(labels), source.finished)]


def _prm800k(row: dict[str, Any], place: Place, source: StepFileConfig) -> list[StepRow]:
    """PRM800K's rows. The chosen completions, or a human's, are the response. Where none was chosen, each alternative
    ends a response of its own, which repeats no label of the steps before."""
    prompt = place.value(row, "question.problem", "data.steps.format")
    entries = place.value(row, "label.steps", "data.steps.format")
    if not isinstance(entries, list):
        raise place.error(f"'label.steps' is {shown(entries)}, expected a list of steps")
    texts, labels = list[str](), list[float | None]()
    for number, entry in enumerate(entries):
        name = f"label.steps.{number}"
        if not isinstance(entry, dict):
            raise place.error(f"{name!r} is {shown(entry)}, expected an object with completions")
        options = entry.get("completions") or []
        chosen, human = entry.get("chosen_completion"), entry.get("human_completion")
        if chosen is None and human is None:
            rated = [_rated(option, place, f"{name}.completions.{i}") for i, option in enumerate(options)]
            ways = [
                StepRow(prompt, (*texts, text), (*_first(i, labels), label), False)
                for i, (text, label) in enumerate(rated)
            ]
            return ways or [StepRow(prompt, tuple(texts), tuple(labels), False)] * bool(texts)
        if chosen is None:
            text, label = _rated(
                human if isinstance(human, dict) else {"text": human}, place, f"{name}.human_completion"
            )
            label = 1.0 if label is None else label
        else:
            if not isinstance(chosen, int) or not 0 <= chosen < len(options):
                raise place.error(
                    f"'{name}.chosen_completion' is {shown(chosen)}, expected one of {len(options)} places"
                )
            text, label = _rated(options[chosen], place, f"{name}.completions.{chosen}")
        texts.append(text)
        labels.append(label)
    finished = place.value(row, "label.finish_reason", "data.steps.format") == "solution"
    return [StepRow(prompt, tuple(texts), tuple(labels), finished)] * bool(texts)


def _first(index: int, labels: list[float | None]) -> list[float | None]:
    return labels if index == 0 else [None] * len(labels)


def _rated(value: Any, place: Place, name: str) -> tuple[str, float | None]:
    """The text of a completion, and its label."""
    if not isinstance(value, dict):
        raise place.error(f"{name!r} is {shown(value)}, expected an object with text and rating")
    rating = value.get("rating")
    if rating is not None and rating not in _RATINGS:
        raise place.error(f"'{name}.rating' is {shown(rating)}, expected -1, 0, 1 or null")
    return place.text(value.get("text"), f"{name}.text"), None if rating is None else _RATINGS[rating]


_FORMATS = {"trl": _trl, "math_shepherd": _math_shepherd, "prm800k": _prm800k}
