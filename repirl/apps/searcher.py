"""What `repirl search` samples, scores and chooses: options, rows, and the search of a few rows side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from repirl.apps.beams import Beam, SearchedPrompt, SearchResult, SearchShape, search_steps
from repirl.apps.best_of import choose
from repirl.apps.prompt_rows import PromptRow
from repirl.apps.score import AGGREGATES, Aggregate, aggregate_by
from repirl.apps.solutions import Solution, encode, score_encoded
from repirl.apps.trained import Placed
from repirl.config import ConfigError
from repirl.data.responses import decode_response
from repirl.data.text import EndTokens
from repirl.options import VerifierConfig
from repirl.prm import PRM
from repirl.rollout.steps import Begun, StepSampler
from repirl.verify.canonical import canonical_answer
from repirl.verify.choose import AnyVerifier

# How one of several responses is chosen.
CHOICES = {"best_of_n": "best by the PRM", "majority": "majority vote", "weighted": "weighted vote", "oracle": "oracle"}


@dataclass(frozen=True)
class SearchOptions:
    """How responses are searched for.

    Args:
        shape: beam search or DVTS, how wide and how long.
        temperature: of sampling.
        max_tokens: of a response; None for the 3000 of training or, if it is less, what the model has positions for.
        separator: what ends a step; None for the separator in the PRM's description.
        aggregate: how step scores become the score of a response, a key of repirl.apps.score.AGGREGATES; None for what
            the PRM's description says.
        baseline: also sample whole responses to each prompt, until they have as many tokens as its search.
        prompt, answer: which columns hold them. Without `answer`, where that is the name, nothing is right or wrong.
        vote_temperature: of the weighted vote: weights are softmax(score / temperature).
        seed: of sampling.
        prompts: that are searched side by side.
        verifier: judges responses.
        placed: how the PRM is loaded, and how many tokens a batch of it may hold. The policy gets its kind of device.
    """

    shape: SearchShape = field(default_factory=SearchShape)
    temperature: float = 0.8
    max_tokens: int | None = None
    separator: str | None = None
    aggregate: str | None = None
    baseline: bool = False
    prompt: str = "prompt"
    answer: str = "answer"
    vote_temperature: float = 1.0
    seed: int = 0
    prompts: int = 8
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    placed: Placed = field(default_factory=Placed)

    def __post_init__(self) -> None:
        if self.aggregate is not None and self.aggregate not in AGGREGATES:
            raise ConfigError(f"--aggregate is {self.aggregate!r}, expected one of {', '.join(AGGREGATES)}")
        for option, value in {"temperature": self.temperature, "vote-temperature": self.vote_temperature}.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"--{option} is {value}, expected a number above 0")
        if self.prompts < 1:
            raise ConfigError(f"--prompts-per-batch is {self.prompts}, expected at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens is {self.max_tokens}, expected at least 1")
        if self.separator == "":
            raise ConfigError("--separator is empty, expected a text that ends each step, newline or blank-line")


@dataclass
class Searcher:
    """All that a search needs. end: what ends a response of the policy; aggregate: a key of AGGREGATES."""

    sampler: StepSampler
    prm: PRM
    verifier: AnyVerifier
    ends: EndTokens
    options: SearchOptions

    def __post_init__(self) -> None:
        self.aggregate = aggregate_by(self.prm, self.options.aggregate)

    def search(self, rows: Sequence[PromptRow]) -> list[SearchResult]:
        """Search for responses to the prompts of a few rows, side by side."""

        def score(beams: Sequence[tuple[int, Beam]]) -> list[tuple[tuple[float, ...], float]]:
            return self.score([rows[i] for i, _ in beams], [beam for _, beam in beams])

        prompts = [SearchedPrompt(row.number, row.token_ids) for row in rows]
        return search_steps(prompts, self.sampler.continued, score, self.options.shape)

    def score(self, rows: Sequence[PromptRow], beams: Sequence[Beam]) -> list[tuple[tuple[float, ...], float]]:
        """Step scores of each beam, by its text as `repirl score` reads it, and their aggregate; see
        `score_responses`."""
        responses = [
            Solution(row.place, {}, row.prompt, self.text(beam), beam.ended)
            for row, beam in zip(rows, beams, strict=True)
        ]
        return score_responses(self.prm, responses, self.aggregate, self.options.placed.tokens)

    def text(self, beam: Beam) -> str:
        return decode_response(beam.token_ids, self.ends, self.sampler.tokenizer)

    def baseline(self, rows: Sequence[PromptRow], budgets: Sequence[int]) -> list[list[Beam]]:
        """Whole responses to each prompt, in the order of their seeds, up to the one that reaches the budget."""
        sampled: list[list[Beam]] = [[] for _ in rows]

        def missing(i: int) -> int:
            """How many more are likely to reach the budget."""
            used = sum(len(beam.token_ids) for beam in sampled[i])
            if used >= budgets[i]:
                return 0
            return math.ceil((budgets[i] - used) * len(sampled[i]) / used) if used else self.options.shape.beams

        while any(counts := [missing(i) for i in range(len(rows))]):
            asked = [
                (i, ("whole", rows[i].number, len(sampled[i]) + k))
                for i, count in enumerate(counts)
                for k in range(count)
            ]
            begun = [Begun(rows[i].token_ids, (), key, whole=True) for i, key in asked]
            for (i, _), new in zip(asked, self.sampler.continued(begun), strict=True):
                sampled[i].append(Beam(new.token_ids, ended=new.ended, finished=True))
        for i, budget in enumerate(budgets):
            while len(sampled[i]) > 1 and sum(len(beam.token_ids) for beam in sampled[i][:-1]) >= budget:
                sampled[i].pop()
        flat = [(i, beam) for i, beams in enumerate(sampled) for beam in beams]
        scored = iter(self.score([rows[i] for i, _ in flat], [beam for _, beam in flat]))
        for beams in sampled:
            beams[:] = [
                dataclasses.replace(beam, steps=s, score=v) for beam, (s, v) in zip(beams, scored, strict=False)
            ]
        return sampled

    def judged(self, row: PromptRow, beams: Sequence[Beam]) -> tuple[dict[str, Any], dict[str, bool]]:
        """The columns `response`, `finished`, `score`, `right` and `chosen` of what is chosen among the beams, and
        whether it is right, by the key of CHOICES."""
        texts = [self.text(beam) for beam in beams]
        scores = [beam.score for beam in beams]
        answers = [canonical_answer(text) for text in texts]
        # Without any score votes have equal weights.
        scores = scores if max(scores) > -math.inf else [0.0] * len(scores)
        chosen = choose(scores, answers, self.options.vote_temperature)
        best = chosen["best_of_n"]
        line = {"response": texts[best], "finished": beams[best].ended, "score": shown_number(beams[best].score)}
        if row.answer is None:
            return line, {}
        verdicts = self.verifier.judge([(text, row.answer) for text in texts])
        right = {name: verdicts[i] > 0.5 for name, i in chosen.items()} | {"oracle": any(v > 0.5 for v in verdicts)}
        return line | {"right": right["best_of_n"], "chosen": right}, right


def score_responses(
    prm: PRM, responses: Sequence[Solution], aggregate: Aggregate, tokens: int
) -> list[tuple[tuple[float, ...], float]]:
    """Step scores of each response, and their aggregate. A beginning without text has no steps, and the lowest score.

    Args:
        prm: the PRM.
        responses: given as text.
        aggregate: of step scores.
        tokens: in one batch at most; a longer response has one of its own.

    Raises:
        DataError: a response is longer than the PRM's window.
        RunError: a reward is not finite.
    """
    places = [i for i, one in enumerate(responses) if one.finished or one.response]
    encoded = [encode(responses[i], prm, None) for i in places]
    scores: list[tuple[tuple[float, ...], float]] = [((), -math.inf)] * len(responses)
    for number, scored in score_encoded(prm, encoded, tokens):
        steps = tuple(float(str(value)) for value in scored.steps.numpy())
        scores[places[number]] = (steps, aggregate(steps))
    return scores


def shown_number(score: float) -> float | None:
    """A score as JSON has it; None for the one of a beginning without text."""
    return score if math.isfinite(score) else None
