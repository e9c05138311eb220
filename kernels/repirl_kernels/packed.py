"""Sums, means and returns over packed sequences, and sums over buckets of their elements.

Sequences lie end to end without padding. Axes: T tokens (response tokens only), S sequences, B buckets, E elements
that have a weight of their own (sequences or tokens). ``cu_seqlens [S+1]`` holds 0 and the running ends, so sequence
``i`` is ``[cu_seqlens[i], cu_seqlens[i+1])``; a sequence may be empty. A *bucket* is a set of elements whose weights
are normalised together.

Every function is pure and has no loop over sequences. No sum crosses the border of a sequence, so a sequence gets the
same numbers wherever it lies in the pack. Sums are taken in float64.

Source: prefix sums by doubling, Hillis and Steele 1986.
"""

import math

import torch
from torch import Tensor

GROUPINGS = ("prompt", "batch")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse an option that is not one of its choices.

    Raises:
        ValueError: names the option, its value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_packed(cu_seqlens: Tensor, **values: Tensor | None) -> None:
    """Refuse a malformed ``cu_seqlens`` and values that do not fit it.

    Args:
        cu_seqlens: ``[S+1]``, int32 or int64, from 0 and never decreasing.
        values: floating-point tensors ``[T]``, T = ``cu_seqlens[-1]``; ``None`` is skipped.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: ``cu_seqlens`` is malformed, or a value is not ``[T]``.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [S+1] with S >= 0, got {tuple(cu_seqlens.shape)}")
    if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must start at 0 and never decrease, got {cu_seqlens[:8].tolist()} ...")
    num_tokens = int(cu_seqlens[-1])
    for name, value in values.items():
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.shape != (num_tokens,):
            raise ValueError(
                f"{name} must have shape [T] = ({num_tokens},), as cu_seqlens ends; got {tuple(value.shape)}"
            )


def check_finite(row_mask: Tensor | None = None, **values: Tensor | None) -> None:
    """Refuse values that are NaN or infinite.

    All values are read at once, with one synchronisation. Nothing is checked under ``torch.compile`` or ``torch.func``,
    or while a CUDA graph is captured: values cannot be read there.

    Args:
        row_mask: bool, of the values' shape; only rows with ``True`` are checked. ``None``: all are.
        values: floating-point tensors; ``None`` is skipped.

    Raises:
        ValueError: names the first tensor that holds such a value, how many it holds, and where the first one is.
    """
    given = {name: value.detach() for name, value in values.items() if value is not None}
    if torch.compiler.is_compiling() or not given or torch._C._are_functorch_transforms_active():
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    wrong = {name: ~value.isfinite() for name, value in given.items()}
    if row_mask is not None:
        wrong = {name: rows & row_mask for name, rows in wrong.items()}
    any_wrong = torch.stack([rows.any() for rows in wrong.values()]).tolist()
    for name in [name for name, is_wrong in zip(wrong, any_wrong, strict=True) if is_wrong]:
        first = tuple(wrong[name].nonzero()[0].tolist())
        index = first[0] if len(first) == 1 else first
        raise ValueError(
            f"{name} must be finite; {int(wrong[name].sum())} values are not, first {float(given[name][first])} at "
            f"index {index}"
        )


def check_number(name: str, value: float) -> None:
    """Refuse an option that is NaN or infinite.

    Raises:
        ValueError: names the option and its value.
    """
    if not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value!r}")


def check_gamma(gamma: float) -> None:
    """Refuse a discount outside [0, 1].

    Raises:
        ValueError: names the discount.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma!r}")


def sequence_ids(cu_seqlens: Tensor, num_tokens: int | None = None) -> Tensor:
    """The index of the sequence that each token belongs to.

    Args:
        cu_seqlens: ``[S+1]``.
        num_tokens: T; if it is not given, a GPU is synchronised to read it.

    Returns:
        ``[T]`` int64, in [0, S).
    """
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(index, cu_seqlens.diff().long(), output_size=num_tokens)


def token_positions(cu_seqlens: Tensor) -> Tensor:
    """The position of each token in its sequence, from 0, ``[T]`` int64."""
    lengths = cu_seqlens.diff().long()
    start = cu_seqlens[:-1].long().repeat_interleave(lengths)
    return torch.arange(start.numel(), device=start.device) - start


def max_length(lengths: Tensor) -> int:
    """The largest of ``lengths [S]``; 0 if there is none. Synchronises the device."""
    return int(lengths.max()) if lengths.numel() else 0


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of the values of each sequence.

    Args:
        values: ``[T]``, floating-point.
        cu_seqlens: ``[S+1]``.

    Returns:
        ``[S]``, of the values' dtype; 0 for an empty sequence.

    Raises:
        TypeError, ValueError: as :func:`check_packed`.
    """
    check_packed(cu_seqlens, values=values)
    ids = sequence_ids(cu_seqlens, values.numel())
    return bucket_sum(values, ids, cu_seqlens.numel() - 1).to(values.dtype)


def segment_mean(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Mean of the values of each sequence.

    Args:
        values: ``[T]``, floating-point.
        cu_seqlens: ``[S+1]``.

    Returns:
        ``[S]``, of the values' dtype; 0 for an empty sequence.

    Raises:
        TypeError, ValueError: as :func:`check_packed`.
    """
    check_packed(cu_seqlens, values=values)
    total = bucket_sum(values, sequence_ids(cu_seqlens, values.numel()), cu_seqlens.numel() - 1)
    return (total / cu_seqlens.diff().clamp(min=1)).to(values.dtype)


