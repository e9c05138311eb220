"""The interface of all sampling engines, and the values that go in and out of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from repirl.config import RunError

if TYPE_CHECKING:
    from repirl.learner import Learner


class EngineError(RunError):
    """An engine samples from other weights than the given ones, or does not answer."""


class MismatchError(EngineError):
    """The sampled tokens do not come from the policy. All processes raise this error together."""


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Args:
        max_response_tokens: a response is cut off after so many tokens.
        temperature: logits are divided by it; 0 means greedy decoding.
        end_ids: the tokens that end a response. The end token is part of the response.
    """

    max_response_tokens: int
    temperature: float
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Args:
        token_ids: the tokens, with the end token if there is one.
        logprobs: each token's log-probability under the sampler, in nats.
        ended: whether an end token ended it; False if it reached the length limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    ended: bool


class Engine(Protocol):
    """Samples responses to prompts. Prompts and responses are lists of token ids."""

    @property
    def has_weights(self) -> bool:
        """Whether it has the weights of the last `update_weights`. `sleep` may give them up."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """Sample one response for each prompt.

        Args:
            prompts: token ids, at least one in each prompt.
            seeds: one for each prompt.
            sampling: temperature, length limit and end tokens.

        Returns:
            The responses in the order of the prompts. A response depends only on its prompt, its seed, the weights and
            `sampling`, not on the other prompts.
        """
        ...

    def update_weights(self, policy: Learner) -> None:
        """From now on, sample from the weights that the policy has at this moment.

        Raises:
            EngineError: the engine does not have the new weights, or it is not certain that it has them.
        """
        ...

    def sleep(self) -> None:
        """Free as much memory as possible until `wake`. A sleeping engine cannot generate."""
        ...

    def wake(self) -> None:
        """Undo `sleep`, but for weights that were given up: then `update_weights` comes next."""
        ...

    def close(self) -> None:
        """Stop everything that the engine started. The engine must not be used afterwards."""
        ...


def sequence_seed(*key: int | str) -> int:
    """Make a seed from a key such as (run seed, step, prompt, sample).

    Returns:
        An integer in [0, 2^63). Keys that differ little give unrelated seeds.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
