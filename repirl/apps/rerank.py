"""`repirl rerank`: best-of-N by a trained PRM, beside voting, from one set of samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from repirl.apps.best_of import best_of_n, choose, mean_and_error, pass_at_n, subsets, votes
from repirl.apps.lines import write_json
from repirl.apps.score import AGGREGATES, Progress, aggregate_by, aggregate_of
from repirl.apps.solutions import Solution, as_source, encode, score_encoded
from repirl.apps.trained import Placed, trained_prm
from repirl.config import ConfigError
from repirl.data.answers import answer_of
from repirl.data.sources import read_rows
from repirl.data.values import Place, shown
from repirl.dataconfig import SourceConfig
from repirl.options import VerifierConfig
from repirl.output_path import JSON, check_file
from repirl.verify.canonical import canonical_answer
from repirl.verify.choose import make_verifier

METHODS = {"best_of_n": "best of N", "majority": "majority vote", "weighted": "weighted vote", "oracle": "oracle"}
# A sum of steps prefers long responses.
CHOICES = tuple(name for name in AGGREGATES if name != "sum")


@dataclass(frozen=True)
class RerankOptions:
    """How samples are read, scored and chosen from.

    Args:
        prompt, answer, score: which columns hold them.
        aggregate: how step scores become the score of a response, one of CHOICES; None for what the PRM's description
            says, which is the mean of its steps for PRMs of rePIRL.
        temperature: of the weighted vote: weights are softmax(score / temperature) over the N responses.
        subsets: of N responses to a prompt, drawn for votes where there are more.
        seed: of these draws.
        verifier: judges responses of rows that have neither `verdict` nor `outcome`.
        placed: how the PRM is loaded, and how many tokens a batch may hold.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    score: str = "score"
    aggregate: str | None = None
    temperature: float = 1.0
    subsets: int = 200
    seed: int = 0
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    placed: Placed = field(default_factory=Placed)

    def __post_init__(self) -> None:
        if self.aggregate is not None and self.aggregate not in CHOICES:
            raise ConfigError(f"--aggregate is {self.aggregate!r}, expected one of {', '.join(CHOICES)}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"--temperature is {self.temperature}, expected a number above 0")
        if self.subsets < 1:
            raise ConfigError(f"--subsets is {self.subsets}, expected at least 1")


@dataclass
class Sample:
    """A response of the input. row: all columns of one response. score, right: None where they are not known yet."""

    place: Place
    row: dict[str, Any]
    prompt: Any
    response: str
    answer: str | None
    score: float | None
    right: bool | None
    vote: Hashable | None


def rerank(
    source: str | os.PathLike | SourceConfig,
    output: str | os.PathLike | None = None,
    *,
    prm: str | os.PathLike | None = None,
    options: RerankOptions | None = None,
) -> dict[str, Any]:
    """Choose among the responses to each prompt, and say how often a right one is chosen, for N = 1, 2, 4, ...
    responses.

    Rows hold `prompt` and either `response`, one row a response (as `repirl sample` and `repirl score` write them), or
    `responses`, a list. `score`, or with `responses` a list `scores`, is used where it is there, else the PRM scores.
    Whether a response is right is said by `verdict` or `outcome` (with `responses` lists, `verdicts` or `outcomes`;
    right above 0.5), else by the verifier from `answer`. Without any of them nothing is right or wrong, and only what
    was chosen is said. Rows with one prompt and one answer belong together.

    Of a prompt with n responses, best of N and oracle (pass@N) are exact means over all subsets of N responses, votes
    over all of them or over drawn ones (`options.subsets`): unbiased, with all samples used for each N. Errors are
    standard errors over prompts. Responses vote by what repirl.verify.canonical makes of their final answers; those
    that mark none do not vote.

    Args:
        source: a file (JSON lines, CSV or Parquet), or a data set of the hub ("owner/name:split").
        output: JSON file to write, with what is returned.
        prm: an exported PRM, or a run's folder or step_N folder; needed where rows have no scores.
        options: how; None for the defaults.

    Returns:
        `results`: for each N `n` and, by method (METHODS), `mean` and `error` (None for one prompt); empty where
        nothing is right or wrong · `chosen`: for each prompt, of all its responses, what `best_of_n`, `majority` and
        `weighted` choose · `prompts`, `responses`, `without_answer` (responses that do not vote): counts · `fewest`,
        `most`: responses to a prompt · `options`: what the figures depend on.

    Raises:
        ConfigError: rows, models or options that cannot be used, or an output that exists.
        RunError: the output cannot be written, the verifier fails, or a reward is not finite.
    """
    options = options or RerankOptions()
    source = source if isinstance(source, SourceConfig) else as_source(os.fspath(source))
    if output is not None:
        check_file(output, JSON, [source.path])
    samples = read_samples(source, options)
    how = _score(samples, prm, options)
    is_judged = _judge(samples, options)
    groups = list(_by_prompt(samples).values())
    counts = [len(group) for group in groups]
    result: dict[str, Any] = {
        "prompts": len(groups),
        "responses": len(samples),
        "fewest": min(counts),
        "most": max(counts),
        "without_answer": sum(sample.vote is None for sample in samples),
        "options": how | {"temperature": options.temperature, "subsets": options.subsets, "seed": options.seed},
        "results": _results(groups, options) if is_judged else [],
        "chosen": [_chosen(group, options.temperature) for group in groups],
    }
    if output is not None:
        write_json(output, result)
    return result


def read_samples(source: SourceConfig, options: RerankOptions) -> list[Sample]:
    """The responses of a file. DataError, which names the row, for what is none."""
    samples = []
    for _, place, row in read_rows(source, "train"):
        prompt = place.prompt(place.value(row, options.prompt, "--prompt-column"), options.prompt)
        for one in _single(row, place, options.score):
            response = one.get("response")
            if not (isinstance(response, str) and not response.strip()):
                response = place.text(response, "response")
            score = None if one.get(options.score) is None else _score_of(one[options.score], place, options.score)
            named = next((name for name in ("verdict", "outcome") if one.get(name) is not None), None)
            right = None if named is None else _number(one[named], place, named) > 0.5
            answer = _answer(one, place, options)
            samples.append(Sample(place, one, prompt, response, answer, score, right, canonical_answer(response)))
    return samples


def _single(row: dict[str, Any], place: Place, score: str) -> list[dict[str, Any]]:
    """A row with one response, or the rows that one with a list of them stands for."""
    if "response" in row or "responses" not in row:
        if "response" not in row:
            raise place.error(
                f"there is neither 'response' (text) nor 'responses' (a list of texts), but {sorted(map(str, row))}"
            )
        return [row]
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise place.error(f"'responses' is {shown(responses)}, expected a list of texts")
    singles = [{**row, "response": response} for response in responses]
    for name in (score, "verdict", "outcome"):
        values = row.get(many := f"{name}s")
        if values is None:
            continue
        if not isinstance(values, list) or len(values) != len(responses):
            raise place.error(
                f"{many!r} is {shown(values)}, expected a list of {len(responses)}, one for each response"
            )
        singles = [{**single, name: value} for single, value in zip(singles, values, strict=True)]
    return singles


def _score_of(value: Any, place: Place, column: str) -> float:
    """A number that is no verdict."""
    if isinstance(value, bool):
        raise place.error(f"{column!r} is {shown(value)}, expected a number: a verdict is no score")
    return _number(value, place, column)


def _number(value: Any, place: Place, column: str) -> float:
    if isinstance(value, str):
        # As in CSV.
        try:
            value = float(value)
        except ValueError as error:
            raise place.error(f"{column!r} is {shown(value)}, expected a number") from error
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise place.error(f"{column!r} is {shown(value)}, expected a finite number")
    return float(value)


def _answer(row: dict[str, Any], place: Place, options: RerankOptions) -> str | None:
    column = options.answer
    if column == "answer" and row.get("answer") is None:
        return None
    return answer_of(row, place, column, "--answer-column", tests=options.verifier.kind == "code")


def _score(samples: Sequence[Sample], prm: str | os.PathLike | None, options: RerankOptions) -> dict[str, Any]:
    """Fill in the scores; returns where they come from."""
    without = [sample for sample in samples if sample.score is None]
    if not without:
        if options.aggregate is not None:
            raise ConfigError(
                f"--aggregate {options.aggregate} makes scores of steps' scores, but the rows have a {options.score!r} "
                "already: leave it out, or the column"
            )
        return {"scores": f"column {options.score!r}"}
    place, is_there = without[0].place, any(options.score in sample.row for sample in without)
    if len(without) < len(samples):
        lack = f"{options.score!r} is null" if options.score in without[0].row else f"there is no {options.score!r}"
        raise place.error(f"{lack}, but other rows have one: score all of them, or none")
    if prm is None:
        lack = f"is null in all rows of {place.source}" if is_there else f"is no column of {place.source}"
        raise ConfigError(f"{options.score!r} {lack}: give --prm DIR, or name another column by --score-column")
    with trained_prm(prm, options.placed) as (loaded, _):
        name, aggregate = options.aggregate or aggregate_of(loaded), aggregate_by(loaded, options.aggregate)
        encoded = [
            encode(Solution(s.place, s.row, s.prompt, s.response, _is_finished(s)), loaded, None) for s in samples
        ]
        with Progress("rerank", sum(map(len, encoded))) as progress:
            for i, scored in score_encoded(loaded, encoded, options.placed.tokens):
                samples[i].score = aggregate(scored.steps.tolist())
                progress.add(len(encoded[i]))
    return {"scores": f"PRM {os.fspath(prm)}", "aggregate": name}


def _is_finished(sample: Sample) -> bool:
    value = sample.row.get("finished", True)
    if not isinstance(value, bool):
        raise sample.place.error(f"'finished' is {shown(value)}, expected true or false")
    return value


def _judge(samples: Sequence[Sample], options: RerankOptions) -> bool:
    """Fill in what is right; returns whether anything can be."""
    without = [sample for sample in samples if sample.right is None]
    pairs = [(sample.response, sample.answer) for sample in without if sample.answer is not None]
    if len(pairs) < len(without):
        if len(without) == len(samples) and not pairs:
            return False
        place = next(sample.place for sample in without if sample.answer is None)
        raise place.error(f"there is neither 'verdict', 'outcome' nor {options.answer!r}, but other rows have one")
    with closing(make_verifier(options.verifier)) as verifier:
        for sample, reward in zip(without, verifier.judge(pairs), strict=True):
            sample.right = reward > 0.5
    return True


def _by_prompt(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(json.dumps([sample.prompt, sample.answer], sort_keys=True), []).append(sample)
    return groups


def _results(groups: Sequence[Sequence[Sample]], options: RerankOptions) -> list[dict[str, Any]]:
    sizes, fewest = [1], min(map(len, groups))
    while sizes[-1] * 2 <= fewest:
        sizes.append(sizes[-1] * 2)
    results = []
    for size in sizes + [fewest] * (fewest not in sizes):
        figures: dict[str, list[float]] = {method: [] for method in METHODS}
        for number, group in enumerate(groups):
            scores, right = _scores(group), [bool(sample.right) for sample in group]
            drawn = subsets(len(group), size, options.subsets, f"{options.seed} {number} {size}")
            answers = [sample.vote for sample in group]
            majority, weighted = votes(answers, scores, right, drawn, options.temperature)
            of_prompt = (best_of_n(scores, right, size), majority, weighted, pass_at_n(sum(right), len(group), size))
            for method, value in zip(METHODS, of_prompt, strict=True):
                figures[method].append(value)
        means = {method: mean_and_error(values) for method, values in figures.items()}
        results.append({"n": size} | {name: {"mean": m, "error": error} for name, (m, error) in means.items()})
    return results


def _scores(group: Sequence[Sample]) -> list[float]:
    return [sample.score for sample in group if sample.score is not None]


def _chosen(group: Sequence[Sample], temperature: float) -> dict[str, Any]:
    scores, answers = _scores(group), [sample.vote for sample in group]
    indices = choose(scores, answers, temperature)
    return {"prompt": group[0].prompt, "answer": group[0].answer} | {
        method: {"response": group[i].response, "score": scores[i], "right": group[i].right}
        for method, i in indices.items()
    }


def print_results(result: dict[str, Any]) -> None:
    """A table with a row for each N, and what the figures are of."""
    from repirl.report.display import print_table

    if result["results"]:
        rows = [[line["n"], *(_shown(**line[method]) for method in METHODS)] for line in result["results"]]
        print_table("Share of prompts answered right", ["N", *METHODS.values()], rows)
    else:
        print("no answers, outcomes or verdicts: what is right is not known")
    few, most = result["fewest"], result["most"]
    each = f"{few}" if few == most else f"{few} to {most}"
    print(f"{result['prompts']} prompts with {each} responses; scores: {result['options']['scores']}")
    if count := result["without_answer"]:
        print(f"{count} of {result['responses']} responses mark no final answer, and do not vote")


def _shown(mean: float, error: float | None) -> str:
    return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"
