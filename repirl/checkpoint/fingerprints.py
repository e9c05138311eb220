"""Fingerprints of what a run learns from: models, tokenizer and data.

They tell content apart, not places: a folder or file that was moved keeps its fingerprint. Those of models are cheap:
of the weights a few bytes of each tensor are read, which all change as soon as a model is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from repirl.config import Config, ConfigError
from repirl.distributed.world import World
from repirl.model_files import StoredTensor, find_file, read_json, weight_tensors

# What is read of a tensor, from its middle, and of how many tensors at most.
SAMPLE_BYTES, MAX_SAMPLED_TENSORS = 4096, 512
# Of a GGUF file: its start, which describes the model, and as many samples.
GGUF_START_BYTES, GGUF_SAMPLES = 1 << 20, 256
# Keys of config.json that tell who wrote it, not what the model is.
WRITERS_KEYS = ("transformers_version", "torch_dtype", "dtype")


def take_fingerprints(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Sequence[Any] | None],
    world: World,
) -> dict[str, str]:
    """The fingerprints of a run, by the option that leads to each; the same on all processes.

    Args:
        config: the run's.
        tokenizer: the policy's.
        data: rows as they are trained on (dataclasses), by option; None for what the run does not read.
        world: its main process reads the models' files.
    """
    if not world.is_main:
        return dict(world.gather([]))
    learners = ("policy", *config.system.trains, *config.system.reads)
    models = {f"{name}.model": config.start_of(name) for name in learners}
    prints = {start: fingerprint_model(*start) for start in set(models.values())}
    result = {option: prints[start] for option, start in models.items()}
    result["policy.tokenizer"] = fingerprint_tokenizer(tokenizer)
    result["policy.chat_template"] = _digest([_json(tokenizer.chat_template)])
    result |= {option: fingerprint_rows(rows) for option, rows in data.items() if rows is not None}
    return dict(world.gather(list(result.items())))


def fingerprint_model(name: str, gguf_file: str | None = None) -> str:
    """Of a model's configuration, what ends its responses, and its tensors: names, shapes, types and samples.

    Args:
        name: folder or hub id.
        gguf_file: a GGUF file in it.

    Raises:
        ConfigError: where a file cannot be read.
    """
    try:
        generation = find_file(name, "generation_config.json")
        end = None if generation is None else read_json(generation).get("eos_token_id")
        if gguf_file is not None:
            path = find_file(name, gguf_file)
            assert path is not None, gguf_file
            return f"{path.stat().st_size} bytes, digest {_digest([_json(end), *_gguf_samples(path)])}"
        file = find_file(name, "config.json")
        described = {} if file is None else read_json(file)
        kept = {key: v for key, v in described.items() if not key.startswith("_") and key not in WRITERS_KEYS}
        tensors = weight_tensors(name) or {}
        return f"{len(tensors)} tensors, digest {_digest([_json(kept), _json(end), *_samples(tensors)])}"
    except OSError as error:
        raise ConfigError(f"the files of model {name!r} cannot be read: {error}") from error


def _samples(tensors: dict[str, StoredTensor]) -> Iterator[bytes]:
    """What there is to know of tensors, and a part of each, whatever files they are spread over."""
    names = sorted(tensors)
    yield _json([(name, tensors[name].dtype, tensors[name].shape) for name in names])
    chosen = names[:: -(-len(names) // MAX_SAMPLED_TENSORS) or 1]
    descriptors: dict[str, int] = {}
    try:
        for name in chosen:
            tensor = tensors[name]
            if tensor.path not in descriptors:
                descriptors[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            size = min(tensor.size, SAMPLE_BYTES)
            yield os.pread(descriptors[tensor.path], size, tensor.start + (tensor.size - size) // 2)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _gguf_samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        yield file.read(GGUF_START_BYTES)
        for number in range(GGUF_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (GGUF_SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its vocabulary and special tokens. How it splits text shows in the rows, which are token ids."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return f"{len(vocabulary)} tokens, digest {_digest([_json(vocabulary), _json(special)])}"


def fingerprint_rows(rows: Sequence[Any]) -> str:
    """Of dataclasses in their order, such as prompts: all that they hold."""
    names = [field.name for row in rows[:1] for field in fields(row)]
    return f"{len(rows)} rows, digest {_digest(_json([getattr(row, name) for name in names]) for row in rows)}"


def _digest(parts: Iterable[bytes]) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        # With its length: two parts must not be taken for others that make the same bytes.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
