"""Completions of responses that have begun, judged as whole responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from repirl.config import Config, RunError
from repirl.data.split import Steps
from repirl.data.text import find_end_tokens
from repirl.learner import Learner
from repirl.rollout.engine import Engine, Response, Sampling, sequence_seed
from repirl.verify.choose import AnyVerifier

# A completion's longest length is rounded down to a multiple of this share of the longest response, so that many
# completions have the same one: those are sampled side by side.
_SHARES = 16


@dataclass(frozen=True)
class Request:
    """One completion that is asked for.

    Args:
        prompt_ids: the prompt's tokens.
        prefix: the response's first tokens; none asks for a whole response.
        answer: the right answer.
        key: what the seed is made of, beside the run's seed.
    """

    prompt_ids: tuple[int, ...]
    prefix: tuple[int, ...]
    answer: str
    key: tuple[int, ...]


@dataclass(frozen=True)
class Trajectory:
    """A whole response.

    Args:
        token_ids: all of them, the prefix included.
        ended: whether the last one is an end token.
        outcome: the verdict, from 0 (wrong) to 1 (right).
        num_sampled: how many of the tokens were sampled for it.
        steps: where its steps end, if the data says it.
    """

    token_ids: tuple[int, ...]
    ended: bool
    outcome: float
    num_sampled: int = 0
    steps: Steps | None = None


class Completer:
    """Samples completions from a policy that does not change, and judges them.

    All processes call the same methods with the same arguments, and get the same results.

    Args:
        config: the run's configuration.
        policy: the learner whose weights are sampled from.
        tokenizer: turns responses into text for the verifier.
        engine: samples. `close` also closes it.
        verifier: judges. `close` also closes it.
    """

    def __init__(
        self,
        config: Config,
        policy: Learner,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        verifier: AnyVerifier,
    ) -> None:
        self.config, self.tokenizer, self.engine, self.verifier = config, tokenizer, engine, verifier
        self.world = policy.world
        self._end_ids = find_end_tokens(config.data, tokenizer, config.policy.model).ids
        engine.wake()
        engine.update_weights(policy)

    def complete(self, requests: Sequence[Request]) -> list[Trajectory]:
        """Sample a completion for each request, at `rollout.temperature`, and judge it with what it completes.

        A response may have `rollout.max_response_tokens` in all. One completion depends on its request alone, but for
        rounding: which others are sampled with it changes the last bits of log-probabilities.
        """
        limits = [self._limit(len(request.prefix)) for request in requests]
        # All completions of a prefix go to one process, which then computes the prefix only once.
        place: dict[tuple[int, ...], int] = {}
        shares = [place.setdefault((*r.prompt_ids, *r.prefix), len(place)) % self.world.size for r in requests]
        mine = list[tuple[int, Response]]()
        for limit in sorted(set(limits)):
            chosen = [i for i, share in enumerate(shares) if limits[i] == limit and share == self.world.rank]
            responses = self.engine.generate(
                [[*requests[i].prompt_ids, *requests[i].prefix] for i in chosen],
                [sequence_seed(self.config.seed, "label", *requests[i].key) for i in chosen],
                Sampling(limit, self.config.rollout.temperature, self._end_ids),
            )
            mine += zip(chosen, responses, strict=True)
        sampled = [response for _, response in sorted(self.world.gather(mine), key=lambda item: item[0])]
        whole = [(*r.prefix, *response.token_ids) for r, response in zip(requests, sampled, strict=True)]
        outcomes = self.judge(
            [(ids, response.ended) for ids, response in zip(whole, sampled, strict=True)], [r.answer for r in requests]
        )
        return [
            Trajectory(ids, response.ended, outcome, len(response.token_ids))
            for ids, response, outcome in zip(whole, sampled, outcomes, strict=True)
        ]

    def _limit(self, prefix: int) -> int:
        """How many tokens may follow a prefix of so many."""
        longest = self.config.rollout.max_response_tokens
        left, unit = longest - prefix, max(1, longest // _SHARES)
        return left // unit * unit or left

    def judge(self, responses: Sequence[tuple[Sequence[int], bool]], answers: Sequence[str]) -> list[float]:
        """The verdict on each response (its tokens, and whether the last one is an end token).

        Raises:
            RunError: a verdict is not from 0 to 1; as a share of right completions it would mean nothing.
        """
        mine = range(len(responses))[self.world.rank :: self.world.size]
        pairs = [(self._text(*responses[i]), answers[i]) for i in mine]
        verdicts = self.verifier.judge(pairs)
        for verdict, (_, answer) in zip(verdicts, pairs, strict=True):
            if not 0 <= verdict <= 1:
                raise RunError(
                    f"the verifier says {verdict:g} of a response to the answer {answer!r:.60}; labels are shares of "
                    "right completions, so its verdicts have to be numbers from 0 (wrong) to 1 (right)"
                )
        everybodys = self.world.gather(list(zip(mine, verdicts, strict=True)))
        return [verdict for _, verdict in sorted(everybodys)]

    def _text(self, token_ids: Sequence[int], ended: bool) -> str:
        # The end token is cut off here: `skip_special_tokens` leaves it in if the tokenizer does not call it special.
        return str(self.tokenizer.decode(list(token_ids[: len(token_ids) - ended]), skip_special_tokens=True))

    def close(self) -> None:
        """Close the engine and the verifier."""
        self.engine.close()
        self.verifier.close()
