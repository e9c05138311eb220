"""The C++ module (csrc/module.cpp). Tensors are on the CPU; bfloat16 ones are passed as uint16."""

from torch import Tensor

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def update_f32(
    slab: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    targets: Tensor,
    first_column: int,
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    target_logit: Tensor,
    num_threads: int,
) -> None: ...
def update_bf16(
    slab: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    targets: Tensor,
    first_column: int,
    maximum: Tensor,
    total: Tensor,
    weighted: Tensor,
    target_logit: Tensor,
    num_threads: int,
) -> None: ...
def gradient_f32(
    slab: Tensor,
    out: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    targets: Tensor,
    first_column: int,
    logsumexp: Tensor,
    mean_logit: Tensor,
    mass: Tensor,
    onehot: Tensor,
    slope: Tensor,
    num_threads: int,
) -> None: ...
def gradient_bf16(
    slab: Tensor,
    out: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    targets: Tensor,
    first_column: int,
    logsumexp: Tensor,
    mean_logit: Tensor,
    mass: Tensor,
    onehot: Tensor,
    slope: Tensor,
    num_threads: int,
) -> None: ...
