"""Judging many responses at once, before a run: by all processes together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from repirl.distributed.world import World
from repirl.options import VerifierConfig
from repirl.verify.choose import make_verifier


def judge_all(config: VerifierConfig, world: World, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Judge responses, each process a part of them. All processes call this with the same pairs.

    Args:
        config: the verifier's options.
        world: the processes.
        pairs: (response, right answer).

    Returns:
        The reward of each, in order, the same on all processes.

    Raises:
        ConfigError, RunError: as of `Verifier.judge`.
    """
    mine = range(world.rank, len(pairs), world.size)
    with closing(make_verifier(config)) as verifier:
        rewards = verifier.judge([pairs[i] for i in mine])
    return [reward for _, reward in sorted(world.gather(list(zip(mine, rewards, strict=True))))]
