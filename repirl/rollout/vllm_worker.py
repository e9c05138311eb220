"""Code that runs inside vLLM's workers: it loads new weights, and computes fingerprints of the weights in use.

An engine in this process calls `load_weights` on its workers; a server calls it through `WeightReceiver`, a worker
extension. This module imports only vLLM and PyTorch.
"""

from __future__ import annotations

import hmac
import json
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# A fingerprint is two sums over the elements: the bits of each times a number for its position, modulo 2^64; and the
# absolute values (NaN counts as 0), which messages show.
Fingerprint = tuple[int, float]

_MODULUS = 1 << 64
_ROW, _COLUMN = 0x9E3779B97F4A7C15 - _MODULUS, 0xC2B2AE3D27D4EB4F - _MODULUS
_ELEMENTS_AT_ONCE = 1 << 23


def fingerprint(tensor: Tensor, first_row: int = 0, first_column: int = 0) -> Fingerprint:
    """The fingerprint of a tensor, or of a part of a larger tensor.

    The fingerprint of a tensor is the sum of the fingerprints of its parts (`add`). Values count as float32. -0 and
    values too small for a normal float32 count as 0, because some matrix products turn them into 0.

    Args:
        tensor: a matrix [rows, columns], or a vector [rows].
        first_row: the row of the larger tensor at which `tensor` begins.
        first_column: the column of the larger tensor at which `tensor` begins.
    """
    matrix = tensor.detach().reshape(tensor.shape[0], -1)
    digest, total = 0, 0.0
    columns = torch.arange(first_column + 1, first_column + 1 + matrix.shape[1], device=matrix.device) * _COLUMN
    step = max(1, _ELEMENTS_AT_ONCE // max(matrix.shape[1], 1))
    for start in range(0, matrix.shape[0], step):
        part = matrix[start : start + step].float()
        size = part.abs()
        bits = part.masked_fill(size < torch.finfo(torch.float32).tiny, 0.0).contiguous().view(torch.int32)
        rows = torch.arange(first_row + start + 1, first_row + start + 1 + len(part), device=matrix.device) * _ROW
        digest += int((bits.sum(1) * rows).sum() + (bits.sum(0) * columns).sum())
        total += float(size.nan_to_num().sum(dtype=torch.float64))
    return digest % _MODULUS, total


def add(parts: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of a tensor from the fingerprints of its parts."""
    digests, totals = zip(*parts, strict=True)
    return sum(digests) % _MODULUS, float(sum(totals))


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, int, float]]:
    """Replace a worker's weights, layer by layer.

    Args:
        worker: vLLM's worker.
        weights: all weights of the model, by Hugging Face name; those of one layer follow each other.

    Returns:
        `held_weights` of the model afterwards.
    """
    worker.reload_weights(weights_iterator=weights)
    model = worker.get_model()
    refresh_head(model)
    return held_weights(model)


def refresh_head(model: nn.Module) -> None:
    """Renew the copy of the weights that a head tied to the embeddings uses on a CPU; loading does not change it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def held_weights(model: nn.Module) -> dict[str, tuple[str, int, float]]:
    """Fingerprints of the weights with which a worker's model computes.

    Returns:
        For each parameter, by a label that is the same on all workers: its Hugging Face name, and the two numbers of
        the fingerprint of this worker's part. A part that several workers hold is reported only by the first of them.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    packed = getattr(model, "packed_modules_mapping", {})
    tables = {
        id(module.weight): f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    }
    held: dict[str, tuple[str, int, float]] = {}
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        for kind, parameter in module.named_parameters(recurse=False):
            parts = packed.get(last, [last])
            labels = [".".join(filter(None, [parent, part, kind])) for part in parts]
            places = _places(module, kind, parameter, len(parts))
            fingerprints: dict[str, list[Fingerprint]] = {}
            for column, block in _blocks(module, kind, parameter):
                for label, (start, end, first_row, first_column, counts) in zip(labels, places, strict=True):
                    if counts:
                        part = fingerprint(block[start:end], first_row, first_column + column)
                        fingerprints.setdefault(label, []).append(part)
            for label, parts_here in fingerprints.items():
                # A tied head is the embedding's parameter by another name.
                tied = tables.get(id(parameter)) if isinstance(module, ParallelLMHead) else None
                held[label] = (tied or label, *add(parts_here))
    return held


# The rows [start, end) of this worker's tensor; the row and column of the whole parameter at which they begin; and
# whether this worker reports them.
_Place = tuple[int, int, int, int, bool]


def _places(module: Any, kind: str, parameter: Tensor, num_parts: int) -> list[_Place]:
    """For each parameter that vLLM fused into this one: its rows here, and its position in the whole parameter."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    rank = getattr(module, "tp_rank", 0)
    if isinstance(module, VocabParallelEmbedding):
        # The rest of the table is padding.
        shard = module.shard_indices
        rows = shard.org_vocab_end_index - shard.org_vocab_start_index
        return [(0, rows, shard.org_vocab_start_index, 0, True)]
    if isinstance(module, RowParallelLinear):
        if kind == "bias":
            return [(0, parameter.shape[0], 0, 0, rank == 0)]
        return [(0, module.output_size, 0, rank * module.input_size_per_partition, True)]
    if isinstance(module, ColumnParallelLinear):
        sizes = module.output_partition_sizes
        if num_parts != len(sizes):
            sizes = [sum(sizes)]
        places, start = [], 0
        for i, size in enumerate(sizes):
            # If there are fewer key and value heads than workers, several workers hold the same head.
            copies = module.num_kv_head_replicas if isinstance(module, QKVParallelLinear) and i > 0 else 1
            places.append((start, start + size, rank // copies * size, 0, rank % copies == 0))
            start += size
        return places
    if hasattr(module, "cpu_linear"):
        return [(0, module.output_size, 0, 0, rank == 0)]
    from vllm.distributed import get_tensor_model_parallel_rank

    return [(0, parameter.shape[0], 0, 0, get_tensor_model_parallel_rank() == 0)]


def _blocks(module: Any, kind: str, parameter: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The values with which the layer computes, in blocks of columns: (first column, block [rows, columns])."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    is_table = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    if kind != "weight" or is_table or not hasattr(module, "cpu_linear"):
        yield 0, parameter
        return
    # On a CPU a layer computes with a packed copy of its weight, and the weight itself is often gone. Applied to the
    # unit vectors the layer gives exactly the weight, because all other products are zero.
    num_columns = module.input_size_per_partition
    for column in range(0, num_columns, 256):
        width = min(256, num_columns - column)
        units = torch.zeros(width, num_columns, dtype=module.params_dtype)
        units[torch.arange(width), torch.arange(column, column + width)] = 1.0
        yield column, module.quant_method.apply(module, units).T


def describe(worker: Any) -> dict[str, Any]:
    """The options of a worker's engine that a trainer needs."""
    config = worker.vllm_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "block_size": config.cache_config.block_size,
        "vocab_size": config.model_config.get_vocab_size(),
    }


# The stream from a trainer to a worker. For each tensor: the header's length in bytes, the header (name, dtype and
# shape in JSON), and the tensor's bytes. A length of 0 ends the stream.
_LENGTH = struct.Struct("!Q")


def send_tensor(connections: Iterable[socket.socket], name: str, tensor: Tensor) -> None:
    """Send one tensor over each connection."""
    header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    encoded = json.dumps(header).encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for connection in connections:
        connection.sendall(_LENGTH.pack(len(encoded)) + encoded)
        connection.sendall(content)


def send_end(connections: Iterable[socket.socket]) -> None:
    """Send the end of the stream over each connection."""
    for connection in connections:
        connection.sendall(_LENGTH.pack(0))


def received_tensors(connection: socket.socket) -> Iterator[tuple[str, Tensor]]:
    """Receive the names and tensors of a stream, one by one.

    Raises:
        ConnectionError: the connection ended before the stream did.
    """
    while length := _LENGTH.unpack(_read(connection, _LENGTH.size))[0]:
        header = json.loads(bytes(_read(connection, length)))
        dtype, shape = getattr(torch, header["dtype"]), header["shape"]
        size = torch.Size(shape).numel() * dtype.itemsize
        yield header["name"], torch.frombuffer(_read(connection, size), dtype=dtype).reshape(shape)


def _read(connection: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the trainer ended the connection in the middle of the weights")
        view = view[count:]
    return content


def is_worker(connection: socket.socket, secret: bytes) -> bool:
    """Whether the other side sends the secret within five seconds."""
    connection.settimeout(5.0)
    try:
        return hmac.compare_digest(bytes(_read(connection, len(secret))), secret)
    except OSError:
        return False


class WeightReceiver:
    """Methods that a trainer calls through the server's /collective_rpc.

    The server is started with `vllm serve --worker-extension-cls repirl.rollout.vllm_worker.WeightReceiver`.
    """

    def repirl_describe(self) -> dict[str, Any]:
        """See describe."""
        return describe(self)

    def repirl_receive(
        self, host: str, port: str, timeout_seconds: str, secret: str
    ) -> dict[str, tuple[str, int, float]]:
        """Connect to the trainer, send it the secret, and load the weights that it sends. See load_weights."""
        timeout = float(timeout_seconds)
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(secret.encode())
            return load_weights(self, received_tensors(connection))
