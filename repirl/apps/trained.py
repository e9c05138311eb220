"""A trained PRM or policy for a command: an exported one, or that of a run's checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError

from repirl.checkpoint.fingerprints import fingerprint_model
from repirl.checkpoint.manifest import checksum, list_checkpoints, resolve_checkpoint
from repirl.config import ConfigError
from repirl.export import export_checkpoint
from repirl.foreign import CONVENTIONS, load_foreign
from repirl.model_files import of_same_export, read_model_config
from repirl.models import quiet_transformers
from repirl.prm import PRM, PromptFormat, load_prm

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Placed:
    """How a PRM is loaded.

    Args:
        device: where it computes; None for a GPU if there is one.
        dtype: of its weights, one of DTYPES.
        reference: where the reference of `implicit` rewards is now, if it moved.
        tokens: what one forward pass may hold.
        convention: how a PRM of others is read, a key of foreign.CONVENTIONS; None for one that describes itself.
    """

    device: str | None = None
    dtype: str = "float32"
    reference: str | None = None
    tokens: int = 16384
    convention: str | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"--tokens is {self.tokens}, expected at least 1")
        if self.convention is not None and self.convention not in CONVENTIONS:
            raise ConfigError(f"--convention is {self.convention!r}, expected one of {', '.join(CONVENTIONS)}")
        if self.convention is not None and self.reference is not None:
            raise ConfigError(f"--reference {self.reference}: rewards by --convention have none, leave it out")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.device is not None:
            try:
                kind = torch.device(self.device).type
            except RuntimeError as error:
                raise ConfigError(f"--device is {self.device!r}, expected cpu, cuda or cuda:N") from error
            if kind == "cuda" and not torch.cuda.is_available():
                raise ConfigError(f"--device is {self.device!r}, but PyTorch sees no GPU here; use --device cpu")


@contextmanager
def trained_prm(name: str | os.PathLike, placed: Placed) -> Iterator[tuple[PRM, dict[str, str]]]:
    """Load the PRM of an export's folder `prm`, of the hub, or of a run's folder or step_N folder.

    Yields:
        The PRM, and fingerprints of the models that its rewards depend on, by name.

    Raises:
        ConfigError: as `load_prm` and `export_checkpoint`.
    """
    quiet_transformers()
    if not is_run(name):
        prm = _load(os.fspath(name), placed)
        yield prm, {"prm": fingerprint_model(os.fspath(name)), **_reference(prm, placed)}
        return
    checkpoint = resolve_checkpoint(Path(name))
    with TemporaryDirectory(prefix="repirl-") as folder:
        export_checkpoint(checkpoint, folder)
        if not Path(folder, "prm").is_dir():
            raise ConfigError(f"the run of {os.fspath(checkpoint)!r} has trained no PRM")
        prm = _load(str(Path(folder, "prm")), placed)
        # A checkpoint's manifest holds the checksums of all its files.
        prints = {"prm": f"checkpoint, digest {checksum(checkpoint / 'manifest.json'):08x}"}
        described = prm.description.reference
        moved = described is not None and not Path(described.model).is_relative_to(folder)
        yield prm, prints | (_reference(prm, placed) if moved or placed.reference else {})


@contextmanager
def trained_policy(name: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Find the policy of an export's folder `policy`, of the hub, or of a run's folder or step_N folder.

    Yields:
        The folder or hub id of the model, and its fingerprint.

    Raises:
        ConfigError: there is no model, the run has trained no policy, or it is a PRM.
    """
    quiet_transformers()
    if not is_run(name):
        policy_options(os.fspath(name))
        yield os.fspath(name), fingerprint_model(os.fspath(name))
        return
    checkpoint = resolve_checkpoint(Path(name))
    with TemporaryDirectory(prefix="repirl-") as folder:
        export_checkpoint(checkpoint, folder)
        policy = Path(folder, "policy")
        if not policy.is_dir():
            raise ConfigError(f"the run of {os.fspath(checkpoint)!r} has trained no policy")
        yield str(policy), f"checkpoint, digest {checksum(checkpoint / 'manifest.json'):08x}"


def policy_options(model: str) -> dict[str, Any]:
    """Options of `data` by which an exported policy was given its prompts; empty for a model that does not say so.

    Raises:
        ConfigError: there is no model, it is an exported PRM, or what it says of itself cannot be used.
    """
    described = getattr(read_model_config(model), "repirl", None)
    if not isinstance(described, dict):
        return {}
    if described.get("role") == "prm":
        raise ConfigError(
            f"{model!r} is the PRM of an export (config.json, key `repirl`): {of_same_export(model, 'policy')}"
        )
    try:
        return PromptFormat.model_validate(described.get("prompt")).model_dump()
    except ValidationError as error:
        raise ConfigError(
            f"the description in {model!r} (config.json, key `repirl`) has a wrong 'prompt': export the policy again "
            "with this version of repirl"
        ) from error


def is_run(name: str | os.PathLike) -> bool:
    """Whether it is a run's folder, or a step_N folder, rather than a model."""
    path = Path(name)
    return (path / "manifest.json").is_file() or any(list_checkpoints(p) for p in (path, path / "checkpoints"))


def _load(name: str, placed: Placed) -> PRM:
    dtype = getattr(torch, placed.dtype)
    if placed.convention is not None:
        return load_foreign(
            name, placed.convention, device=placed.device, dtype=dtype, tokens_per_microbatch=placed.tokens
        )
    return load_prm(
        name,
        device=placed.device,
        dtype=dtype,
        tokens_per_microbatch=placed.tokens,
        reference=placed.reference,
    )


def _reference(prm: PRM, placed: Placed) -> dict[str, str]:
    described = prm.description.reference
    if prm.reference is None:
        return {}
    model = placed.reference or (described.model if described else None)
    assert model is not None
    return {"reference": fingerprint_model(model, described.gguf_file if described else None)}
