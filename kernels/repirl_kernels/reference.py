"""Every op in plain PyTorch. It defines what the other backends compute; tests compare them with it in float64.

With final logits ``z = softcap(hidden @ weight.T + bias) / temperature`` over the first ``vocab_size``
columns and target ``a``, per row:

    target_logit  z_a
    logsumexp     L = log sum_v exp z_v
    logprob       log p_a = (z_a - max) - log sum_v exp(z_v - max)
    entropy       H = log sum_v exp(z_v - max) - sum_v p_v (z_v - max)
    mean_logit    b = sum_v p_v z_v = L - H

and with upstream gradients ``g``:

    dz_v = onehot 1[v = a] + uniform + p_v (mass - slope (z_v - b)),
    onehot = g_target_logit + g_logprob,  mass = g_logsumexp - g_logprob,  slope = g_entropy

``logprob`` and ``entropy`` are computed from differences to the row maximum: if the logits share a large offset,
``z_a - L`` and ``L - b`` would lose their digits to cancellation. A column with ``p_v = 0`` (a banned token,
``z_v = -inf``) contributes exactly 0 to the entropy and to every gradient. A row that contains NaN or +inf,
or only -inf, has no distribution: its gradients, and its statistics except ``target_logit``, are NaN. Other rows are
not affected.

If each row has its own temperature, that is the temperature in the formulas. With label smoothing, ``ops.py`` mixes
``mean_logprob`` into the target's log-prob, and passes the part of the gradient that all columns get as ``uniform``.

``ops.py`` has checked and compacted the arguments of these functions: there is at least one row, every target is in
``[0, vocab_size)``, and ``hidden`` and ``weight`` have the same dtype. The rows are processed in chunks, so that the
memory for intermediate values does not grow with the number of rows.

Axes: N rows (tokens), D features, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from repirl_kernels.operands import Options, statistics_dtype

# The number of logits in memory at a time: 16 MiB in float32, more than the caches hold, but little beside a model.
_CHUNK_ELEMENTS = 2**22


class ForwardResult(NamedTuple):
    """Per-row statistics, each ``[N]``; float64 for float64 inputs, else float32.

    ``logsumexp`` may be float64 in any case: with a large offset in the logits, its rounding to float32 would be the
    largest error of the gradients.
    """

    logprob: Tensor
    logsumexp: Tensor
    target_logit: Tensor
    entropy: Tensor | None
    """``None`` if it was not computed."""
    mean_logprob: Tensor | None = None
    """sum_v log p_v / V; ``None`` without label smoothing."""
    argmax: Tensor | None = None
    """First column with the largest logit, int64; ``None``, like ``max_logit``, if it is not wanted."""
    max_logit: Tensor | None = None


class RowGradients(NamedTuple):
    """The values, each ``[N]``, from which the gradient of a row's logits is computed; see the formula above."""

    mass: Tensor
    onehot: Tensor
    slope: Tensor | None
    """``None`` if the entropy was not computed."""
    uniform: Tensor | None
    """``None`` without label smoothing."""
    logsumexp: Tensor
    mean_logit: Tensor

    def of(self, rows: slice) -> "RowGradients":
        """The values of some rows."""
        return RowGradients(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def logits_forward(
    logits: Tensor, targets: Tensor, options: Options, row_temperature: Tensor | None = None
) -> ForwardResult:
    """Statistics of the rows of ``logits [N, V]`` at ``targets [N]``."""
    dtype = statistics_dtype(logits.dtype)
    parts = []
    for rows in _row_chunks(logits.shape[0], logits.shape[1]):
        z, _ = _final_logits(logits[rows, : options.vocab_size].to(dtype), options, _of(row_temperature, rows))
        parts.append(_statistics(z, targets[rows], options))
    return _concatenate(parts)


def logits_backward(
    gradients: RowGradients,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    row_temperature: Tensor | None = None,
) -> Tensor:
    """Gradient of ``logits``: ``[N, V]`` in their dtype; 0 in columns >= ``vocab_size``."""
    dtype = statistics_dtype(logits.dtype)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dlogits[:, options.vocab_size :] = 0
    for rows in _row_chunks(logits.shape[0], logits.shape[1]):
        temperature = _of(row_temperature, rows)
        z, tanh = _final_logits(logits[rows, : options.vocab_size].to(dtype), options, temperature)
        dz = _gradient(z, targets[rows], gradients.of(rows), options, temperature, tanh)
        dlogits[rows, : options.vocab_size] = dz.to(logits.dtype)
    return dlogits


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    row_temperature: Tensor | None = None,
    logits: Tensor | None = None,
) -> ForwardResult:
    """Statistics of ``hidden [N, D] @ weight [V, D].T + bias [V]`` at ``targets [N]``.

    ``logits [N, vocab_size]``, of the dtype of the statistics, is filled with what :func:`linear_backward` can use
    instead of computing the logits again.
    """
    dtype = statistics_dtype(hidden.dtype)
    weight_VD = weight[: options.vocab_size].to(dtype)
    bias_V = None if bias is None else bias[: options.vocab_size].to(dtype)
    parts = []
    for rows in _row_chunks(hidden.shape[0], options.vocab_size):
        product = _logits(hidden[rows].to(dtype), weight_VD, bias_V)
        if logits is not None:
            logits[rows] = product
        z, _ = _final_logits(product, options, _of(row_temperature, rows))
        parts.append(_statistics(z, targets[rows], options))
    return _concatenate(parts)


