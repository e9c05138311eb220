"""Causal attention over packed sequences, registered with transformers as `repirl_packed`.

On CUDA in half precision, variable-length flash attention runs: that of flash-attn, or PyTorch's own. Elsewhere,
sequences of similar length form groups, and PyTorch's causal scaled-dot-product attention runs on each group as a
padded batch. The result is exact. Padding at most doubles the number of positions, and only inside attention; the cost
grows linearly with the number of sequences (with one T x T mask over the packed tokens it would grow quadratically).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

PACKED = "repirl_packed"
# Arguments of attention functions that change nothing here: there is no dropout and no cache, attention is causal.
_WITHOUT_EFFECT = {"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_hidden_states"}


class NoLayoutError(RuntimeError):
    """Attention over packed sequences was asked for without their layout."""


class PackedLayout:
    """The groups of a micro-batch, and each packed token's position in them. All layers use the same layout.

    Args:
        cu_seqlens: [S + 1], where each sequence begins in the packed tokens, and where the last one ends.
        device: where attention runs.
        one_group: whether all sequences form one group, however different their lengths are.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device, *, one_group: bool = False) -> None:
        lengths = cu_seqlens.diff()
        self.max_length = int(lengths.max())
        self.cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int32)
        order = torch.argsort(lengths, descending=True, stable=True)
        inverse = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64)
        self.groups: list[Tensor] = []
        first = offset = 0
        while first < len(order):
            longest = int(lengths[order[first]])
            # A group takes all sequences of at least half its longest one, so at most half the positions are padding.
            size = len(order) if one_group else int((lengths[order[first:]] * 2 >= longest).sum())
            members = order[first : first + size]
            step = torch.arange(longest)
            valid = step < lengths[members][:, None]
            index = torch.where(valid, cu_seqlens[:-1][members][:, None] + step, 0)
            inverse[index[valid]] = offset + valid.flatten().nonzero()[:, 0]
            self.groups.append(index.to(device))
            offset += index.numel()
            first += size
        # The number of positions that attention computes, with padding. packed_attention corrects it where a kernel
        # without padding runs.
        self.num_slots = offset
        self.inverse = inverse.to(device)
        # What a model asked of packed_attention that it does not do: names of arguments.
        self.unknown: set[str] = set()


@functools.cache
def packed_kernel() -> Callable[[Tensor, Tensor, Tensor, PackedLayout, float | None], Tensor]:
    """The kernel for packed sequences on a GPU in half precision: flash-attn's if installed, else PyTorch's."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return _torch_kernel

    def flash(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None) -> Tensor:
        cu, longest = layout.cu_seqlens, layout.max_length
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True)

    return flash


def _torch_kernel(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = layout.cu_seqlens, layout.max_length
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # PyTorch 2.11
            k, v = _for_every_head(q, k, v)
    out = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out


def _shares_heads(q: Tensor) -> bool:
    """Whether PyTorch's fused attention accepts fewer key and value heads than query heads (GQA).

    On a GPU in float32 it does not: PyTorch would run its plain attention, which keeps all scores in memory.
    """
    return not q.is_cuda


def _grouped(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [B, L] of x [T, H, D], as [B, H, L, D]."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [T, H_kv, d], repeated to [T, H, d], one for each query head."""
    count = q.shape[1] // k.shape[1]
    return k.repeat_interleave(count, 1), v.repeat_interleave(count, 1)


# Its kernels are compiled already, and its groups differ from micro-batch to micro-batch (compiled.py).
@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, with the signature of transformers' attention functions.

    Args:
        module: the attention layer; not used.
        query: [1, H, T, d].
        key: [1, H_kv, T, d].
        value: [1, H_kv, T, d].
        attention_mask: not used, because `packed_layout` says which tokens belong together.
        scaling: factor of the scores; None for 1 / sqrt(d).
        packed_layout: the layout of the micro-batch.
        sliding_window: the model's window in tokens, or None.
        others: arguments of other functions. Those that would change the result are noted in `packed_layout.unknown`.

    Returns:
        The outputs [1, T, H, d], and None in place of attention weights.

    Raises:
        NoLayoutError: there is no layout; tokens would attend to other sequences.
        ValueError: a sequence is longer than the model's sliding window.
    """
    if packed_layout is None:
        raise NoLayoutError(
            f"attention {PACKED!r} needs `packed_layout`; for ordinary batches set the model's attention to 'sdpa'"
        )
    if sliding_window is not None and sliding_window < packed_layout.max_length:
        raise ValueError(f"packed attention has no window: the model's has {sliding_window} tokens, a sequence more")
    others["attention_mask"] = attention_mask
    packed_layout.unknown |= {name for name, value in others.items() if value is not None} - _WITHOUT_EFFECT
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        packed_layout.num_slots = q.shape[0]
        return packed_kernel()(q, k, v, packed_layout, scaling)[None], None
    if k.shape[1] != q.shape[1] and not _shares_heads(q):
        k, v = _for_every_head(q, k, v)
    parts = []
    for index in packed_layout.groups:
        # Do not give these tensors names: a name would keep them in memory while the next group is computed.
        out = torch.nn.functional.scaled_dot_product_attention(
            _grouped(q, index),
            _grouped(k, index),
            _grouped(v, index),
            is_causal=True,
            scale=scaling,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, packed_layout.inverse)[None], None


AttentionInterface.register(PACKED, packed_attention)
