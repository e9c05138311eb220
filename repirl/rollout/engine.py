"""What the dual loop needs of a sampler, whatever runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from repirl.config import RunError

if TYPE_CHECKING:
    from repirl.learner import Learner


class EngineError(RunError):
    """An engine does not sample from the weights that it was given, or does not answer at all."""


class MismatchError(EngineError):
    """What was sampled does not come from the policy. It is found by all processes alike."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy. end_ids: the tokens that end a response (kept in it)."""

    max_response_tokens: int
    temperature: float
    end_ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """token_ids: the response, with its end token if it ended; logprobs: of each under the sampler."""

    token_ids: list[int]
    logprobs: list[float]
    ended: bool


class Engine(Protocol):
    """Tokens in, tokens out."""

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """One response a prompt. A response depends on its prompt, its seed, the weights and the sampling only."""
        ...

    def update_weights(self, policy: Learner) -> None:
        """Sample from the policy's present weights from now on. EngineError where that cannot be made sure."""
        ...

    def sleep(self) -> None:
        """Give back what memory can be given back until `wake`; a sleeping engine generates nothing."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """End whatever the engine started. It is not used afterwards."""
        ...


def sequence_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (run seed, step, prompt, sample): neighbouring keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