def linear_backward(
    gradients: RowGradients,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    row_temperature: Tensor | None = None,
    logits: Tensor | None = None,
    dweight_sum: Tensor | None = None,
    skip_below: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to ``hidden``, ``weight`` and ``bias``, each in its operand's dtype or ``None``.

    Sums over rows are computed in float32 (float64 for float64 operands) and rounded once. With ``logits``, which
    :func:`linear_forward` filled, the logits are not computed again; ``logits`` may be overwritten. With ``dweight_sum
    [V, D]``, of the dtype of the statistics, the weight's gradient is added to it, and ``None`` is returned instead.
    ``skip_below [N]`` allows a backend to leave out smaller gradients of a row; this one never does.
    """
    vocab_size = options.vocab_size
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
        product = _logits(hidden_ND, weight_VD, bias_V) if logits is None else logits[rows]
        temperature = _of(row_temperature, rows)
        z, tanh = _final_logits(product, options, temperature)
        dz = _gradient(z, targets[rows], gradients.of(rows), options, temperature, tanh)
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
    """Indices of the rows of ``dlogits [N, C]`` with a NaN, or an absolute value of at least ``skip_below [N]``."""
    return (~(dlogits.abs().amax(dim=1) < skip_below)).nonzero().squeeze(-1)


def _row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _of(row_temperature: Tensor | None, rows: slice) -> Tensor | None:
    return None if row_temperature is None else row_temperature[rows, None]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = hidden @ weight.T
    return z if bias is None else z + bias


def _final_logits(z: Tensor, options: Options, temperature: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tanh = None
    if options.softcap is not None:
        tanh = torch.tanh(z / options.softcap)
        z = options.softcap * tanh
    if temperature is not None:
        return z / temperature, tanh
    return (z if options.temperature == 1.0 else z / options.temperature), tanh


def _statistics(z: Tensor, targets: Tensor, options: Options) -> ForwardResult:
    z_max, argmax = z.max(dim=-1, keepdim=True) if options.with_argmax else (z.amax(dim=-1, keepdim=True), None)
    shifted = z - z_max
    exp = shifted.exp()
    total = exp.sum(dim=-1)
    log_total = total.log()
    entropy = mean_logprob = None
    if options.with_entropy:
        # 0 * (-inf) is NaN in floating point, and must count as 0 in the entropy.
        entropy = log_total - torch.where(exp == 0, 0.0, exp * shifted).sum(dim=-1) / total
    if options.label_smoothing:
        mean_logprob = shifted.mean(dim=-1) - log_total
    target_logit = z.gather(-1, targets[:, None]).squeeze(-1)
    z_max = z_max.squeeze(-1)
    if argmax is not None:  # `max` may return any of several equal columns
        argmax = (z == z_max[:, None]).to(torch.uint8).argmax(dim=-1)
    return ForwardResult(
        logprob=(target_logit - z_max) - log_total,
        logsumexp=z_max.double() + log_total,
        target_logit=target_logit,
        entropy=entropy,
        mean_logprob=mean_logprob,
        argmax=argmax,
        max_logit=z_max if options.with_argmax else None,
    )


def _gradient(
    z: Tensor,
    targets: Tensor,
    row: RowGradients,
    options: Options,
    temperature: Tensor | None,
    tanh: Tensor | None,
) -> Tensor:
    probability = (z - row.logsumexp[:, None]).exp()
    factor = row.mass[:, None]
    if row.slope is not None:
        factor = factor - row.slope[:, None] * (z - row.mean_logit[:, None])
    dz = torch.where(probability == 0, 0.0, probability * factor)
    dz.scatter_add_(-1, targets[:, None], row.onehot[:, None].to(dz.dtype))
    if row.uniform is not None:
        dz += row.uniform[:, None]
    if temperature is not None:
        dz = dz / temperature
    elif options.temperature != 1.0:
        dz = dz / options.temperature
    if tanh is not None:
        dz = dz * (1.0 - tanh.square())
    return dz


def _concatenate(parts: list[ForwardResult]) -> ForwardResult:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return ForwardResult(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore
