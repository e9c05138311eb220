"""What can be said about a model's files before any weight is loaded: each fault one ConfigError."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from repirl.config import ConfigError, first_line

# What transformers raises for files that it cannot read, and for values in config.json that no model can have.
FILE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
    struct.error,
)
# Sizes of a model that have to be positive integers, where config.json names them; and how large each may be.
SIZES = {
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 1000,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "max_position_embeddings": 10**9,
}
POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")
# Names of packed weights and their scales, by what made them.
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".quant_state": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale": "compressed-tensors or FP8",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "consolidated.00.pth")
GGUF_MAGIC = b"GGUF"
LFS_START = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file. path: the file. dtype: by its name there. start: its first byte in the file, of
    `size` bytes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


def load_message(what: str, name: str, gguf_file: str | None, error: BaseException) -> str:
    """What to tell the user where a model or tokenizer cannot be loaded."""
    place = f"{name!r}" + (f" (gguf_file {gguf_file!r})" if gguf_file else "")
    why = f"expected a folder with a Hugging Face model. {first_line(error)}"
    if Path(name).is_file():
        why = "it is a file, expected a folder with a Hugging Face model"
    elif not Path(name).exists():
        why = "there is no such folder"
        # Whatever else may be an id of the hub.
        if not (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1):
            why += f" here, and the hub has none that can be reached: {first_line(error)}"
    return f"cannot load the {what} {place}: {why}"


def of_same_export(name: str, part: str) -> str:
    """How a message calls `part` ("policy" or "prm") of the export that the folder `name` belongs to."""
    beside = Path(name).absolute().parent / part
    called = {"prm": "PRM"}.get(part, part)
    return f"the {called} is {str(Path(name).parent / part)!r}" if beside.is_dir() else f"it wrote the {called}, too"


@contextmanager
def explained(what: str, name: str, gguf_file: str | None = None) -> Iterator[None]:
    """Turn what transformers and the libraries below it raise for bad files into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except FILE_ERRORS as error:
        raise ConfigError(load_message(what, name, gguf_file, error)) from error
    except Exception as error:
        # tokenizers raises plain exceptions; anything else is not about files.
        if type(error) is not Exception:
            raise
        raise ConfigError(load_message(what, name, gguf_file, error)) from error


def find_file(name: str, file: str) -> Path | None:
    """A file of a model, which is a folder or a hub id; None where there is none."""
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    try:
        path = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except OSError:
        # No folder and no hub id: what is loaded next says so.
        return None
    return None if path is None else Path(path)


def read_model_config(name: str, gguf_file: str | None = None) -> PretrainedConfig:
    """The configuration of a model, with values that a model can have.

    Raises:
        ConfigError: where there is none, it cannot be read, or says what cannot be; and where the folder holds no
            model that can be trained: an adapter, quantised weights, a GGUF file that is damaged.
    """
    if gguf_file is not None:
        _check_gguf(name, gguf_file)
    elif Path(name).is_dir():
        _check_folder(Path(name))
    # As it stands in the file first: some classes make lists as long as numbers in it say.
    if gguf_file is None and (file := find_file(name, "config.json")) is not None:
        _check_values(name, SimpleNamespace(**read_json(file)))
    with explained("model", name, gguf_file):
        config = AutoConfig.from_pretrained(name, gguf_file=gguf_file)
    if gguf_file is None:
        _check_values(name, config)
        method = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
        if method:
            kind = method.get("quant_method", "?") if isinstance(method, dict) else type(method).__name__
            raise ConfigError(f"model {name!r} is quantised ({kind}, quantization_config in its config.json): {_PLAIN}")
    return config


_PLAIN = (
    "packed weights cannot be trained; give the model that it was made from, or save it dequantised "
    "(model.dequantize().save_pretrained(folder))"
)


