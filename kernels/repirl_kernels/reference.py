"""Every op in plain PyTorch: the definition of what the other backends compute, and their oracle in float64.

With final logits ``z = softcap(hidden @ weight.T + bias) / temperature`` over the first ``vocab_size``
columns and target ``a``, per row:

    target_logit  z_a
    logsumexp     L = log sum_v exp z_v
    logprob       log p_a = (z_a - max) - log sum_v exp(z_v - max)
    entropy       H = log sum_v exp(z_v - max) - sum_v p_v (z_v - max)
    mean_logit    b = sum_v p_v z_v

and with upstream gradients ``g``:

    dz_v = (g_target_logit + g_logprob) 1[v = a] + p_v (g_logsumexp - g_logprob - g_entropy (z_v - b))

``logprob`` and ``entropy`` are built from differences to the row maximum: ``z_a - L`` and ``L - b`` would
lose them to cancellation when the logits share a large offset. A column with ``p_v = 0`` (a banned token,
``z_v = -inf``) contributes exactly 0 to the entropy and to every gradient. A row that contains NaN or +inf,
or nothing but -inf, has no distribution: its statistics and its gradients are NaN, and no other row is
touched.

Functions here take data which ``ops.py`` has checked and compacted: at least one row, every target in
``[0, vocab_size)``, ``hidden`` and ``weight`` of one dtype. They work through the rows in chunks, so that the
memory they need beside the results does not grow with the number of rows.

Axes: N rows (tokens), D features, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Logits held at once. 2**22 float32 values are 16 MiB: beyond the caches already, small beside any model.
_CHUNK_ELEMENTS = 2**22


class ForwardResult(NamedTuple):
    """Per-row statistics, each ``[N]``; float64 for float64 inputs, else float32.

    ``logsumexp`` and ``mean_logit`` may be float64 in any case: with a large offset in the logits, their
    rounding to float32 would be the largest error of the gradients.
    """

    logprob: Tensor
    logsumexp: Tensor
    target_logit: Tensor
    entropy: Tensor
    mean_logit: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of ``dtype`` inputs are computed and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_forward(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, vocab_size: int
) -> ForwardResult:
    """Statistics of the rows of ``logits [N, V]`` at ``targets [N]``."""
    dtype = statistics_dtype(logits.dtype)
    parts = []
    for rows in _row_chunks(logits.shape[0], logits.shape[1]):
        z, _ = _final_logits(logits[rows, :vocab_size].to(dtype), temperature, softcap)
        parts.append(_statistics(z, targets[rows]))
    return _concatenate(parts)


def logits_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    mean_logit: Tensor,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
) -> Tensor:
    """Gradient of ``logits``: ``[N, V]`` in their dtype; 0 in columns >= ``vocab_size``."""
    dtype = statistics_dtype(logits.dtype)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dlogits[:, vocab_size:] = 0
    for rows in _row_chunks(logits.shape[0], logits.shape[1]):
        z, tanh = _final_logits(logits[rows, :vocab_size].to(dtype), temperature, softcap)
        dlogits[rows, :vocab_size] = _gradient(
            z, targets[rows], g_logprob[rows], g_logsumexp[rows], g_target_logit[rows], g_entropy[rows],
            logsumexp[rows], mean_logit[rows], temperature, tanh,
        ).to(logits.dtype)  # fmt: skip
    return dlogits


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    logits: Tensor | None = None,
) -> ForwardResult:
    """Statistics of ``hidden [N, D] @ weight [V, D].T + bias [V]`` at ``targets [N]``.

    ``logits [N, vocab_size]``, of the dtype of the statistics, is filled with what :func:`linear_backward` can use
    instead of computing the logits again.
    """
    dtype = statistics_dtype(hidden.dtype)
    weight_VD = weight[:vocab_size].to(dtype)
    bias_V = None if bias is None else bias[:vocab_size].to(dtype)
    parts = []
    for rows in _row_chunks(hidden.shape[0], vocab_size):
        product = _product(hidden[rows].to(dtype), weight_VD, bias_V)
        if logits is not None:
            logits[rows] = product
        z, _ = _final_logits(product, temperature, softcap)
        parts.append(_statistics(z, targets[rows]))
    return _concatenate(parts)


def linear_backward(
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    mean_logit: Tensor,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    logits: Tensor | None = None,
    dweight_sum: Tensor | None = None,
    skip_below: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to ``hidden``, ``weight`` and ``bias``, each in its operand's dtype or ``None``.

    Sums over rows are accumulated in float32 (float64 for float64 operands) and rounded once. With ``logits``, which
    :func:`linear_forward` filled and which may be overwritten here, these are not computed again. With
    ``dweight_sum [V, D]``, of the dtype of the statistics, the weight's gradient is added to that and ``None`` here.
    ``skip_below [N]`` permits to leave out of a row what is smaller; here nothing ever is.
    """
    dtype = statistics_dtype(hidden.dtype)
    weight_VD = weight[:vocab_size].to(dtype)
    bias_V = None if bias is None else bias[:vocab_size].to(dtype)
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    dweight = dweight_sum
    if need_weight and dweight_sum is None:
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    dbias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if need_bias else None
    for rows in _row_chunks(hidden.shape[0], vocab_size):
        hidden_ND = hidden[rows].to(dtype)
        product = _product(hidden_ND, weight_VD, bias_V) if logits is None else logits[rows]
        z, tanh = _final_logits(product, temperature, softcap)
        dz = _gradient(
            z, targets[rows], g_logprob[rows], g_logsumexp[rows], g_target_logit[rows], g_entropy[rows],
            logsumexp[rows], mean_logit[rows], temperature, tanh,
        )  # fmt: skip
        if dhidden is not None:
            dhidden[rows] = (dz @ weight_VD).to(hidden.dtype)
        if dweight is not None:
            dweight[:vocab_size].addmm_(dz.T, hidden_ND)
        if dbias is not None:
            dbias[:vocab_size] += dz.sum(dim=0)
    dweight = None if dweight is None or dweight_sum is not None else dweight.to(weight.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return dhidden, dweight, dbias


def rows_above(dlogits: Tensor, skip_below: Tensor) -> Tensor:
    """Indices of rows of ``dlogits [N, C]`` with a value of at least ``skip_below [N]`` in size, or NaN."""
    return (~(dlogits.abs().amax(dim=1) < skip_below)).nonzero().squeeze(-1)


def _row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = hidden @ weight.T
    return z if bias is None else z + bias


def _final_logits(z: Tensor, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    return (z if temperature == 1.0 else z / temperature), tanh


def _statistics(z: Tensor, targets: Tensor) -> ForwardResult:
    z_max = z.amax(dim=-1, keepdim=True)
    shifted = z - z_max
    exp = shifted.exp()
    total = exp.sum(dim=-1)
    log_total = total.log()
    # 0 * (-inf) is NaN in floating point and 0 in the entropy.
    weighted = torch.where(exp == 0, 0.0, exp * shifted).sum(dim=-1) / total
    target_logit = z.gather(-1, targets[:, None]).squeeze(-1)
    z_max = z_max.squeeze(-1)
    return ForwardResult(
        logprob=(target_logit - z_max) - log_total,
        logsumexp=z_max.double() + log_total,
        target_logit=target_logit,
        entropy=log_total - weighted,
        mean_logit=z_max.double() + weighted,
    )


def _gradient(
    z: Tensor,
    targets: Tensor,
    g_logprob: Tensor,
    g_logsumexp: Tensor,
    g_target_logit: Tensor,
    g_entropy: Tensor,
    logsumexp: Tensor,
    mean_logit: Tensor,
    temperature: float,
    tanh: Tensor | None,
) -> Tensor:
    probability = (z - logsumexp[:, None]).exp()
    slope = (g_logsumexp - g_logprob)[:, None] - g_entropy[:, None] * (z - mean_logit[:, None])
    dz = torch.where(probability == 0, 0.0, probability * slope)
    dz.scatter_add_(-1, targets[:, None], (g_target_logit + g_logprob)[:, None].to(dz.dtype))
    if temperature != 1.0:
        dz = dz / temperature
    if tanh is not None:
        dz = dz * (1.0 - tanh.square())
    return dz


def _concatenate(parts: list[ForwardResult]) -> ForwardResult:
    return (
        parts[0]
        if len(parts) == 1
        else ForwardResult(*(torch.cat(column) for column in zip(*parts, strict=True)))
    )
