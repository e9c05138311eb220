"""Which colour a token's reward gets: by its rank among the tokens that are shown."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from repirl.report.colours import LEVELS
from repirl.report.markup import is_finite, number, quantile

# Of the values on one side, ordered by their distance from the plain end: up to which share each shade goes. Rewards of
# tokens have long tails, so a scale that is linear in the reward would leave all but a few tokens plain.
SHARES = (0.4, 0.6, 0.75, 0.87, 0.95)
# A sign that fewer values have is no side of its own.
_SIDE = 0.05


@dataclass(frozen=True)
class RewardScale:
    """Cuts between shades.

    Args:
        low: a value below low[k] has level -(k + 1) or less; decreasing.
        high: a value above high[k] has level k + 1 or more; increasing, empty on a scale with one side.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def level(self, value: float) -> int:
        """From -LEVELS, the lowest, to LEVELS; 0 is plain."""
        below = bisect_left([-cut for cut in self.low], -value)
        return -below if below else bisect_left(self.high, value)

    def cells(self) -> list[tuple[int, str]]:
        """The levels that occur, from the lowest, and which values have them."""
        low = [(-level, f"< {number(cut, digits=2)}") for level, cut in _last_of_equal(self.low)]
        high = [(level, f"> {number(cut, digits=2)}") for level, cut in _last_of_equal(self.high)]
        if not self.low:
            return [(0, "all")]
        middle = "around 0" if self.high else f"\u2265 {number(self.low[0], digits=2)}"
        return [*reversed(low), (0, middle), *high]

    @property
    def explained(self) -> str:
        """In words."""
        plain, strongest = round(100 * SHARES[0]), round(100 - 100 * SHARES[-1])
        if self.high:
            return f"on either side of 0 the nearest {plain}% are plain, the furthest {strongest}% strongest"
        return f"the highest {plain}% are plain, the lowest {strongest}% strongest" if self.low else "no rewards"


def reward_scale(rewards: Iterable[float]) -> RewardScale:
    """The scale for these rewards. Where both signs have a share of them, it has two sides and is plain around 0.
    Otherwise it has one, on which low rewards stand out. Values that are not finite are ignored; equal
    ones are plain."""
    values = sorted(r for r in rewards if is_finite(r))
    if not values or values[0] == values[-1]:
        return RewardScale((), ())
    negative, positive = [v for v in values if v < 0], [v for v in values if v > 0]
    if min(len(negative), len(positive)) >= _SIDE * len(values):
        return RewardScale(
            tuple(quantile(negative, 1 - share) for share in SHARES),
            tuple(quantile(positive, share) for share in SHARES),
        )
    return RewardScale(tuple(quantile(values, 1 - share) for share in SHARES), ())


def _last_of_equal(cuts: tuple[float, ...]) -> list[tuple[int, float]]:
    """(level, cut); of equal cuts the last one, because no value lies between them."""
    return [(i + 1, cut) for i, cut in enumerate(cuts) if i + 1 == len(cuts) or cuts[i + 1] != cut]


assert len(SHARES) == LEVELS
