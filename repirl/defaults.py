"""Defaults that depend on the device: options that were left open are set before anything is built.

run.json, the configuration in checkpoints and the memory plan hold the values that were set. A run that goes on keeps
those that it began with.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from repirl.config import Config


@dataclass(frozen=True)
class Machine:
    """What the defaults depend on.

    Args:
        device: "cpu" or "cuda".
        has_bfloat16: whether the device computes products in bfloat16 faster than in float32.
        has_vllm: whether vLLM is installed.
    """

    device: str
    has_bfloat16: bool = True
    has_vllm: bool = False


def this_machine(device: str) -> Machine:
    """The machine that this process runs on. device: "cpu" or "cuda"; a GPU that is not here is taken for a new one."""
    here = device == "cuda" and torch.cuda.is_available()
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if here else True
    return Machine(device, has_bfloat16, importlib.util.find_spec("vllm") is not None)


def set_defaults(
    config: Config, machine: Machine, before: Config | None = None, *, samples: bool | None = None
) -> tuple[Config, list[str]]:
    """Set the options whose default depends on the machine.

    Args:
        config: as it was given.
        machine: where it will run.
        before: of a run that goes on, the configuration that it began with.
        samples: whether responses are sampled; None: as training with this configuration does.

    Returns:
        The configuration with all options set, and a line for people about each choice that they should know of.
    """
    compute_dtype, about_dtype = _compute_dtype(config, machine, before)
    config = config.model_copy(update={"compute_dtype": compute_dtype})
    engine, about_engine = _engine(config, machine, before)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": engine})})
    if samples is None:
        samples = config.system.online or config.data.eval is not None
    return config, [*about_dtype, *about_engine * samples]


def _compute_dtype(config: Config, machine: Machine, before: Config | None) -> tuple[str | None, list[str]]:
    if config.compute_dtype is not None:
        return config.compute_dtype, []
    slow = machine.device == "cuda" and config.dtype == "float32"
    if before is not None:
        kept = before.compute_dtype
        line = (
            "the run goes on in float32, as it began, so the GPU's tensor cores are not used; for bfloat16: "
            "--compute_dtype bfloat16 --changed compute_dtype"
        )
        return kept, [line] if slow and kept is None else []
    if not slow:
        return None, []
    if not machine.has_bfloat16:
        return None, ["compute_dtype: float32, because this GPU has no fast bfloat16 products"]
    return "bfloat16", [
        "compute_dtype: bfloat16 for products and activations, the default on a GPU; weights and moments are float32 "
        "(compute_dtype: float32 computes all in float32, without tensor cores)"
    ]


def _engine(config: Config, machine: Machine, before: Config | None) -> tuple[str, list[str]]:
    """config: with the dtype that it will compute in."""
    engine = config.rollout.engine
    if engine == "auto" and before is not None:
        # Another engine draws other responses.
        engine = before.rollout.engine
    if engine != "auto":
        return engine, []
    if machine.device == "cpu":
        return "transformers", []
    if not machine.has_vllm:
        return "transformers", [
            "rollout.engine: transformers, the policy's own model, because vLLM is not installed here, which is made "
            "for fast sampling on a GPU: pip install 'repirl[vllm]'"
        ]
    if config.adapters is not None and config.computes_in == "bfloat16":
        return "transformers", [
            "rollout.engine: transformers, because vLLM in bfloat16 would sample from adapters that are rounded "
            "together with their base; rollout.engine: vllm takes it all the same"
        ]
    return "vllm", [
        "rollout.engine: vllm, the default on a GPU where it is installed, with "
        f"{config.rollout.vllm.kv_cache_gib:g} GiB for its cache (rollout.vllm.kv_cache_gib); rollout.engine: "
        "transformers samples with the policy's own model"
    ]
