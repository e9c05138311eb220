"""A token-level MDP small enough to enumerate: 5 tokens, the last of which ends the response of at most 4.

States are prefixes (85), trajectories are responses (341, of 1 to 4 tokens). Tables are [state, action],
float64.
"""

from itertools import product

import torch
from torch import Tensor

V, LONGEST, END = 5, 4, 4


def _enumerate() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    prefixes = [p for n in range(LONGEST) for p in product(range(V - 1), repeat=n)]
    ended = [(*p, END) for p in prefixes]
    cut = list(product(range(V - 1), repeat=LONGEST))
    return prefixes, ended + cut


_PREFIXES, TRAJECTORIES = _enumerate()
_INDEX = {p: i for i, p in enumerate(_PREFIXES)}
NUM_STATES, NUM_TRAJECTORIES = len(_PREFIXES), len(TRAJECTORIES)
LENGTHS = torch.tensor([len(y) for y in TRAJECTORIES])
# [trajectory, position]; past the end they hold 0 and ALIVE is False.
STATES = torch.zeros(NUM_TRAJECTORIES, LONGEST, dtype=torch.int64)
ACTIONS = torch.zeros(NUM_TRAJECTORIES, LONGEST, dtype=torch.int64)
ALIVE = torch.arange(LONGEST) < LENGTHS[:, None]
for _row, _response in enumerate(TRAJECTORIES):
    for _t, _token in enumerate(_response):
        STATES[_row, _t] = _INDEX[_response[:_t]]
        ACTIONS[_row, _t] = _token
# The state after an action, NUM_STATES where the response is over.
NEXT_STATE = torch.tensor([[_INDEX.get((*p, v), NUM_STATES) for v in range(V)] for p in _PREFIXES])


def random_table(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(NUM_STATES, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trajectory_sums(table: Tensor) -> Tensor:
    """Sum of the table's entries along every trajectory, [341]."""
    return (table[STATES, ACTIONS] * ALIVE).sum(1)


def expected_counts(probability: Tensor) -> Tensor:
    """Expected visits of every (state, action), under trajectory probabilities [341]."""
    counts = torch.zeros(NUM_STATES, V, dtype=torch.float64)
    share = probability.double()[:, None].expand(-1, LONGEST)[ALIVE]
    return counts.index_put_((STATES[ALIVE], ACTIONS[ALIVE]), share, accumulate=True)


def packed(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """states [T], actions [T], cu_seqlens of the given trajectories."""
    alive = ALIVE[rows]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS[rows].cumsum(0)])
    return STATES[rows][alive], ACTIONS[rows][alive], cu_seqlens


def soft_optimal(reward: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Q* [state, action] and V* [state] by backward induction on the soft Bellman equation."""
    value = torch.zeros(NUM_STATES + 1, dtype=torch.float64)
    q = torch.zeros(NUM_STATES, V, dtype=torch.float64)
    for state in reversed(range(NUM_STATES)):  # prefixes are ordered by length
        q[state] = reward[state] + value[NEXT_STATE[state]]
        value[state] = beta * (q[state] / beta).logsumexp(0)
    return q, value[:-1]
