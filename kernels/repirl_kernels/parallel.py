"""Vocabulary-parallel ``linear_token_stats``: each rank of a process group holds some columns of the logits.

A backend computes the statistics of a rank's own columns, which are then merged. With L_r and H_r the logsumexp and
the entropy over the columns of rank r, and a the target, owned by rank o:

    L = log sum_r exp L_r              log p_a = log p_a^o - (L - L_o)
    w_r = exp(L_r - L)                 H = sum_r w_r (H_r + L - L_r)

In the same way, label smoothing's mean log-prob over all columns is computed from the shards' sums, and the argmax from
the shards' largest logits.

No large terms cancel: log p_a is a sum of two numbers <= 0, and H is a sum of numbers >= 0. Ranks exchange four float64
numbers for each row (seven with label smoothing or argmax). All ranks add up the same numbers in the same order, so
they return the same bits. Given L and H, a column's gradient depends on no other column: the gradients of a shard's
weight and bias are local, and only the gradient of hidden is summed over the ranks.

If another rank owns the target, this rank computes with column 0 of its own shard instead, and masks the result.

All ranks must make the same collective calls. So the calls depend only on values that are the same on all ranks: the
number of rows, which is checked before anything else is exchanged, and the rows that have a gradient, on which the
ranks agree in the backward pass. The backward pass computes the statistics of rows with a probability of nearly 1
again, as in ``ops.py``. Whether there are such rows follows from the merged statistics; whether this is needed
(``repeats_products``) may differ between the ranks' machines, so the ranks exchange it together with the number of
rows. All ranks take part, even if only weights have a gradient.

Axes: N rows (tokens), K rows that count, D features, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from repirl_kernels.backends import backend_module, repeats_products
from repirl_kernels.operands import LinearOperands, Options, check_vocab_size, statistics_dtype
from repirl_kernels.operators import OPERATOR_TAGS, under_transforms
from repirl_kernels.reference import ForwardResult
from repirl_kernels.rows import (
    RowStats,
    are_saturated,
    check_rows,
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
    replace_stats,
    row_indices,
    skip_below,
    take,
    take_live,
    take_some,
    upstream_of,
)


def vocab_parallel_token_stats(
    operands: LinearOperands,
    options: Options,
    vocab_size: int | None,
    skip_negligible: bool,
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, ...]:
    """The fields of :class:`RowStats`, the same on all ranks of ``tp_group``.

    ``operands`` hold all rows and this rank's shard of the vocabulary, ``vocab_size`` counts global columns.
    """
    if not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group must be a torch.distributed.ProcessGroup that this rank belongs to, got {tp_group!r}"
        )
    if under_transforms():
        raise NotImplementedError("tp_group is not supported under torch.func transforms (grad, vjp, vmap)")
    # Custom operators take no process groups.
    return _vocab_parallel_token_stats(
        *operands, vocab_size, skip_negligible, tp_group.group_name, *options._replace(vocab_size=0)
    )[:-1]


def _shard(
    group: dist.ProcessGroup, weight: Tensor, num_rows: int, num_kept: int, vocab_size: int | None, repeats: bool
) -> tuple[int, int, int, bool]:
    """This rank's first global column, how many of its columns are no padding, the global vocabulary's size, and
    whether `repeats_products` is true on all ranks (their machines may differ).
    """
    given_size = -1 if vocab_size is None else vocab_size
    mine = torch.tensor([repeats, weight.shape[0], num_rows, num_kept, given_size], device=weight.device)
    all_repeat, shard_sizes, *rest = _all_gather(mine, group).T.tolist()
    for what, values in zip(("rows", "rows that count", "vocab_size (-1: none given)"), rest, strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"ranks of tp_group disagree on {what}: {values} in rank order; hidden, targets, row_mask and options "
                "must be the same on all of them"
            )
    vocab_size = check_vocab_size(sum(shard_sizes), vocab_size)
    first = sum(shard_sizes[: dist.get_rank(group)])
    return first, max(0, min(weight.shape[0], vocab_size - first)), vocab_size, all(all_repeat)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[R, *]``: the tensors of all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def _own_columns(targets: Tensor, first: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which targets are in this rank's shard, and their columns in the shard; 0 for targets of other ranks."""
    owned = (targets >= first) & (targets < first + num_columns)
    return owned, torch.where(owned, targets - first, 0)


