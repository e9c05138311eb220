"""Vocabulary-parallel ``linear_token_stats``: each rank of a process group holds some columns of the logits.

A backend computes the statistics of a rank's own columns, which are then merged. With L_r and H_r the logsumexp and
the entropy over the columns of rank r, and a the target, owned by rank o:

    L = log sum_r exp L_r              log p_a = log p_a^o - (L - L_o)
    w_r = exp(L_r - L)                 H = sum_r w_r (H_r + L - L_r)

No large terms cancel: log p_a is a sum of two numbers <= 0, H one of numbers >= 0. Four float64 numbers a row travel.
Every rank does the same sums on the same numbers, so that all ranks return the same bits. Given L and H, a column's
gradient needs nothing from other columns: weight and bias of the own shard are local, and only dH is summed over
ranks.

A target that another rank owns is replaced by column 0 of the own shard, and what that column gives is masked.

Collectives must match on all ranks. They depend only on what is the same on all of them: the number of rows, checked
before anything else is exchanged, and which rows have a gradient, agreed upon in the backward pass.

Axes: N rows (tokens), K rows that count, D features, V vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from repirl_kernels.ops import LinearOperands, backend_module, check_vocab_size
from repirl_kernels.reference import statistics_dtype
from repirl_kernels.rows import (
    check_target_values,
    contiguous,
    empty_stats,
    fake_gradients,
    fold_upstream,
    gradients_or_empty,
    kept_rows,
    live_rows,
    no_context,
    put,
    put_stats,
    refuse_double_backward,
    row_indices,
    skip_below,
    take,
)


def vocab_parallel_token_stats(
    operands: LinearOperands,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int | None,
    skip_negligible: bool,
    backend: str | None,
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """``logprob``, ``logsumexp``, ``target_logit`` and ``entropy`` ``[N]``, the same on all ranks of ``tp_group``.

    ``operands`` hold all rows and this rank's shard of the vocabulary, ``vocab_size`` counts global columns.
    """
    if not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group must be a torch.distributed.ProcessGroup that this rank belongs to, got {tp_group!r}"
        )
    outputs = _vocab_parallel_token_stats(
        operands.hidden,
        operands.weight,
        operands.targets,
        operands.bias,
        operands.row_mask,
        float(temperature),
        None if softcap is None else float(softcap),
        ignore_index,
        vocab_size,
        skip_negligible,
        backend or "",
        tp_group.group_name,  # custom operators take no process groups
    )
    return outputs[:4]


def _shard(
    group: dist.ProcessGroup, weight: Tensor, num_rows: int, num_kept: int, vocab_size: int | None
) -> tuple[int, int, int]:
    """This rank's first global column, how many of its columns are no padding, and the global vocabulary's size."""
    given_size = -1 if vocab_size is None else vocab_size
    mine = torch.tensor([weight.shape[0], num_rows, num_kept, given_size], device=weight.device)
    shard_sizes, *rest = _all_gather(mine, group).T.tolist()
    for what, values in zip(("rows", "rows that count", "vocab_size (-1: none given)"), rest, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"ranks of tp_group disagree on {what}: {values} in rank order; hidden, targets, row_mask and options "
                "must be the same on all of them"
            )
    vocab_size = check_vocab_size(sum(shard_sizes), vocab_size)
    first = sum(shard_sizes[: dist.get_rank(group)])
    return first, max(0, min(weight.shape[0], vocab_size - first)), vocab_size


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[R, *]``: the tensors of all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def _own_columns(targets: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which targets are columns of the own shard, and their indices there; 0 for those of other ranks."""
    owned = (targets >= first) & (targets < first + num_columns)
    return owned, torch.where(owned, targets - first, 0)


def _shard_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    first: int,
    num_columns: int,
    backend: str,
) -> Tensor:
    """``[4, K]`` in float64: L_r, H_r, and the target's log p and logit, -inf where another rank owns it."""
    result = torch.zeros(4, targets.shape[0], dtype=torch.float64, device=targets.device)
    # Backends call a row of nothing but -inf NaN, as the whole vocabulary's would be. A shard of banned columns has no
    # share in the distribution instead. (After a softcap, a bias of -inf is a finite logit.)
    banned = bias is not None and softcap is None and bool((bias[:num_columns] == -torch.inf).all())
    if num_columns == 0 or banned:
        result[[0, 2, 3]] = -torch.inf
        return result
    owned, local_targets = _own_columns(targets, first, num_columns)
    logprob, result[0], target_logit, result[1], _ = backend_module(hidden, backend).linear_forward(
        hidden, weight, local_targets, bias, temperature, softcap, num_columns
    )
    result[2] = torch.where(owned, logprob, -torch.inf)
    result[3] = torch.where(owned, target_logit, -torch.inf)
    return result


