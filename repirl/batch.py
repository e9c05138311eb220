"""PackedBatch: the one data type that flows through the trainer.

Axes: T tokens of S sequences lie end to end without padding; R of the T tokens are response tokens
(the tokens that the policy or the expert chose). Streams are named [T] tensors aligned with the tokens;
a value at token t belongs to the action a_t = token_ids[t] taken in the state of all tokens before it.

The streams (log-probabilities in nats; a single word is a file in objectives/):

| stream            | holds                                    | written by      | read by                        |
|-------------------|------------------------------------------|-----------------|--------------------------------|
| `sampler_logprob` | log mu, as the sampler says              | rollout/sampler | rloo, irl                      |
| `old_logprob`     | log pi_old, as the trainer says          | repirl.loop     | rloo, irl, dqo, repirl.rewards |
| `ref_logprob`     | log pi_ref at the policy's temperature   | repirl.run      | rloo (KL), irl (b), dpo, dqo   |
| `prm_ref_logprob` | log pi_ref at the PRM's temperature      | repirl.run      | repirl.rewards (`implicit`)    |
| `reward`          | r_t of the PRM                           | repirl.streams  | irl, rloo, prime, repirl.gate  |
| `prm_reward`      | the same, which no gate sets to 0        | repirl.streams  | repirl.record                  |
| `logprob`         | log pi of the present policy             | repirl.streams  | airl, dpo, dqo                 |
| `state_value`     | V(s_t) of the present critic             | repirl.streams  | dqo                            |
| `step_label`      | labels at ends of steps, else NaN        | data/steps      | steps                          |
| `coefficient`     | dL/dr_t or dL/d log pi, of two passes    | irl, dpo        | irl, dpo                       |
| `opposing_reward` | mean R of the other outcome in the group | prime           | prime                          |
| `advantage`       | A_t                                      | rloo            | rloo                           |
| `loss_weight`     | share of a token in the batch's loss     | rloo, airl      | rloo, airl                     |
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

EXPERT, POLICY = 0, 1


@dataclass
class PackedBatch:
    """Sequences end to end.

    token_ids [T] int64; cu_seqlens [S+1] int64, 0 first and T last; prompt_lens [S] int64;
    group_ids [S] int64 (sequences of one prompt share it); source [S] int64 (EXPERT or POLICY);
    outcome [S] float32 (NaN where no verifier looked); streams: name -> [T] float32.
    """

    token_ids: Tensor
    cu_seqlens: Tensor
    prompt_lens: Tensor
    group_ids: Tensor
    source: Tensor
    outcome: Tensor
    streams: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = self.cu_seqlens.diff()
        assert int(self.cu_seqlens[-1]) == self.token_ids.numel()
        if bool((self.prompt_lens < 1).any()) or bool((self.prompt_lens > lengths).any()):
            raise ValueError(
                "every prompt needs at least one token and at most its sequence's length; got prompt lengths "
                f"{self.prompt_lens.tolist()} in sequences of {lengths.tolist()} tokens"
            )
        position = torch.arange(self.token_ids.numel()) - self.cu_seqlens[:-1].repeat_interleave(lengths)
        self.position_ids = position
        self.response_index = (position >= self.prompt_lens.repeat_interleave(lengths)).nonzero()[:, 0]
        zero = torch.zeros(1, dtype=torch.int64)
        self.response_cu_seqlens = torch.cat([zero, (lengths - self.prompt_lens).cumsum(0)])

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_sequences(self) -> int:
        return self.prompt_lens.numel()

    @property
    def num_response_tokens(self) -> int:
        return self.response_index.numel()

    @property
    def lengths(self) -> Tensor:
        """[S] tokens a sequence, prompt included."""
        return self.cu_seqlens.diff()

    @property
    def response_ids(self) -> Tensor:
        """[R] the response tokens, which are the targets of the head."""
        return self.token_ids[self.response_index]

    def read(self, name: str) -> Tensor:
        """The response tokens' part [R] of a stream; KeyError names the streams that exist."""
        if name not in self.streams:
            raise KeyError(f"no stream {name!r} in this batch; it has {sorted(self.streams)}")
        return self.streams[name][self.response_index]

    def write(self, name: str, values: Tensor) -> None:
        """Set a stream from the response tokens' values [R]; prompt tokens get 0."""
        if values.shape != self.response_index.shape:
            raise ValueError(
                f"stream {name!r} needs one value for each of the {self.num_response_tokens} response tokens, "
                f"got shape {tuple(values.shape)}"
            )
        stream = torch.zeros(self.num_tokens, dtype=torch.float32)
        stream[self.response_index] = values.detach().to(device="cpu", dtype=torch.float32)
        self.streams[name] = stream

    def select(self, sequences: Tensor | Sequence[int]) -> PackedBatch:
        """The given sequences (indices or a boolean mask), in the given order, streams included."""
        sequences = torch.as_tensor(sequences)
        if sequences.dtype == torch.bool:
            sequences = sequences.nonzero()[:, 0]
        sequences = sequences.to(torch.int64)
        lengths = self.lengths[sequences]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        index = _ranges(self.cu_seqlens[:-1][sequences], lengths)
        return PackedBatch(
            self.token_ids[index],
            cu_seqlens,
            self.prompt_lens[sequences],
            self.group_ids[sequences],
            self.source[sequences],
            self.outcome[sequences],
            {name: stream[index] for name, stream in self.streams.items()},
        )

    def response_positions(self, sequences: Sequence[int]) -> Tensor:
        """Where the response tokens of the given sequences stand in a [R] tensor of this batch."""
        index = torch.as_tensor(sequences, dtype=torch.int64)
        return _ranges(self.response_cu_seqlens[:-1][index], self.response_cu_seqlens.diff()[index])

    def microbatches(
        self, tokens_per_microbatch: int, num_ranks: int = 1, costs: Sequence[float] | None = None
    ) -> list[list[list[int]]]:
        """The sequences of each micro-batch of each rank: see `deal_out`."""
        return deal_out(self.lengths.tolist(), tokens_per_microbatch, num_ranks, costs)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on `device`. To a GPU it is made while the host goes on, from pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def deal_out(
    lengths: Sequence[int], tokens_per_microbatch: int, num_ranks: int = 1, costs: Sequence[float] | None = None
) -> list[list[list[int]]]:
    """Cut a batch into micro-batches of whole sequences, and deal these out to the ranks.

    A sequence that is longer than a micro-batch may be has one of its own: to drop it would bias the loss.

    Args:
        lengths: tokens of each sequence.
        tokens_per_microbatch: the most tokens of a micro-batch.
        num_ranks: how many processes share the batch.
        costs: of each sequence; by default its tokens. Micro-batches get about equal costs, and those that the ranks
            run at the same time the most equal ones, so that none waits for another.

    Returns:
        [rank][micro-batch] -> indices of sequences. All ranks have equally many micro-batches; the last one of some is
        empty where their number cannot be shared evenly.
    """
    if not lengths:
        return [[] for _ in range(num_ranks)]
    costs = lengths if costs is None else costs
    order = sorted(range(len(lengths)), key=lambda i: -costs[i])
    # No fewer can do: what the n longest sequences fill, for every n, and what all tokens do.
    longest_first = enumerate(sorted(lengths, reverse=True), 1)
    least = max(math.ceil(n / max(1, tokens_per_microbatch // length)) for n, length in longest_first)
    count = _round_up(max(least, math.ceil(sum(lengths) / tokens_per_microbatch)), num_ranks)
    while (bins := _fill(order, lengths, costs, count, tokens_per_microbatch)) is None:
        count += num_ranks
    # Sequences over the budget are alone, so that there may be fewer than was counted on.
    bins = sorted(filter(None, bins), key=lambda sequences: -sum(costs[i] for i in sequences))
    bins += [[] for _ in range(-len(bins) % num_ranks)]
    return [bins[rank::num_ranks] for rank in range(num_ranks)]


def _fill(
    order: list[int], lengths: Sequence[int], costs: Sequence[float], count: int, capacity: int
) -> list[list[int]] | None:
    """Each sequence, the costliest first, to the cheapest of `count` bins that has room; None where none has any."""
    bins: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    cheapest = [(0.0, i) for i in range(count)]
    for sequence in order:
        skipped = []
        while cheapest:
            cost, i = heapq.heappop(cheapest)
            if not bins[i] or used[i] + lengths[sequence] <= capacity:
                break
            skipped.append((cost, i))
        else:
            return None
        bins[i].append(sequence)
        used[i] += lengths[sequence]
        for entry in [*skipped, (cost + costs[sequence], i)]:
            heapq.heappush(cheapest, entry)
    return bins


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated arange(start, start + length)."""
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - offsets).repeat_interleave(lengths)


def pack(
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    group_ids: Sequence[int] | None = None,
    source: int = POLICY,
    outcome: Sequence[float] | None = None,
    streams: dict[str, Sequence[Sequence[float]]] | None = None,
) -> PackedBatch:
    """Pack (prompt token ids, response token ids) pairs.

    `streams` maps a name to one list of values a sequence, a value for each of its response tokens.
    """
    pairs = [(list(prompt), list(response)) for prompt, response in sequences]
    lengths = torch.tensor([len(p) + len(r) for p, r in pairs], dtype=torch.int64)
    batch = PackedBatch(
        token_ids=torch.tensor([t for p, r in pairs for t in p + r], dtype=torch.int64),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_lens=torch.tensor([len(p) for p, _ in pairs], dtype=torch.int64),
        group_ids=torch.tensor(range(len(pairs)) if group_ids is None else group_ids, dtype=torch.int64),
        source=torch.full((len(pairs),), source, dtype=torch.int64),
        outcome=torch.tensor([float("nan")] * len(pairs) if outcome is None else outcome, dtype=torch.float32),
    )
    for name, values in (streams or {}).items():
        batch.write(name, torch.tensor([v for row in values for v in row], dtype=torch.float32))
    return batch


def concatenate(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Batches one after the other. A stream that one of them lacks is NaN there, so that reading it is noticed."""
    offsets = [0]
    for batch in batches:
        offsets.append(offsets[-1] + batch.num_tokens)
    names = sorted(set().union(*(batch.streams for batch in batches)))
    return PackedBatch(
        torch.cat([b.token_ids for b in batches]),
        torch.cat(
            [torch.zeros(1, dtype=torch.int64), *(b.cu_seqlens[1:] + o for b, o in zip(batches, offsets, strict=False))]
        ),
        torch.cat([b.prompt_lens for b in batches]),
        torch.cat([b.group_ids for b in batches]),
        torch.cat([b.source for b in batches]),
        torch.cat([b.outcome for b in batches]),
        {name: torch.cat([_stream_or_nan(b, name) for b in batches]) for name in names},
    )


def _stream_or_nan(batch: PackedBatch, name: str) -> Tensor:
    stream = batch.streams.get(name)
    return torch.full((batch.num_tokens,), math.nan) if stream is None else stream