def _check_folder(folder: Path) -> None:
    file = folder / "config.json"
    if (adapter := folder / "adapter_config.json").is_file():
        content = read_json(adapter)
        base = content.get("base_model_name_or_path")
        raise ConfigError(
            f"{str(folder)!r} holds a PEFT adapter (adapter_config.json) of the base {base!r}, which would be left "
            "out: merge it into its base first - AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
            ".save_pretrained(merged), and the tokenizer beside it - and give the merged folder"
        )
    if not file.is_file():
        files = sorted(p.name for p in folder.iterdir())[:8]
        ggufs = [p.name for p in sorted(folder.glob("*.gguf"))]
        way_out = f"; to load {ggufs[0]!r} name it as gguf_file" if ggufs else ""
        raise ConfigError(
            f"{str(folder)!r} has no config.json, expected a folder that save_pretrained wrote; it holds "
            f"{files or 'nothing'}{way_out}"
        )
    read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError where it holds none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        hint = _pointer_hint(file)
        raise ConfigError(f"{str(file)!r} cannot be read as JSON{hint}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{str(file)!r} holds {content!r:.40}, expected a JSON object")
    return content


def _pointer_hint(file: Path) -> str:
    with open(file, "rb") as opened:
        start = opened.read(len(LFS_START))
    if start == LFS_START:
        return " (it is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder)"
    return ""


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_values(name: str, config: PretrainedConfig | SimpleNamespace) -> None:
    """Values that would end in a traceback, endless memory or NaN."""

    def refuse(key: str, value: Any, expected: str) -> None:
        raise ConfigError(f"config.json of model {name!r} has {key} {value!r:.60}, expected {expected}")

    for key, largest in SIZES.items():
        value = getattr(config, key, None)
        if value is None or isinstance(value, list):
            continue
        if not _is_number(value, int) or not 1 <= value <= largest:
            refuse(key, value, f"an integer from 1 to {largest}")
    for key in POSITIVE:
        value = getattr(config, key, None)
        if value is not None and not (_is_number(value, (int, float)) and 0 < value < float("inf")):
            refuse(key, value, "a positive number")
    heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        refuse("num_attention_heads", heads, f"a multiple of num_key_value_heads {groups}")
    hidden = getattr(config, "hidden_size", None)
    if isinstance(heads, int) and isinstance(hidden, int) and not getattr(config, "head_dim", None) and hidden % heads:
        refuse("hidden_size", hidden, f"a multiple of num_attention_heads {heads}, or head_dim beside it")
    size, pad = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if pad is not None and isinstance(size, int) and not (_is_number(pad, int) and -1 <= pad < size):
        refuse("pad_token_id", pad, f"an id below vocab_size {size}, or null")


# Weights.


def weight_tensors(name: str) -> dict[str, StoredTensor] | None:
    """Parameter name -> where the safetensors files of a model hold it; None where there are no such files.

    Raises:
        ConfigError: where a file is missing, damaged, or none of safetensors; where there are pickled weights only.
    """
    index = find_file(name, SAFE_WEIGHTS_INDEX_NAME)
    single = find_file(name, SAFE_WEIGHTS_NAME)
    if single is not None and (index is None or Path(name).is_dir()):
        # As transformers prefers it.
        return _read_header(single)
    if index is not None:
        return _read_index(name, index)
    if Path(name).is_dir():
        _refuse_other_formats(Path(name))
    return None


def _refuse_other_formats(folder: Path) -> None:
    pickles = [p.name for n in PICKLES if (p := folder / n).exists()]
    pickles += sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pth")] if p.name not in pickles)
    if pickles:
        raise ConfigError(
            f"{str(folder)!r} has its weights in {pickles[0]!r}, a pickle, which may run any code when it is loaded: "
            "only safetensors are read. If you trust the file, convert it once: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and the tokenizer beside it"
        )
    ggufs = sorted(p.name for p in folder.glob("*.gguf"))
    hint = f"; to load {ggufs[0]!r} name it as gguf_file" if ggufs else ""
    raise ConfigError(f"{str(folder)!r} has no weights: expected {SAFE_WEIGHTS_NAME} or its parts{hint}")


