"""Reading torch.distributed.checkpoint's files without running what they say.

Its index is a pickle, and values that are no tensors are pickles, too: read as PyTorch reads them, a checkpoint from
somebody else runs code. Here the index may name only the classes that PyTorch itself writes, and values may only be of
plain types.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from repirl.config import ConfigError

_ALLOWED: dict[tuple[str, str], Any] = {
    (module.__name__, name): getattr(module, name)
    for module, names in {
        metadata: "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata BytesStorageMetadata "
        "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
        filesystem: "_StorageInfo",
        pathlib: "PosixPath WindowsPath PurePosixPath PureWindowsPath",
    }.items()
    for name in names.split()
}
# The name of the module in Python 3.13, whose checkpoints others read, too.
_ALLOWED |= {("pathlib._local", name): value for (module, name), value in _ALLOWED.items() if module == "pathlib"}
_ALLOWED |= {("torch", "Size"): torch.Size, ("torch.serialization", "_get_layout"): torch.serialization._get_layout}
_ALLOWED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has") from None


class Reader(dcp.FileSystemReader):
    """Of a folder of tensors. ConfigError where the index is not one that PyTorch wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        file = self.folder / ".metadata"
        try:
            index = _Unpickler(io.BytesIO(file.read_bytes())).load()
        except OSError as error:
            raise ConfigError(f"{str(file)!r} cannot be read: {error.strerror}") from error
        except Exception as error:
            # Damaged pickles raise whatever their bytes happen to call for.
            raise ConfigError(f"{str(file)!r} is no index of a checkpoint: {error}; nothing of it was run") from error
        if not isinstance(index, metadata.Metadata):
            raise ConfigError(f"{str(file)!r} is no index of a checkpoint, but a {type(index).__name__}")
        if index.storage_meta is None:
            index.storage_meta = metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class Planner(DefaultLoadPlanner):
    """Values that are no tensors may be of plain types only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            name = read_item.dest_index.fqn
            raise ConfigError(f"the checkpoint's value {name!r} is more than plain data; it was not loaded") from error
        value.seek(0)
        super().load_bytes(read_item, value)
