"""Prompts with their right answers and responses, whose steps are to be labelled."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.config import Config
from repirl.data.answers import read_answer
from repirl.data.prompts import LengthLimit, read_prompt
from repirl.data.sources import read_rows
from repirl.data.split import Steps, char_ends, split_steps, token_ends
from repirl.data.text import EndTokens, encode_solution, find_end_tokens
from repirl.data.values import Place, shown


@dataclass(frozen=True)
class GivenResponse:
    """A response of the data.

    Args:
        token_ids: its tokens, an end token at the end.
        steps: its steps.
    """

    token_ids: tuple[int, ...]
    steps: Steps


@dataclass(frozen=True)
class Problem:
    """A row whose responses are to be labelled.

    Args:
        index: its row number, from 0.
        prompt: as the data has it: text or messages.
        prompt_ids: its tokens.
        answer: the right one.
        responses: those to label; none where they are to be sampled.
    """

    index: int
    prompt: Any
    prompt_ids: tuple[int, ...]
    answer: str
    responses: tuple[GivenResponse, ...]


def load_problems(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Rows of `data.train`, with the responses of `label.response_column` or `label.steps_column` if one is set.

    Raises:
        DataError: for files, rows and lengths that do not fit; it names the row.
    """
    data, options = config.data, config.label
    assert data.train is not None
    assert data.answer_column is not None
    limit, ends = LengthLimit(data), find_end_tokens(data, tokenizer, config.policy.model)
    problems = list[Problem]()
    for number, place, row in read_rows(data.train, "train"):
        if len(problems) == options.num_prompts:
            break
        prompt_ids = read_prompt(row, place, data.prompt_column, "data.prompt_column", data, tokenizer)
        prompt = place.value(row, data.prompt_column, "data.prompt_column")
        answer = read_answer(row, place, data.answer_column, "data.answer_column", data)
        given = list[list[str]]()
        if (column := options.response_column) is not None:
            value = place.value(row, column, "label.response_column")
            given = [split_steps(text, data.step_separator) for text in place.solutions(value, column)]
        elif (column := options.steps_column) is not None:
            given = [_listed(place.value(row, column, "label.steps_column"), place, column, data.step_separator)]
        responses = tuple(_encode(steps, place, ends, tokenizer) for steps in given)
        fits = limit.allows(len(prompt_ids), place, "prompt", "data.max_prompt_tokens", data.max_prompt_tokens)
        longest, option = config.rollout.max_response_tokens, "rollout.max_response_tokens"
        kept = tuple(
            r for r in responses if fits and limit.allows(len(r.token_ids), place, "response", option, longest)
        )
        if fits and (kept or not responses):
            problems.append(Problem(number, prompt, prompt_ids, answer, kept))
    limit.report(data.train.path, len(problems))
    return problems


def _listed(value: Any, place: Place, column: str, separator: str) -> list[str]:
    """The texts of steps that the data gives as a list, with their separators."""
    if not isinstance(value, list) or not value:
        raise place.error(f"{column!r} holds {shown(value)}, expected a list with the text of each step")
    texts = [place.text(step, f"{column}.{number}") for number, step in enumerate(value)]
    return [*(step + separator for step in texts[:-1]), texts[-1]]


def _encode(texts: list[str], place: Place, ends: EndTokens, tokenizer: PreTrainedTokenizerBase) -> GivenResponse:
    text = "".join(texts)
    ids = encode_solution(text, ends, tokenizer)
    if len(ids) == 1:
        raise place.error("a response has no tokens")
    if inner := set(ids[:-1]).intersection(ends.ids):
        raise place.error(f"a response goes on after the end token {tokenizer.decode([min(inner)])!r}: cut it off")
    last = [*token_ends(text, char_ends(texts[:-1]), ids[:-1], tokenizer), len(ids) - 1]
    if any(two <= one for one, two in pairwise(last)):
        raise place.error("two steps of a response end with the same token: make them one step")
    return GivenResponse(ids, Steps(tuple(texts), tuple(last)))