def prefix_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Running sum within each sequence, from its first token to each token, both included.

    Args:
        values: ``[T]``, floating-point.
        cu_seqlens: ``[S+1]``.

    Returns:
        ``[T]``, of the values' dtype.

    Raises:
        TypeError, ValueError: as :func:`check_packed`.
    """
    check_packed(cu_seqlens, values=values)
    lengths = cu_seqlens.diff().long()
    steps_before = token_positions(cu_seqlens)
    return running_sums(values.double(), steps_before, max_length(lengths), 1.0, backward=False).to(values.dtype)


def returns_to_go(reward: Tensor, cu_seqlens: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each token to the end of its sequence.

        G_t = sum_{t' >= t} gamma^(t'-t) r_t'

    Args:
        reward: ``[T]``, floating-point.
        cu_seqlens: ``[S+1]``.
        gamma: the discount, in [0, 1].

    Returns:
        ``[T]``, of the rewards' dtype.

    Raises:
        TypeError, ValueError: as :func:`check_packed`.
        ValueError: ``gamma`` is outside [0, 1].
    """
    check_packed(cu_seqlens, reward=reward)
    check_gamma(gamma)
    lengths = cu_seqlens.diff().long()
    steps_after = lengths.repeat_interleave(lengths) - 1 - token_positions(cu_seqlens)
    return running_sums(reward.double(), steps_after, max_length(lengths), gamma, backward=True).to(reward.dtype)


def running_sums(values: Tensor, distance: Tensor, longest: int, gamma: float, *, backward: bool) -> Tensor:
    """Discounted running sum within each sequence, by doubling (Hillis and Steele 1986).

    Args:
        values: ``[T]``.
        distance: ``[T]``, how many tokens of the same sequence lie before each token (after it, if ``backward``).
        longest: the length of the longest sequence.
        gamma: the discount; a token at distance k is multiplied by gamma^k.
        backward: sum from each token to the end of its sequence, instead of from the start to the token.

    Returns:
        ``[T]``, of the values' dtype.
    """
    # After k rounds each token holds the discounted sum of its own value and those of 2^k - 1 neighbours. A neighbour
    # in another sequence is replaced by 0, not multiplied by 0: its value may be NaN.
    reach = 1
    while reach < longest:
        padding = values.new_zeros(min(reach, values.numel()))
        neighbour = torch.cat([values[reach:], padding] if backward else [padding, values[:-reach]])
        values = values + torch.where(distance >= reach, gamma**reach * neighbour, 0.0)
        reach *= 2
    return values


def dense_group_ids(group_ids: Tensor | None, cu_seqlens: Tensor, group_by: str) -> tuple[Tensor, int]:
    """Groups of sequences, renumbered from 0 without gaps.

    Args:
        group_ids: ``[S]``, any integers; ``None`` puts all sequences into one group.
        cu_seqlens: ``[S+1]``.
        group_by: ``"prompt"`` keeps the groups, ``"batch"`` puts all sequences into one.

    Returns:
        The ids ``[S]`` int64, and the number of groups.

    Raises:
        ValueError: ``group_by`` is unknown, or ``group_ids`` is not ``[S]``.
    """
    check_choice("group_by", group_by, GROUPINGS)
    num_sequences = cu_seqlens.numel() - 1
    if group_ids is not None and group_ids.shape != (num_sequences,):
        raise ValueError(f"group_ids must have shape [S] = ({num_sequences},), got {tuple(group_ids.shape)}")
    if group_ids is None or group_by == "batch":
        return torch.zeros(num_sequences, dtype=torch.int64, device=cu_seqlens.device), min(num_sequences, 1)
    unique, dense = torch.unique(group_ids, return_inverse=True)
    return dense, unique.numel()


def count_buckets(bucket_ids: Tensor) -> int:
    """One more than the largest of ``bucket_ids [E]``; 0 if there is none. Synchronises the device."""
    return int(bucket_ids.max()) + 1 if bucket_ids.numel() else 0


def bucket_sizes(bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """The number of elements in each bucket, ``[B]`` int64."""
    return torch.bincount(bucket_ids, minlength=num_buckets)


def bucket_sum(values: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """Sum of ``values [E]`` over each bucket, ``[B]`` float64; 0 for an empty one."""
    zero = torch.zeros(num_buckets, dtype=torch.float64, device=values.device)
    return zero.index_add(0, bucket_ids, values.double())


def _bucket_max(values: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """Largest of ``values [E]`` in each bucket, ``[B]``; -inf for an empty one."""
    lowest = torch.full((num_buckets,), -math.inf, dtype=values.dtype, device=values.device)
    return lowest.scatter_reduce(0, bucket_ids, values, "amax")


def bucket_logsumexp(values: Tensor, bucket_ids: Tensor, num_buckets: int) -> Tensor:
    """Log of the sum of ``exp(values [E])`` over each bucket, ``[B]`` float64; -inf for an empty one."""
    values = values.double()
    shift = _bucket_max(values.detach(), bucket_ids, num_buckets)
    shift = torch.where(shift.isfinite(), shift, 0.0)
    return bucket_sum((values - shift[bucket_ids]).exp(), bucket_ids, num_buckets).log() + shift
