"""Step-level search: beam search and DVTS over the steps of responses, led by the scores of a PRM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from repirl.config import ConfigError
from repirl.rollout.steps import Begun, Continued

METHODS = {"beam": "beam search", "dvts": "diverse verifier tree search"}


@dataclass(frozen=True)
class SearchShape:
    """How wide and how long a search is.

    Args:
        method: a key of METHODS. "beam": one tree of all beams. "dvts": beams / width independent trees, in each of
            which one beam is kept (Beeching et al. 2024).
        beams: n, continued side by side in each round; of a tree or, with "dvts", of all trees.
        width: m, how often a beam that is kept is continued in the next round.
        max_steps: rounds. In the last one responses are continued to their end.
    """

    method: str = "beam"
    beams: int = 16
    width: int = 4
    max_steps: int = 40

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"--method is {self.method!r}, expected one of {', '.join(METHODS)}")
        for option, value in {"beams": self.beams, "width": self.width, "max-steps": self.max_steps}.items():
            if value < 1:
                raise ConfigError(f"--{option} is {value}, expected at least 1")
        if self.beams % self.width:
            raise ConfigError(
                f"--beams is {self.beams}, which --width {self.width} does not divide: beams / width beams are kept "
                "in each round; choose a multiple of the width"
            )

    @property
    def trees(self) -> int:
        """Independent searches of one prompt."""
        return self.beams // self.width if self.method == "dvts" else 1


@dataclass(frozen=True)
class Beam:
    """A response, or the beginning of one.

    Args:
        token_ids: its tokens.
        tree: in which tree it grew, from 0.
        ended: whether an end token ended it.
        finished: whether it is a whole response, ended or cut off at the length limit.
        steps: the score of each step.
        score: their aggregate.
    """

    token_ids: tuple[int, ...] = ()
    tree: int = 0
    ended: bool = False
    finished: bool = False
    steps: tuple[float, ...] = ()
    score: float = 0.0


@dataclass(frozen=True)
class SearchedPrompt:
    """A prompt that responses are searched for. number: of its row, which seeds depend on."""

    number: int
    token_ids: tuple[int, ...]


@dataclass
class SearchResult:
    """What the search of one prompt gave. beams: the finished ones, in the order in which they finished; tokens: that
    were sampled, in all beams, kept or not; rounds: how many it took."""

    beams: list[Beam] = field(default_factory=list)
    tokens: int = 0
    rounds: int = 0


# Continue responses; score beams, given with the index of their prompt: steps and aggregate of each.
Continue = Callable[[Sequence[Begun]], list[Continued]]
Score = Callable[[Sequence[tuple[int, Beam]]], list[tuple[tuple[float, ...], float]]]


def search_steps(
    prompts: Sequence[SearchedPrompt], continue_all: Continue, score: Score, shape: SearchShape
) -> list[SearchResult]:
    """Search for responses to each prompt, all prompts side by side.

    In each round every beam of a tree is continued by one step, and all are scored. Finished beams are set aside, and
    do not compete again. Of the others the best are kept, n / m of the n beams of a tree (with "dvts" one of the m of a
    tree), and each of these is continued m times in the next round. So a tree whose other beams have finished goes on
    with fewer than n. It is done when no beam is left.

    Args:
        prompts: the prompts.
        continue_all: continues responses by a step; what it gives may depend on each response and its key only.
        score: scores beams. The higher score is the better one; of equal ones the beam that was sampled first.
        shape: of the search.

    Returns:
        For each prompt, in order, the finished beams. They are not filled up to n by copies where fewer finished.
    """
    results = [SearchResult() for _ in prompts]
    size = shape.beams // shape.trees
    # Prompt and beam; in the order of prompts and trees.
    growing = [(i, Beam(tree=tree)) for i in range(len(prompts)) for tree in range(shape.trees) for _ in range(size)]
    for step in range(shape.max_steps):
        grown = _continued(prompts, growing, continue_all, step, whole=step + 1 == shape.max_steps)
        for (i, before), (_, beam) in zip(growing, grown, strict=True):
            results[i].tokens += len(beam.token_ids) - len(before.token_ids)
            results[i].rounds = step + 1
        scored = [
            (i, Beam(beam.token_ids, beam.tree, beam.ended, beam.finished, steps, value))
            for (i, beam), (steps, value) in zip(grown, score(grown), strict=True)
        ]
        trees: dict[tuple[int, int], list[Beam]] = {}
        for i, beam in scored:
            if beam.finished:
                results[i].beams.append(beam)
            else:
                trees.setdefault((i, beam.tree), []).append(beam)
        kept = [
            (i, beam)
            for (i, _), beams in sorted(trees.items())
            for beam in sorted(beams, key=lambda beam: -beam.score)[: size // shape.width]
        ]
        if not kept:
            break
        growing = [(i, beam) for i, beam in kept for _ in range(shape.width)]
    return results


def _continued(
    prompts: Sequence[SearchedPrompt],
    growing: Sequence[tuple[int, Beam]],
    continue_all: Continue,
    step: int,
    whole: bool,
) -> list[tuple[int, Beam]]:
    """Continue all beams; the seeds of each depend on its row, its tree, the round, and its place in the tree."""
    places: dict[tuple[int, int], int] = {}
    begun = []
    for i, beam in growing:
        place = places[i, beam.tree] = places.get((i, beam.tree), -1) + 1
        prompt = prompts[i]
        key = ("search", prompt.number, beam.tree, step, place)
        begun.append(Begun(prompt.token_ids, beam.token_ids, key, whole))
    return [
        (i, Beam((*beam.token_ids, *new.token_ids), beam.tree, new.ended, new.ended or new.cut))
        for (i, beam), new in zip(growing, continue_all(begun), strict=True)
    ]
