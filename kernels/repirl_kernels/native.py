"""The native CPU backend: matrix products by torch over vocabulary slabs, everything between them in C++.

A slab of logits is made by one matrix product, and its statistics, or its gradient in place, are computed by
the C++ module while it is still in cache. Functions have the signatures and meaning of
:mod:`repirl_kernels.reference`.

Products are taken in float32: operands in half precision are widened slab by slab, so that their logits are
never rounded to half precision. Gradients are accumulated in float32 over the slabs and rounded once.

Axes: N rows (tokens), D features, V vocabulary, C columns of a slab.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from repirl_kernels.reference import ForwardResult

try:
    from repirl_kernels import _native
except ImportError:
    _native = None  # type: ignore[assignment]

# Logits in a slab: 2**22 float32 values, 16 MiB. Smaller slabs stay nearer to the cores, but their matrix
# products lose more than that gains.
_SLAB_ELEMENTS = 2**22
# A product with few columns reads all of hidden for little work.
_MIN_SLAB_COLUMNS = 1024


def is_available() -> bool:
    """Whether the C++ module was built when the package was installed."""
    return _native is not None


def instruction_sets() -> list[str]:
    """The instruction sets that the C++ module can use on this machine, the best one last."""
    return _native.instruction_sets()


def instruction_set() -> str:
    """The instruction set in use: the best one, unless :func:`use_instruction_set` chose another."""
    return _native.instruction_set()


def use_instruction_set(name: str) -> None:
    """Use another of :func:`instruction_sets` from now on. ValueError if ``name`` is none of them."""
    _native.use_instruction_set(name)


def logits_forward(
    logits: Tensor, targets: Tensor, temperature: float, softcap: float | None, vocab_size: int
) -> ForwardResult:
    """Statistics of the rows of ``logits [N, V]`` at ``targets [N]``, in one pass."""
    state = _RunningStatistics(targets, temperature, softcap)
    if logits.dtype == torch.float16:
        for first, last in _slabs(logits.shape[0], vocab_size):
            state.update(logits[:, first:last].float(), None, first)
    else:
        state.update(logits[:, :vocab_size], None, 0)
    return state.result()


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
    rows = _RowGradients(
        g_logprob,
        g_logsumexp,
        g_target_logit,
        g_entropy,
        targets,
        logsumexp,
        mean_logit,
        temperature,
        softcap,
    )
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    dlogits[:, vocab_size:] = 0
    if logits.dtype == torch.float16:
        for first, last in _slabs(logits.shape[0], vocab_size):
            slab = logits[:, first:last].float()
            rows.write(slab, slab, None, first)
            dlogits[:, first:last] = slab
    else:
        rows.write(logits[:, :vocab_size], dlogits[:, :vocab_size], None, 0)
    return dlogits


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
) -> ForwardResult:
    """Statistics of ``hidden [N, D] @ weight [V, D].T + bias [V]`` at ``targets [N]``, slab by slab."""
    state = _RunningStatistics(targets, temperature, softcap)
    hidden_ND = hidden.detach().float()
    bias_V = None if bias is None else bias.detach().float()
    buffer = None
    for first, last in _slabs(hidden.shape[0], vocab_size):
        buffer = _product(hidden_ND, weight[first:last].detach().float(), buffer)
        state.update(buffer, None if bias_V is None else bias_V[first:last], first)
    return state.result()


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``hidden``, ``weight`` and ``bias``, each in its operand's dtype or ``None``."""
    rows = _RowGradients(
        g_logprob,
        g_logsumexp,
        g_target_logit,
        g_entropy,
        targets,
        logsumexp,
        mean_logit,
        temperature,
        softcap,
    )
    hidden_ND = hidden.detach().float()
    bias_V = None if bias is None else bias.detach().float()
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32) if need_hidden else None
    dweight = torch.empty(weight.shape, dtype=weight.dtype) if need_weight else None
    dbias = torch.zeros(weight.shape[0], dtype=torch.float32) if need_bias else None
    if dweight is not None:
        dweight[vocab_size:] = 0
    buffer = None
    for first, last in _slabs(hidden.shape[0], vocab_size):
        weight_CD = weight[first:last].detach().float()
        buffer = _product(hidden_ND, weight_CD, buffer)
        rows.write(buffer, buffer, None if bias_V is None else bias_V[first:last], first)
        if dhidden is not None:
            dhidden.addmm_(buffer, weight_CD)
        if dweight is not None:
            if weight.dtype == torch.float32:
                torch.mm(buffer.T, hidden_ND, out=dweight[first:last])
            else:
                # Products of half-precision operands, summed over all rows in float32, rounded once.
                torch.mm(buffer.to(weight.dtype).T, hidden.detach(), out=dweight[first:last])
        if dbias is not None:
            torch.sum(buffer, dim=0, out=dbias[first:last])
    return (
        None if dhidden is None else dhidden.to(hidden.dtype),
        dweight,
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _slabs(num_rows: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    step = max(_MIN_SLAB_COLUMNS, _SLAB_ELEMENTS // num_rows // 64 * 64)
    for first in range(0, vocab_size, step):
        yield first, min(first + step, vocab_size)


def _product(hidden: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """``hidden @ weight.T``, into ``buffer`` where the shape is right: every slab but the last one's."""
    if buffer is None or buffer.shape[1] != weight.shape[0]:
        buffer = torch.empty(hidden.shape[0], weight.shape[0])
    return torch.mm(hidden, weight.T, out=buffer)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as the C++ module takes it: bfloat16, which DLPack consumers seldom know, as its bits."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


class _RunningStatistics:
    """Statistics of all rows over the columns seen so far."""

    def __init__(self, targets: Tensor, temperature: float, softcap: float | None) -> None:
        num_rows = targets.shape[0]
        self.targets = targets.contiguous()
        self.temperature = temperature
        self.softcap = softcap or 0.0
        self.maximum = torch.full((num_rows,), -torch.inf)
        self.total = torch.zeros(num_rows, dtype=torch.float64)
        self.weighted = torch.zeros(num_rows, dtype=torch.float64)
        self.target_logit = torch.full((num_rows,), torch.nan)

    def update(self, slab: Tensor, bias: Tensor | None, first_column: int) -> None:
        """Take in ``slab [N, C]``, whose columns begin at ``first_column``."""
        function = _native.update_bf16 if slab.dtype == torch.bfloat16 else _native.update_f32
        function(
            _bits(slab), bias, self.temperature, self.softcap, self.targets, first_column,
            self.maximum, self.total, self.weighted, self.target_logit, torch.get_num_threads(),
        )  # fmt: skip

    def result(self) -> ForwardResult:
        """The statistics; NaN for a row whose every column is banned."""
        total = torch.where(self.maximum == -torch.inf, torch.nan, self.total)
        log_total = total.log()
        mean_shifted = self.weighted / total
        maximum = self.maximum.double()
        return ForwardResult(
            logprob=((self.target_logit.double() - maximum) - log_total).float(),
            logsumexp=maximum + log_total,
            target_logit=self.target_logit,
            entropy=(log_total - mean_shifted).float(),
            mean_logit=maximum + mean_shifted,
        )


class _RowGradients:
    """What each row's gradient needs beside its logits."""

    def __init__(
        self,
        g_logprob: Tensor,
        g_logsumexp: Tensor,
        g_target_logit: Tensor,
        g_entropy: Tensor,
        targets: Tensor,
        logsumexp: Tensor,
        mean_logit: Tensor,
        temperature: float,
        softcap: float | None,
    ) -> None:
        self.targets = targets.contiguous()
        self.temperature = temperature
        self.softcap = softcap or 0.0
        self.logsumexp = logsumexp.detach().contiguous()
        self.mean_logit = mean_logit.detach().contiguous()
        self.mass = (g_logsumexp - g_logprob).detach()
        self.onehot = (g_target_logit + g_logprob).detach()
        self.slope = g_entropy.detach().contiguous()

    def write(self, slab: Tensor, out: Tensor, bias: Tensor | None, first_column: int) -> None:
        """Write the gradient of ``slab [N, C]`` to ``out``, which may be ``slab``."""
        function = _native.gradient_bf16 if slab.dtype == torch.bfloat16 else _native.gradient_f32
        function(
            _bits(slab), _bits(out), bias, self.temperature, self.softcap, self.targets, first_column,
            self.logsumexp, self.mean_logit, self.mass, self.onehot, self.slope, torch.get_num_threads(),
        )  # fmt: skip
