"""What runs inside vLLM: taking new weights, and telling what is held.

`load_weights` and `held_weights` are called on the workers of an engine in this process; a server calls them through
`WeightReceiver`, a worker extension. Apart from vLLM itself this module needs PyTorch only.
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

# A fingerprint is (a sum over all bits and places modulo 2^64, the sum of absolute values, where NaN counts nothing).
Fingerprint = tuple[int, float]

_MODULUS = 1 << 64
_ROW, _COLUMN = 0x9E3779B97F4A7C15 - _MODULUS, 0xC2B2AE3D27D4EB4F - _MODULUS
_ELEMENTS_AT_ONCE = 1 << 23


def fingerprint(tensor: Tensor, first_row: int = 0, first_column: int = 0) -> Fingerprint:
    """Fingerprint of a matrix [rows, columns], or of a vector [rows]; both numbers are sums over the elements.

    first_row, first_column: where the tensor stands in a larger one, whose fingerprint is the sum of those of its
    parts. Values are compared as float32; -0 is 0, and so is what is too small for a normal float32, as some matrix
    products make it so.
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
    """The fingerprint of the whole from those of its parts."""
    digests, totals = zip(*parts, strict=True)
    return sum(digests) % _MODULUS, float(sum(totals))


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, int, float]]:
    """Replace a worker's weights by those of the iterator (all of the model, by their Hugging Face names, a layer's
    next to each other), layer by layer; returns what is held then (held_weights)."""
    worker.reload_weights(weights_iterator=weights)
    model = worker.get_model()
    refresh_head(model)
    return held_weights(model)


def refresh_head(model: nn.Module) -> None:
    """On a CPU a head tied to the embeddings computes with a packed copy of its own, which loading leaves as it was."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def held_weights(model: nn.Module) -> dict[str, tuple[str, int, float]]:
    """What a worker's model computes with: a label -> the parameter's Hugging Face name, and the fingerprint of the
    part of it that is here (in tensor parallel, what several workers hold alike is told by the first of them)."""
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
            found: dict[str, list[Fingerprint]] = {}
            for column, block in _blocks(module, kind, parameter):
                for label, (start, end, first_row, first_column, counts) in zip(labels, places, strict=True):
                    if counts:
                        part = fingerprint(block[start:end], first_row, first_column + column)
                        found.setdefault(label, []).append(part)
            for label, fingerprints in found.items():
                # A tied head is the embedding's parameter by another name.
                tied = tables.get(id(parameter)) if isinstance(module, ParallelLMHead) else None
                held[label] = (tied or label, *add(fingerprints))
    return held


# Rows of the held tensor [start, end), where they begin in the whole parameter (row, column), whether they count.
_Place = tuple[int, int, int, int, bool]


def _places(module: Any, kind: str, parameter: Tensor, num_parts: int) -> list[_Place]:
    """Where each of the parameters that are fused into this one lies, here and in the whole model."""
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
            # Key and value heads that are fewer than the workers are held several times.
            copies = module.num_kv_head_replicas if isinstance(module, QKVParallelLinear) and i > 0 else 1
            places.append((start, start + size, rank // copies * size, 0, rank % copies == 0))
            start += size
        return places
    if hasattr(module, "cpu_linear"):
        return [(0, module.output_size, 0, 0, rank == 0)]
    from vllm.distributed import get_tensor_model_parallel_rank

    return [(0, parameter.shape[0], 0, 0, get_tensor_model_parallel_rank() == 0)]


def _blocks(module: Any, kind: str, parameter: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A parameter as the layer computes with it: first column and [rows, columns], block by block."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    is_table = isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    if kind != "weight" or is_table or not hasattr(module, "cpu_linear"):
        yield 0, parameter
        return
    # On a CPU a layer computes with a packed copy, and often nothing else of its weight is left. What it answers to
    # the unit vectors is the weight, exactly: every other product is zero.
    num_columns = module.input_size_per_partition
    for column in range(0, num_columns, 256):
        width = min(256, num_columns - column)
        units = torch.zeros(width, num_columns, dtype=module.params_dtype)
        units[torch.arange(width), torch.arange(column, column + width)] = 1.0
        yield column, module.quant_method.apply(module, units).T


def describe(worker: Any) -> dict[str, Any]:
    """What a trainer has to know of the engine that a worker belongs to."""
    config = worker.vllm_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "block_size": config.cache_config.block_size,
        "vocab_size": config.model_config.get_vocab_size(),
    }


# The stream from a trainer to a worker: for each tensor the length of a header, the header (name, dtype, shape) in
# JSON, and the bytes; a length of 0 ends it.
_LENGTH = struct.Struct("!Q")


def send_tensor(connections: Iterable[socket.socket], name: str, tensor: Tensor) -> None:
    """Write one tensor to each connection."""
    header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    encoded = json.dumps(header).encode()
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for connection in connections:
        connection.sendall(_LENGTH.pack(len(encoded)) + encoded)
        connection.sendall(content)


def send_end(connections: Iterable[socket.socket]) -> None:
    """Tell each connection that no tensor follows."""
    for connection in connections:
        connection.sendall(_LENGTH.pack(0))


def received_tensors(connection: socket.socket) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the other end sends, one by one. ConnectionError where the stream breaks off."""
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
    """Whether the other end says the secret, within a few seconds."""
    connection.settimeout(5.0)
    try:
        return hmac.compare_digest(bytes(_read(connection, len(secret))), secret)
    except OSError:
        return False


class WeightReceiver:
    """vllm serve --worker-extension-cls repirl.rollout.vllm_worker.WeightReceiver: methods that a trainer calls
    through the server's /collective_rpc."""

    def repirl_describe(self) -> dict[str, Any]:
        """See describe."""
        return describe(self)

    def repirl_receive(
        self, host: str, port: str, timeout_seconds: str, secret: str
    ) -> dict[str, tuple[str, int, float]]:
        """Connect to the trainer and load the weights that it sends to who knows the secret; returns what is held
        then."""
        timeout = float(timeout_seconds)
        with socket.create_connection((host, int(port)), timeout) as connection:
            connection.sendall(secret.encode())
            return load_weights(self, received_tensors(connection))