def _merge(shards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``logprob``, ``logsumexp``, ``target_logit`` and ``entropy`` ``[K]`` from all ranks' ``[R, 4, K]``."""
    shard_logsumexp, shard_entropy, shard_logprob, shard_target_logit = shards.unbind(dim=1)
    logsumexp = torch.logsumexp(shard_logsumexp, dim=0)
    logsumexp = torch.where(logsumexp == -torch.inf, torch.nan, logsumexp)
    behind = logsumexp - shard_logsumexp
    share = torch.exp(-behind)
    entropy = torch.where(share == 0, 0.0, share * (shard_entropy + behind)).sum(dim=0)
    # The owner's value is the largest, as all others are -inf.
    return (shard_logprob - behind).amax(dim=0), logsumexp, shard_target_logit.amax(dim=0), entropy


@torch.library.custom_op("repirl_kernels::vocab_parallel_token_stats", mutates_args=())
def _vocab_parallel_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int | None,
    skip_negligible: bool,
    backend: str,
    tp_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``linear_token_stats``; the last output is the shard: its first global column and how many are no padding."""
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    keep = kept_rows(targets, row_mask, ignore_index)
    rows = row_indices(keep)
    num_rows = targets.shape[0]
    num_kept = num_rows if rows is None else rows.shape[0]
    first, num_columns, vocab_size = _shard(group, weight, num_rows, num_kept, vocab_size)
    check_target_values(targets, keep, vocab_size)
    shard = torch.tensor([first, num_columns])
    if num_kept == 0:
        return *empty_stats(hidden), shard
    with torch.autocast(hidden.device.type, enabled=False):
        statistics = _shard_statistics(
            take(hidden, rows), take(weight, None), take(targets, rows), contiguous(bias), temperature, softcap,
            first, num_columns, backend,
        )  # fmt: skip
    merged = _merge(_all_gather(statistics, group))
    dtype = statistics_dtype(hidden.dtype)
    logprob, target_logit, entropy = (merged[index].to(dtype) for index in (0, 2, 3))
    return *put_stats(logprob, merged[1], target_logit, entropy, rows, num_rows), shard


@_vocab_parallel_token_stats.register_fake
def _vocab_parallel_token_stats_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int | None,
    skip_negligible: bool,
    backend: str,
    tp_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *empty_stats(hidden), torch.empty(2, dtype=torch.int64, device="cpu")


@torch.library.custom_op("repirl_kernels::vocab_parallel_token_stats_backward", mutates_args=())
def _vocab_parallel_token_stats_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
    shard: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    skip_negligible: bool,
    backend: str,
    tp_group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (of all ranks), weight and bias (own shard); an empty tensor for one that is not needed."""
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    upstream = (g_logprob, g_logsumexp, g_target_logit, g_entropy)
    live = live_rows(upstream, kept_rows(targets, row_mask, ignore_index))
    if need_hidden and live.shape[0] > 0:
        # A gradient that is 0 on one rank and 1e-9 on another must not make them wait for each other for ever.
        anywhere = live.to(torch.uint8)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=group)
        live = anywhere.bool()
    rows = row_indices(live)
    num_rows = targets.shape[0]
    num_live = num_rows if rows is None else rows.shape[0]
    first, num_columns = shard.tolist()
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    if num_live > 0 and num_columns > 0:
        taken = [take(column, rows) for column in (*upstream, logsumexp, entropy, logsumexp_low)]
        mass, onehot, slope, mean_logit = fold_upstream(*taken)
        owned, local_targets = _own_columns(take(targets, rows), first, num_columns)
        with torch.autocast(hidden.device.type, enabled=False):
            dhidden, dweight, dbias = backend_module(hidden, backend).linear_backward(
                torch.zeros_like(mass), mass, torch.where(owned, onehot, 0.0), slope, take(hidden, rows),
                take(weight, None), local_targets, contiguous(bias), taken[4], mean_logit, temperature, softcap,
                num_columns, need_hidden, need_weight, need_bias and bias is not None,
                skip_below=skip_below(mass, onehot, slope, hidden.dtype) if skip_negligible else None,
            )  # fmt: skip
    if need_hidden:
        dhidden_sum = hidden.new_zeros((num_live, hidden.shape[1]), dtype=statistics_dtype(hidden.dtype))
        if dhidden is not None:
            dhidden_sum.copy_(dhidden)
        if num_live > 0:
            dist.all_reduce(dhidden_sum, group=group)
        dhidden = put(dhidden_sum.to(hidden.dtype), rows, num_rows)
    if need_weight and dweight is None:
        dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    if need_bias and bias is not None and dbias is None:
        dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    return gradients_or_empty(hidden, weight, dhidden, dweight, dbias)


@_vocab_parallel_token_stats_backward.register_fake
def _vocab_parallel_token_stats_backward_fake(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor,
    logsumexp_low: Tensor,
    shard: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    skip_negligible: bool,
    backend: str,
    tp_group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _vocab_parallel_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets, bias, row_mask, *ctx.options, _, skip_negligible, backend, tp_group = inputs
    ctx.options += [skip_negligible, backend, tp_group]
    _, logsumexp, _, entropy, logsumexp_low, shard = output
    ctx.save_for_backward(hidden, weight, targets, bias, row_mask, logsumexp, entropy, logsumexp_low, shard)


def _vocab_parallel_autograd(ctx, *gradients):  # type: ignore[no-untyped-def]
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    upstream = [gradient.contiguous() for gradient in gradients[:4]]
    dhidden, dweight, dbias = _vocab_parallel_token_stats_backward(
        *upstream, *ctx.saved_tensors, *ctx.options, need_hidden, need_weight, need_bias
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * 8,
    )


_vocab_parallel_token_stats.register_autograd(_vocab_parallel_autograd, setup_context=_vocab_parallel_context)
_vocab_parallel_token_stats_backward.register_autograd(refuse_double_backward, setup_context=no_context)
