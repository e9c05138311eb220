"""The cases that are measured: shapes of real models' heads, and the results that a trainer needs from a head.

Axes: N rows (tokens), D features, V vocabulary.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

# Large, so that a contender whose entropy has no gradient fails the check.
ENTROPY_COEFFICIENT = 1.0

SHAPES = {  # name: (D, V)
    "SmolLM2-135M": (576, 49152),
    "Qwen2.5-3B": (2048, 151936),
    "Qwen3-4B": (2560, 151936),
    "Llama-3-8B": (4096, 128256),
    "4096x131072": (4096, 131072),
    "tiny": (64, 1000),
}

# Contenders of one task compute the same outputs and may be compared; those of different tasks may not.
TASKS = {
    "score": "log-prob and entropy, no gradient",
    "sft": "mean cross-entropy, forward + backward",
    "policy": "log-probs, each with a gradient of its own, forward + backward",
    "policy+entropy": "log-probs and entropies with their gradients, forward + backward",
    "logits": "log-probs and entropies of logits that exist already, forward + backward",
}

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def size_of(shape: str) -> tuple[int, int]:
    """``(D, V)`` of a shape: its name in ``SHAPES``, or DxV. KeyError if it is neither."""
    if shape in SHAPES:
        return SHAPES[shape]
    sizes = re.fullmatch(r"(\d+)x(\d+)", shape)
    if sizes is None:
        raise KeyError(shape)
    return int(sizes[1]), int(sizes[2])


class Case(NamedTuple):
    """One comparison: every contender that can do ``task`` runs it on the same inputs."""

    shape: str
    """A name in ``SHAPES``, or DxV."""
    num_rows: int
    dtype: str
    task: str
    masked: float = 0.0
    """Share of the rows that are ignored: the first ones, like the tokens of a prompt."""
    frozen: bool = False
    """Whether the head's weight gets no gradient."""

    @property
    def name(self) -> str:
        num_features, num_columns = size_of(self.shape)
        words = [f"{self.num_rows}x{num_features}x{num_columns} {self.dtype} {self.task}"]
        if self.shape in SHAPES:
            words[0] = f"{self.shape} {words[0]}"
        words += [f"{self.masked:.0%} masked"] * (self.masked > 0) + ["frozen head"] * self.frozen
        return ", ".join(words)


class Inputs(NamedTuple):
    """``hidden [N, D]`` (in the task ``logits``: logits ``[N, V]``), ``weight [V, D]``, the others ``[N]``."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantage: Tensor

    @property
    def counts(self) -> Tensor:
        """``[N]`` bool: the rows that are not ignored."""
        return self.targets != -100

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad]


def make_inputs(case: Case, device: str, num_rows: int | None = None, seed: int = 0) -> Inputs:
    """Random inputs with logits of standard deviation 3; ``num_rows`` replaces the case's."""
    generator = torch.Generator(device).manual_seed(seed)
    num_features, num_columns = size_of(case.shape)
    num_rows = num_rows or case.num_rows
    dtype = DTYPES[case.dtype]

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        result = torch.empty(rows, columns, dtype=dtype, device=device)
        for part in result.split(4096):  # in parts: no float32 copy of the whole
            part.copy_(torch.randn(part.shape, generator=generator, device=device) * scale)
        return result

    if case.task == "logits":
        hidden, weight = normal(num_rows, num_columns, 3.0), torch.empty(0, device=device)
    else:
        hidden, weight = normal(num_rows, num_features, 1.0), normal(num_columns, num_features, 3 / num_features**0.5)
        weight.requires_grad_(case.task != "score" and not case.frozen)
    targets = torch.randint(num_columns, (num_rows,), generator=generator, device=device)
    targets[: round(case.masked * num_rows)] = -100
    advantage = torch.randn(num_rows, generator=generator, device=device)
    return Inputs(hidden.requires_grad_(case.task != "score"), weight, targets, advantage)


def own_cases(sizes: str) -> list[Case]:
    """The cases for a shape of one's own, N x D x V: the tasks that take hidden states, in both dtypes.

    Raises:
        ValueError: the text is not of this form, or a size is too small.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", re.sub(r"\s", "", sizes.lower()))
    if match is None:
        raise ValueError("is not of the form NxDxV")
    num_rows, num_features, num_columns = map(int, match.groups())
    if min(num_rows, num_features) < 1 or num_columns < 2:
        raise ValueError("needs N and D of at least 1 and V of at least 2")
    shape = f"{num_features}x{num_columns}"
    return [case for dtype in DTYPES for case in _tasks(shape, num_rows, dtype)]


def _tasks(shape: str, num_rows: int, dtype: str, tasks: str = "score sft policy policy+entropy") -> list[Case]:
    return [Case(shape, num_rows, dtype, task) for task in tasks.split()]


def _variations(shape: str, num_rows: int, dtype: str) -> list[Case]:
    case = Case(shape, num_rows, dtype, "policy+entropy")
    return [case._replace(masked=0.6), case._replace(masked=0.9), case._replace(frozen=True)]


PROFILES = {
    "quick": [
        Case("SmolLM2-135M", 256, "bf16", "policy+entropy"),
        Case("SmolLM2-135M", 256, "fp32", "policy+entropy"),
    ],
    "cpu": [
        *_tasks("SmolLM2-135M", 1024, "bf16", "score sft policy+entropy"),
        *_tasks("SmolLM2-135M", 1024, "fp32", "score sft policy+entropy"),
        # With 1024 rows, PyTorch's linear_cross_entropy would take 10 s or more.
        *_tasks("SmolLM2-135M", 256, "bf16", "policy"),
        *_variations("SmolLM2-135M", 512, "bf16"),
        Case("SmolLM2-135M", 512, "fp32", "logits"),
        Case("SmolLM2-135M", 512, "bf16", "logits"),
        Case("Qwen2.5-3B", 256, "bf16", "policy+entropy"),
        Case("Qwen2.5-3B", 256, "fp32", "policy+entropy"),
    ],
    "gpu": [
        *_tasks("Qwen2.5-3B", 8192, "bf16"),
        *_tasks("4096x131072", 16384, "bf16"),
        *_variations("Llama-3-8B", 8192, "bf16"),
        Case("SmolLM2-135M", 65536, "bf16", "policy+entropy"),
        Case("Qwen3-4B", 8192, "bf16", "policy+entropy"),
        Case("Llama-3-8B", 8192, "bf16", "policy+entropy"),
        Case("Qwen2.5-3B", 2048, "fp32", "policy+entropy"),
        Case("Llama-3-8B", 8192, "bf16", "logits"),
    ],
    # N and V apart from each other, for curves.
    "sweep": [
        Case(shape, num_rows, dtype, "policy+entropy")
        for dtype in DTYPES
        for shape, num_rows in (
            *(("SmolLM2-135M", num_rows) for num_rows in (64, 128, 256, 512, 1024, 2048)),
            *((f"576x{num_columns}", 512) for num_columns in (8192, 16384, 32768, 131072)),
        )
    ],
    # A size at which float32 logits take 2.3 GiB.
    "memory": [
        Case("Qwen2.5-3B", 4096, "bf16", "policy+entropy"),
        Case("Qwen2.5-3B", 4096, "fp32", "policy+entropy"),
    ],
    "test": [
        Case("tiny", 32, dtype, task)
        for dtype in ("fp32", "bf16")
        for task in ("score", "sft", "policy", "policy+entropy", "logits")
    ]
    + _variations("tiny", 32, "bf16"),
}