def _read_index(name: str, index: Path) -> dict[str, StoredTensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()) or not places:
        raise ConfigError(f"{str(index)!r} has no `weight_map` from names of tensors to files; download it again")
    if Path(name).is_dir():
        paths = {file: Path(name) / file for file in sorted(set(places.values()))}
    else:
        with explained("model", name):
            files, _ = get_checkpoint_shard_files(name, str(index))
        paths = {Path(f).name: Path(f) for f in files}
    tensors: dict[str, StoredTensor] = {}
    for file, path in paths.items():
        if not path.is_file():
            raise ConfigError(f"{str(index)!r} names {file!r}, which is not there: download all parts of the model")
        tensors |= _read_header(path)
    if lost := sorted(key for key in places if key not in tensors):
        raise ConfigError(
            f"{str(index)!r} says that {places[lost[0]]!r} holds {shown(lost)}, and it does not: download them again"
        )
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file whose header and length fit together."""

    def damaged(why: str) -> ConfigError:
        return ConfigError(f"{str(path)!r} is no sound safetensors file: {why}; download or save it again")

    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(max(8, len(LFS_START)))
            if start == LFS_START:
                raise ConfigError(
                    f"{str(path)!r} is a Git LFS pointer, not the weights: run `git lfs pull` in the folder, or "
                    "download the file itself"
                )
            if size < 8:
                raise damaged(f"it has {size} bytes")
            length = int.from_bytes(start[:8], "little")
            if length > size - 8:
                raise damaged(f"its header should have {length} bytes, the whole file has {size}")
            file.seek(8)
            header = json.loads(file.read(length))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise damaged(f"its header is no JSON ({first_line(error)})") from error
    try:
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((value["data_offsets"][1] for value in tensors.values()), default=0)
        stored = {key: _stored(path, value, 8 + length) for key, value in tensors.items()}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise damaged("its header does not describe tensors") from error
    if end != size - 8 - length:
        raise damaged(f"it has {size} bytes, and by its header it should have {8 + length + end} (cut off?)")
    if not tensors:
        raise damaged("it holds no tensors")
    return stored


def _stored(path: Path, entry: dict[str, Any], data_start: int) -> StoredTensor:
    """What a header's entry says; data_start: where the data begins in the file."""
    start, end = map(int, entry["data_offsets"])
    return StoredTensor(
        str(path), tuple(map(int, entry["shape"])), str(entry["dtype"]), data_start + start, end - start
    )


def shown(names: list[str], count: int = 4) -> str:
    """Names for a message: the first few, and how many there are."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(repr, names[:count])) + rest


def refuse_quantised(name: str, tensors: dict[str, StoredTensor]) -> None:
    """ConfigError where the names of tensors are those of packed weights."""
    for key in tensors:
        for ending, kind in QUANTISED.items():
            if key.endswith(ending) or f"{ending}." in key:
                raise ConfigError(f"model {name!r} is quantised ({kind}: its files hold {key!r}): {_PLAIN}")


def _check_gguf(name: str, gguf_file: str) -> None:
    """A GGUF file that is there and whole."""
    path = find_file(name, gguf_file)
    if path is None or not path.is_file():
        there = sorted(p.name for p in Path(name).glob("*.gguf")) if Path(name).is_dir() else []
        hint = f"; the folder has {there}" if there else ""
        raise ConfigError(load_message("model", name, gguf_file, OSError(f"There is no such file{hint}")))
    with open(path, "rb") as file:
        start = file.read(len(LFS_START))
    if start == LFS_START:
        raise ConfigError(f"{str(path)!r} is a Git LFS pointer, not the file: run `git lfs pull` in the folder")
    if start[:4] != GGUF_MAGIC:
        raise ConfigError(f"{str(path)!r} is no GGUF file: it begins with {start[:4]!r}, expected {GGUF_MAGIC!r}")
