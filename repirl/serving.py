"""An exported `value` PRM on a vLLM server: the command that serves it, and the probe, a few tokens and the PRM's
rewards at them, by which a client sees that the server serves this PRM and gives its rewards as they are."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.model_files import find_file, read_json

FILE = "probe.json"
LENGTH = 32


def serve_command(prm: str, dtype: str = "float32") -> list[str]:
    """The words of the command that serves an exported PRM. Without --dtype vLLM computes float32 weights in a shorter
    type, and without use_activation it gives sigmoids to those who do not ask for anything else."""
    pooler = json.dumps({"task": "token_classify", "use_activation": False})
    return [
        *("vllm", "serve", prm, "--runner", "pooling", "--convert", "classify", "--pooler-config", pooler),
        *("--dtype", dtype, "--host", "127.0.0.1", "--port", "8000"),
    ]


@dataclass(frozen=True)
class Probe:
    """token_ids: one sequence · rewards: at each of its tokens but the first, computed in float32 from the weights as
    they are exported."""

    token_ids: list[int]
    rewards: list[float]

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n")


def take_probe(model: PreTrainedModel) -> Probe:
    """The probe of a fused token classifier with one output, of any dtype."""
    size, dtype = model.config.vocab_size, model.dtype
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    # Any ids would do. These are different ones where the vocabulary is large.
    ids = [(7919 * i + 13) % size for i in range(length)]
    nn.Module.to(model, torch.float32)
    value = Learner(model, None, tokens_per_microbatch=length).score(pack([(ids[:1], ids[1:])]))["value"]
    nn.Module.to(model, dtype)
    return Probe(ids, value.tolist())


def read_probe(name: str) -> Probe:
    """The probe in the files of an exported PRM, a folder's or a hub's.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = find_file(name, FILE)
    if file is None:
        raise ConfigError(
            f"{name!r} has no {FILE}, by which it is checked that the server serves this PRM: export it again with "
            "this version of repirl"
        )
    content = read_json(file)
    ids: Any = content.get("token_ids")
    rewards: Any = content.get("rewards")
    is_sound = isinstance(ids, list) and isinstance(rewards, list) and len(ids) == len(rewards) + 1 > 1
    if not is_sound or not all(isinstance(value, int | float) for value in ids + rewards):
        raise ConfigError(f"{str(file)!r} is no probe of a PRM: export the PRM again with this version of repirl")
    return Probe([int(i) for i in ids], rewards)
