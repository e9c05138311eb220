"""The native CPU backend, with a C++ module.

On a machine that has AVX-512 with bfloat16, the C++ module does everything, one tile at a time, so that a tile's logits
stay in the cache. On other machines, and for float16, torch computes the matrix products in float32, for one slab of
the vocabulary at a time, and converts half-precision operands slab by slab; the C++ module computes the rest. In both
cases logits are never rounded to half precision, and gradients are summed in float32 and rounded once.

Functions have the signatures and meaning of :mod:`repirl_kernels.reference`.

Axes: N rows (tokens), D features, V vocabulary, C columns of a slab.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from repirl_kernels.operands import Options
from repirl_kernels.reference import ForwardResult, RowGradients, rows_above

# Why the C++ module cannot be loaded although it is there, such as a C++ runtime older than the one it was built with.
_load_error: ImportError | None = None
try:
    import repirl_kernels._native as _native
except ModuleNotFoundError:
    _native = None  # type: ignore[assignment]
except ImportError as error:
    _native, _load_error = None, error  # type: ignore[assignment]

# The number of logits in a slab: 16 MiB in float32. Smaller slabs would fit better into the caches, but would make the
# matrix products slower by more than that.
_SLAB_ELEMENTS = 2**22
# The largest size of the C++ module's buffers for the gradient of a slab. A slab has at least 384 columns, even if its
# buffers are then larger.
_WORKSPACE_BYTES = 8 << 20
# With fewer columns, the product reads all of hidden but computes little.
_MIN_SLAB_COLUMNS = 1024
_PANEL_COLUMNS = 48  # the C++ module's kPanelColumns


def is_available() -> bool:
    """Whether the C++ module was built when the package was installed, and can be loaded."""
    return _native is not None


def why_not() -> str:
    """What is wrong where :func:`is_available` is false."""
    return "is not built" if _load_error is None else f"cannot be loaded ({_load_error})"


def instruction_sets() -> list[str]:
    """The instruction sets that the C++ module can use on this machine, the fastest last."""
    return _native.instruction_sets()


def instruction_set() -> str:
    """The instruction set in use: the fastest, unless :func:`use_instruction_set` chose another."""
    return _native.instruction_set()


def use_instruction_set(name: str) -> None:
    """Use another of :func:`instruction_sets` from now on. ValueError if ``name`` is none of them."""
    _native.use_instruction_set(name)


def has_products(dtype: torch.dtype) -> bool:
    """Whether, on this machine, the C++ module itself computes the matrix products of operands of this dtype.

    If it does, it never converts an operand to float32 as a whole. What the forward pass keeps for the gradients is
    then a buffer in a layout that only the C++ module reads (see :func:`buffer_bytes`), not a tensor of logits.
    """
    return dtype in (torch.float32, torch.bfloat16) and is_available() and _native.has_products()


def buffer_bytes(num_rows: int, num_features: int, dtype: torch.dtype, options: Options, in_gradient: bool) -> int:
    """The size of the buffer in which :func:`linear_forward` keeps values for the gradients.

    The buffer exists only for a dtype that :func:`has_products`. For bfloat16 operands without a softcap it holds
    exp(z - maximum) in bfloat16, which is exact enough for gradients in bfloat16. With a softcap, whose derivative
    needs more digits, and for float32 operands it holds the logits in float32.

    The C++ function ``kept_bytes`` computes the same size, and the C++ module checks that the buffer has it.

    Args:
        num_rows: the number of rows, N. Under ``torch.compile`` it may be a symbol.
        num_features: the number of features, D.
        dtype: the dtype of the operands.
        options: vocabulary size and softcap.
        in_gradient: whether kept values may also use the memory of the weight's gradient. Values as large as an element
            of the weight are put there first, as many as fit; each part of the gradient is written after the values in
            its place have been read.

    Returns:
        The number of bytes.
    """
    vocab_size = options.vocab_size
    powers = dtype == torch.bfloat16 and options.softcap is None
    value_bytes = 2 if powers else 4
    maxima_bytes = -(-vocab_size // _PANEL_COLUMNS) * num_rows * 4 if powers else 0
    buffer_rows = num_rows
    if in_gradient and value_bytes == dtype.itemsize:
        buffer_rows = torch.sym_max(num_rows - num_features, 0)  # with sym_max, torch.compile makes one graph for all N
    return maxima_bytes + buffer_rows * vocab_size * value_bytes


def logits_forward(
    logits: Tensor, targets: Tensor, options: Options, row_temperature: Tensor | None = None
) -> ForwardResult:
    """Statistics of the rows of ``logits [N, V]`` at ``targets [N]``, in one pass."""
    state = _RunningStatistics(targets, options, row_temperature)
    if logits.dtype == torch.float16:
        for first, last in _slabs(logits.shape[0], options.vocab_size):
            state.update(logits[:, first:last].float(), None, first)
    else:
        state.update(logits[:, : options.vocab_size], None, 0)
    return state.result()


def logits_backward(
    gradients: RowGradients,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    row_temperature: Tensor | None = None,
) -> Tensor:
    """Gradient of ``logits``: ``[N, V]`` in their dtype; 0 in columns >= ``vocab_size``."""
    vocab_size = options.vocab_size
    rows = _Gradients(gradients, targets, options, row_temperature)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
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
    options: Options,
    row_temperature: Tensor | None = None,
    logits: Tensor | None = None,
    dweight: Tensor | None = None,
) -> ForwardResult:
    """Statistics of ``hidden [N, D] @ weight [V, D].T + bias [V]`` at ``targets [N]``.

    Values for the backward pass are written to ``logits`` if it is given. It is float32 ``[N, vocab_size]`` and gets
    the logits before bias, softcap and temperature. For a dtype that :func:`has_products` it is instead a uint8 buffer
    of :func:`buffer_bytes`; ``dweight`` is then the memory of the weight's gradient if values are kept there, too.
    """
    vocab_size = options.vocab_size
    state = _RunningStatistics(targets, options, row_temperature)
    bias_V = None if bias is None else bias.detach().float()[:vocab_size]
    if has_products(hidden.dtype):
        function: Callable[..., None] = (
            _native.linear_forward_bf16 if hidden.dtype == torch.bfloat16 else _native.linear_forward_f32
        )
        function(
            _bits(_whole_words(hidden)), _bits(weight[:vocab_size]), bias_V, *state.transform, state.targets,
            *state.columns, logits, None if dweight is None else _bits(dweight[:vocab_size]), torch.get_num_threads(),
        )  # fmt: skip
        return state.result()
    hidden_ND = hidden.detach().float()
    buffer = None
    for first, last in _slabs(hidden.shape[0], vocab_size):
        buffer = _product(hidden_ND, weight[first:last].detach().float(), buffer)
        if logits is not None:
            logits[:, first:last] = buffer
        state.update(buffer, None if bias_V is None else bias_V[first:last], first)
    return state.result()


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
    num_logits_rows: int = 0,
    logits_rows: Tensor | None = None,
    dweight: Tensor | None = None,
    dweight_sum: Tensor | None = None,
    skip_below: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``hidden``, ``weight`` and ``bias``, each in its operand's dtype or ``None``.

    Args:
        logits: the tensor or buffer that :func:`linear_forward` filled; then the logits are not computed again. It may
            be overwritten.
        num_logits_rows: if ``logits`` is a buffer, the number of rows N of the forward pass.
        logits_rows: if ``logits`` is a buffer, the indices of these rows among those of the forward pass; ``None`` if
            they are all rows.
        dweight: if ``logits`` is a buffer, the ``dweight`` of the forward pass. The weight's gradient is written there,
            and ``dweight`` is returned.
        dweight_sum: float32 ``[V, D]``; the weight's gradient is added to it, and ``None`` is returned in its place.
        skip_below: ``[N]``; if all gradients of a row's logits in a range of columns are below this value, the range is
            left out for this row.

    The other arguments are those of :func:`linear_forward`; ``need_hidden``, ``need_weight`` and ``need_bias`` say
    which gradients are computed.
    """
    vocab_size = options.vocab_size
    rows = _Gradients(gradients, targets, options, row_temperature)
    bias_V = None if bias is None else bias.detach().float()[:vocab_size]
    dhidden = torch.empty(hidden.shape, dtype=torch.float32, device="cpu") if need_hidden else None
    if need_weight and dweight_sum is None and dweight is None:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
    dbias = torch.zeros(weight.shape[0], dtype=torch.float32, device="cpu") if need_bias else None
    if dweight is not None:
        dweight[vocab_size:] = 0
    if has_products(hidden.dtype):
        function: Callable[..., None] = (
            _native.linear_backward_bf16 if hidden.dtype == torch.bfloat16 else _native.linear_backward_f32
        )
        function(
            _bits(_whole_words(hidden)), _bits(weight[:vocab_size]), bias_V, *rows.transform, rows.targets,
            *rows.columns, dhidden,
            None if dweight is None else _bits(dweight[:vocab_size]),
            None if dweight_sum is None else dweight_sum[:vocab_size],
            None if dbias is None else dbias[:vocab_size],
            logits, num_logits_rows, logits_rows, skip_below, _WORKSPACE_BYTES, torch.get_num_threads(),
        )  # fmt: skip
    else:
        _backward_by_slabs(
            rows, hidden, weight, bias_V, vocab_size, dhidden, dweight, dweight_sum, dbias, logits, skip_below
        )
    return (
        None if dhidden is None else dhidden.to(hidden.dtype),
        dweight,
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _backward_by_slabs(
    rows: "_Gradients",
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocab_size: int,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    dweight_sum: Tensor | None,
    dbias: Tensor | None,
    logits: Tensor | None,
    skip_below: Tensor | None,
) -> None:
    """Compute the gradients with torch's matrix products, slab by slab, and write them to the given tensors."""
    hidden_ND = hidden.detach().float()
    if dhidden is not None:
        dhidden.zero_()
    buffer = None
    for first, last in _slabs(hidden.shape[0], vocab_size):
        weight_CD = weight[first:last].detach().float()
        dz = buffer = _product(hidden_ND, weight_CD, buffer) if logits is None else logits[:, first:last]
        rows.write(dz, dz, None if bias is None else bias[first:last], first)
        if dbias is not None:
            torch.sum(dz, dim=0, out=dbias[first:last])
        hidden_part, row_indices = hidden_ND, None
        if skip_below is not None:
            row_indices = rows_above(dz, skip_below)
            dz, hidden_part = dz[row_indices], hidden_ND[row_indices]
        if dhidden is not None:
            if row_indices is None:
                dhidden.addmm_(dz, weight_CD)
            else:
                dhidden.index_add_(0, row_indices, dz @ weight_CD)
        if dweight_sum is not None:
            dweight_sum[first:last].addmm_(dz.T, hidden_part)
        elif dweight is not None and weight.dtype == torch.float32:
            torch.mm(dz.T, hidden_part, out=dweight[first:last])
        elif dweight is not None:
            # torch sums the products of half-precision operands in float32 over all rows, and rounds once.
            torch.mm(dz.to(weight.dtype).T, hidden_part.to(weight.dtype), out=dweight[first:last])


def _whole_words(hidden: Tensor) -> Tensor:
    """Add a column of 0 if there is an odd number of bfloat16 features: the C++ module reads them in pairs."""
    if hidden.dtype == torch.bfloat16 and hidden.shape[1] % 2:
        return torch.nn.functional.pad(hidden.detach(), (0, 1))
    return hidden


def _slabs(num_rows: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    step = max(_MIN_SLAB_COLUMNS, _SLAB_ELEMENTS // num_rows // 64 * 64)
    for first in range(0, vocab_size, step):
        yield first, min(first + step, vocab_size)


def _product(hidden: Tensor, weight: Tensor, buffer: Tensor | None) -> Tensor:
    """``hidden @ weight.T``, written to ``buffer`` if that has the right shape. Only the last slab may need another."""
    if buffer is None or buffer.shape[1] != weight.shape[0]:
        buffer = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float32, device="cpu")
    return torch.mm(hidden, weight.T, out=buffer)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor in the form that the C++ module accepts: bfloat16 is passed as uint16, because DLPack readers often
    do not know bfloat16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


# The arguments of the C++ module: the temperature, a temperature for each row (or None), and the softcap (0 for none).
_Transform = tuple[float, Tensor | None, float]


def _transform(options: Options, row_temperature: Tensor | None) -> _Transform:
    rows = None if row_temperature is None else row_temperature.detach().float().contiguous()
    return options.temperature, rows, options.softcap or 0.0


class _RunningStatistics:
    """The statistics of all rows over the columns that were passed to `update` so far."""

    def __init__(self, targets: Tensor, options: Options, row_temperature: Tensor | None) -> None:
        num_rows = targets.shape[0]
        self.targets = targets.contiguous()
        self.transform = _transform(options, row_temperature)
        self.vocab_size = options.vocab_size
        # The dtypes are fixed, because the C++ module writes these tensors.
        self.maximum = torch.full((num_rows,), -torch.inf, dtype=torch.float32, device="cpu")
        self.total = torch.zeros(num_rows, dtype=torch.float64, device="cpu")
        self.weighted = torch.zeros(num_rows, dtype=torch.float64, device="cpu") if options.with_entropy else None
        self.target_logit = torch.full((num_rows,), torch.nan, dtype=torch.float32, device="cpu")
        self.sum = torch.zeros(num_rows, dtype=torch.float64, device="cpu") if options.label_smoothing else None
        self.argmax = torch.full((num_rows,), -1, dtype=torch.int64, device="cpu") if options.with_argmax else None

    @property
    def columns(self) -> tuple[Tensor | None, ...]:
        return self.maximum, self.total, self.weighted, self.target_logit, self.sum, self.argmax

    def update(self, slab: Tensor, bias: Tensor | None, first_column: int) -> None:
        """Add the columns of ``slab [N, C]``, of which the first is column ``first_column`` of the vocabulary."""
        function: Callable[..., None] = _native.update_bf16 if slab.dtype == torch.bfloat16 else _native.update_f32
        function(_bits(slab), bias, *self.transform, self.targets, first_column, *self.columns, torch.get_num_threads())

    def result(self) -> ForwardResult:
        """The statistics. They are NaN in a row in which all logits are -inf."""
        total = torch.where(self.maximum == -torch.inf, torch.nan, self.total)
        log_total = total.log()
        maximum = self.maximum.double()
        entropy = mean_logprob = None
        if self.weighted is not None:
            entropy = (log_total - self.weighted / total).float()
        if self.sum is not None:
            mean_logprob = self.sum / self.vocab_size - (maximum + log_total)
        return ForwardResult(
            logprob=((self.target_logit.double() - maximum) - log_total).float(),
            logsumexp=maximum + log_total,
            target_logit=self.target_logit,
            entropy=entropy,
            mean_logprob=mean_logprob,
            argmax=self.argmax,
            max_logit=None if self.argmax is None else self.maximum,
        )


class _Gradients:
    """The values from which the gradient of a row is computed, except its logits."""

    def __init__(
        self, gradients: RowGradients, targets: Tensor, options: Options, row_temperature: Tensor | None
    ) -> None:
        self.targets = targets.contiguous()
        self.transform = _transform(options, row_temperature)
        zeros = torch.zeros_like(gradients.mass)

        def column(values: Tensor | None) -> Tensor:
            return (zeros if values is None else values).detach().float().contiguous()

        self.columns = (
            *(column(gradients.logsumexp), column(gradients.mean_logit), column(gradients.mass)),
            *(column(gradients.onehot), column(gradients.slope), column(gradients.uniform)),
        )

    def write(self, slab: Tensor, out: Tensor, bias: Tensor | None, first_column: int) -> None:
        """Write the gradient of ``slab [N, C]`` to ``out``, which may be ``slab``."""
        function: Callable[..., None] = _native.gradient_bf16 if slab.dtype == torch.bfloat16 else _native.gradient_f32
        function(
            _bits(slab), _bits(out), bias, *self.transform, self.targets, first_column, *self.columns,
            torch.get_num_threads(),
        )  # fmt: skip