def _shard_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    options: Options,
    first: int,
    num_columns: int,
) -> Tensor:
    """``[4, K]`` in float64, over this rank's columns: logsumexp, entropy, and the target's log p and logit.

    The last two are -inf if another rank owns the target. With label smoothing or argmax there are three more: the sum
    of log p, the argmax, and its logit.
    """
    extra = 3 if options.with_argmax or options.label_smoothing else 0
    result = torch.zeros(4 + extra, targets.shape[0], dtype=torch.float64, device=targets.device)
    # Backends return NaN for a row in which all logits are -inf: right for a whole vocabulary. But a shard with only
    # banned columns has probability 0. (After a softcap, a bias of -inf is a finite logit.)
    banned = bias is not None and options.softcap is None and bool((bias[:num_columns] == -torch.inf).all())
    if num_columns == 0 or banned:
        result[[0, 2, 3]] = -torch.inf
        if extra:
            result[4], result[6] = -torch.inf if num_columns else 0.0, -torch.inf
        return result
    owned, local_targets = _own_columns(targets, first, num_columns)
    shard: ForwardResult = backend_module(hidden, options.backend).linear_forward(
        hidden, weight, local_targets, bias, options._replace(vocab_size=num_columns), row_temperature
    )
    result[0] = shard.logsumexp
    if shard.entropy is not None:
        result[1] = shard.entropy
    result[2] = torch.where(owned, shard.logprob, -torch.inf)
    result[3] = torch.where(owned, shard.target_logit, -torch.inf)
    if shard.mean_logprob is not None:
        result[4] = shard.mean_logprob.double() * num_columns
    if shard.argmax is not None and shard.max_logit is not None:
        result[5], result[6] = shard.argmax + first, shard.max_logit
    return result


def _merge(shards: Tensor, num_columns: Tensor | None, options: Options, dtype: torch.dtype) -> ForwardResult:
    """Statistics ``[K]`` from all ranks' ``[R, 4 or 7, K]`` and numbers of columns ``[R]``; logsumexp in float64.

    Only label smoothing needs the numbers of columns.
    """
    shard_logsumexp, shard_entropy, shard_logprob, shard_target_logit = shards[:, :4].unbind(dim=1)
    logsumexp = torch.logsumexp(shard_logsumexp, dim=0)
    logsumexp = torch.where(logsumexp == -torch.inf, torch.nan, logsumexp)
    difference = logsumexp - shard_logsumexp
    entropy = mean_logprob = argmax = max_logit = None
    if options.with_entropy:
        share = torch.exp(-difference)
        entropy = torch.where(share == 0, 0.0, share * (shard_entropy + difference)).sum(dim=0).to(dtype)
    if num_columns is not None:
        counts = num_columns[:, None].double()
        # A shard's log p are relative to its own logsumexp. A shard without columns adds nothing.
        sums = torch.where(counts == 0, 0.0, shards[:, 4] - torch.where(counts == 0, 0.0, counts * difference))
        mean_logprob = sums.sum(dim=0) / counts.sum()
    if options.with_argmax:
        rank = shards[:, 6].argmax(dim=0, keepdim=True)  # the first of equal ones: columns are in rank order
        argmax = shards[:, 5].gather(0, rank).squeeze(0).long()
        max_logit = shards[:, 6].gather(0, rank).squeeze(0).to(dtype)
    # The owner's value is the largest, as all others are -inf.
    logprob = (shard_logprob - difference).amax(dim=0)
    target_logit = shard_target_logit.amax(dim=0)
    return ForwardResult(logprob.to(dtype), logsumexp, target_logit.to(dtype), entropy, mean_logprob, argmax, max_logit)


def _statistics(
    group: dist.ProcessGroup,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    options: Options,
    first: int,
    num_columns: int,
) -> ForwardResult:
    """Statistics ``[K]`` of all columns, from every rank's own."""
    own = _shard_statistics(hidden, weight, targets, bias, row_temperature, options, first, num_columns)
    counts = None
    if options.label_smoothing:
        counts = _all_gather(torch.tensor([num_columns], device=hidden.device), group).squeeze(-1)
    return _merge(_all_gather(own, group), counts, options, statistics_dtype(hidden.dtype))


@torch.library.custom_op("repirl_kernels::vocab_parallel_token_stats", mutates_args=(), tags=OPERATOR_TAGS)
def _vocab_parallel_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    global_vocab_size: int | None,
    skip_negligible: bool,
    tp_group: str,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``linear_token_stats``, but ``vocab_size`` is not read.

    The last output is the result of :func:`_shard`, int64 ``[4]``.
    """
    options = Options(
        temperature, softcap, ignore_index, vocab_size, label_smoothing, with_entropy, with_argmax, backend
    )
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    keep = kept_rows(targets, row_mask, ignore_index)
    rows = row_indices(keep)
    num_rows = targets.shape[0]
    num_kept = num_rows if rows is None else rows.shape[0]
    repeats = repeats_products(hidden, backend)
    first, num_columns, vocab_size, repeats = _shard(group, weight, num_rows, num_kept, global_vocab_size, repeats)
    check_rows(targets, row_temperature, keep, vocab_size)
    shard = torch.tensor([first, num_columns, vocab_size, repeats], dtype=torch.int64)
    if num_kept == 0:
        return *empty_stats(hidden, with_entropy, with_argmax), shard
    with torch.autocast(hidden.device.type, enabled=False):
        merged = _statistics(
            group, take(hidden, rows), take(weight, None), take(targets, rows), contiguous(bias),
            take_some(row_temperature, rows), options, first, num_columns,
        )  # fmt: skip
    return *put_stats(merged, label_smoothing, rows, num_rows), shard


@_vocab_parallel_token_stats.register_fake
def _vocab_parallel_token_stats_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    options = Options(*rest[8:])
    stats = empty_stats(hidden, options.with_entropy, options.with_argmax)
    return *stats, torch.empty(4, dtype=torch.int64, device="cpu")


@torch.library.custom_op("repirl_kernels::vocab_parallel_token_stats_backward", mutates_args=(), tags=OPERATOR_TAGS)
def _vocab_parallel_token_stats_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor | None,
    logsumexp: Tensor,
    entropy: Tensor | None,
    logsumexp_low: Tensor,
    shard: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_mask: Tensor | None,
    row_temperature: Tensor | None,
    skip_negligible: bool,
    tp_group: str,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_size: int,
    label_smoothing: float,
    with_entropy: bool,
    with_argmax: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (of all ranks), weight and bias (own shard); an empty tensor for one that is not needed."""
    first, num_columns, global_vocab_size, repeats = shard.tolist()
    options = Options(
        temperature, softcap, ignore_index, num_columns, label_smoothing, with_entropy, with_argmax, backend
    )
    group = _resolve_process_group(tp_group)  # type: ignore[arg-type]
    upstream = (g_logprob, g_logsumexp, g_target_logit, g_entropy)
    stats = (logsumexp, entropy, logsumexp_low)
    live = live_rows(upstream, kept_rows(targets, row_mask, ignore_index))
    # Look at all rows, so that all ranks get the same result: they have not yet agreed which rows are live.
    may_refresh = not repeats and bool(are_saturated(logsumexp, entropy).any())
    if (need_hidden and live.shape[0] > 0) or may_refresh:
        # A gradient may be 0 on one rank and 1e-9 on another: without this, they would make different calls and hang.
        anywhere = live.to(torch.uint8)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=group)
        live = anywhere.bool()
    rows = row_indices(live)
    num_rows = targets.shape[0]
    num_live = num_rows if rows is None else rows.shape[0]
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    if num_live > 0:
        live_hidden, whole_weight, whole_bias = take(hidden, rows), take(weight, None), contiguous(bias)
        live_targets, temperatures = take(targets, rows), take_some(row_temperature, rows)
        live_upstream, live_stats = take_live(upstream, stats, rows)
        with torch.autocast(hidden.device.type, enabled=False):
            if may_refresh and (saturated := are_saturated(live_stats[0], live_stats[1])).any():
                # A gradient needs neither a smoothed mean nor the argmax.
                plain = options._replace(label_smoothing=0.0, with_argmax=False)
                fresh = _statistics(
                    group, live_hidden, whole_weight, live_targets, whole_bias, temperatures, plain, first, num_columns
                )
                live_stats = replace_stats(live_stats, put_stats(fresh, 0.0, None, num_live), saturated)
            if num_columns > 0:
                gradients = fold_upstream(live_upstream, live_stats, label_smoothing, global_vocab_size)
                skipped = skip_below(gradients, hidden.dtype) if skip_negligible else None
                owned, local_targets = _own_columns(live_targets, first, num_columns)
                gradients = gradients._replace(onehot=torch.where(owned, gradients.onehot, 0.0))
                dhidden, dweight, dbias = backend_module(hidden, backend).linear_backward(
                    gradients, live_hidden, whole_weight, local_targets, whole_bias, options,
                    need_hidden, need_weight, need_bias and bias is not None, temperatures,
                    skip_below=skipped,
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
def _vocab_parallel_token_stats_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs, (hidden, weight, _, bias) = arguments[8:11], arguments[11:15]
    return fake_gradients(hidden, weight, bias, *needs)


def _vocab_parallel_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    operands, (_, ctx.skip_negligible, ctx.tp_group) = inputs[:6], inputs[6:9]
    ctx.options = Options(*inputs[9:])
    *row_stats, shard = output
    stats = RowStats(*row_stats)
    entropy = stats.entropy if ctx.options.with_entropy else None
    ctx.save_for_backward(*operands, stats.logsumexp, entropy, stats.logsumexp_low, shard)


def _vocab_parallel_autograd(ctx, *gradients):  # type: ignore[no-untyped-def]
    need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
    tensors = ctx.saved_tensors  # read only once: under checkpointing a second read fails
    dhidden, dweight, dbias = _vocab_parallel_token_stats_backward(
        *upstream_of(gradients, ctx.options.with_entropy),
        *tensors[6:],
        *(need_hidden, need_weight, need_bias),
        *tensors[:6],
        ctx.skip_negligible,
        ctx.tp_group,
        *ctx.options,
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        None,
        dbias if need_bias else None,
        *[None] * (5 + len(Options._fields)),
    )


_vocab_parallel_token_stats.register_autograd(_vocab_parallel_autograd, setup_context=_vocab_parallel_context)
_vocab_parallel_token_stats_backward.register_autograd(refuse_double_backward, setup_context=no_context)
