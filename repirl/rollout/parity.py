"""Checks that an engine with its own copy of the weights samples from the policy.

Two checks are made after every update: the fingerprint of every tensor (the engine holds the policy's weights), and the
log-probabilities of a few short responses, the probe (the engine computes with these weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.rollout import vllm_worker
from repirl.rollout.engine import EngineError, Response, Sampling
from repirl.rollout.vllm_worker import Fingerprint

# The largest allowed difference between the log-probabilities of engine and trainer, in nats: the mean over the probe's
# tokens. Rounding alone causes about 1e-5 in float32 and up to 0.08 in bfloat16 (SmolLM2-135M, random prompts); a
# logit in bfloat16 has only two to three correct digits.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
# On a GPU, float32 matrix products may run in TensorFloat-32, which has three correct digits.
TOLERANCE_TF32 = 2e-2
# The temperature is not 1: at 1, a sampler that ignores the temperature would pass the check.
PROBE = Sampling(max_response_tokens=8, temperature=0.8, end_ids=())


def check_request(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, max_model_len: int
) -> None:
    """Check the arguments of `generate`.

    Raises:
        ValueError: a prompt is empty, or there are not as many seeds as prompts.
        ConfigError: a prompt and its longest possible response are together longer than `max_model_len` tokens. The
            engine would cut off the response too early.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"one seed a prompt is needed, got {len(prompts)} prompts and {len(seeds)} seeds")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens; sampling needs at least one")
    longest = max(map(len, prompts), default=0)
    if longest + sampling.max_response_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and a response of up to {sampling.max_response_tokens} do not fit into "
            f"vLLM's max_model_len of {max_model_len}: raise it, or leave out prompts of that length"
        )


def recorded(
    weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype, pushed: dict[str, Fingerprint]
) -> Iterator[tuple[str, Tensor]]:
    """Convert each weight to the engine's dtype, and write its fingerprint into `pushed`."""
    for name, weight in weights:
        converted = weight.to(dtype)
        pushed[name] = vllm_worker.fingerprint(converted)
        yield name, converted


def require_held(pushed: dict[str, Fingerprint], held: list[dict[str, tuple[str, int, float]]], engine: str) -> None:
    """Check that an engine's workers hold exactly the weights that were sent.

    Args:
        pushed: the fingerprint of each tensor that was sent, by Hugging Face name.
        held: for each worker, the result of `vllm_worker.held_weights`.
        engine: the engine's name in messages.

    Raises:
        EngineError: a tensor is missing, or some differ. The message names the one that differs most.
    """
    names: dict[str, str] = {}
    parts: dict[str, list[Fingerprint]] = {}
    for worker in held:
        for label, (name, digest, total) in worker.items():
            names[label] = name
            parts.setdefault(label, []).append((digest, total))
    if missing := sorted(set(pushed) - set(names.values())):
        raise EngineError(f"{engine} has no place for {len(missing)} of the policy's tensors, such as {missing[0]}")
    if missing := sorted(label for label, name in names.items() if name not in pushed):
        raise EngineError(f"{engine} was not given {len(missing)} of its tensors, such as {missing[0]}")
    wrong = {}
    for label, fingerprints in parts.items():
        (digest, total), (wanted, wanted_total) = vllm_worker.add(fingerprints), pushed[names[label]]
        if digest != wanted:
            wrong[label] = (abs(total - wanted_total) / max(abs(wanted_total), 1e-30), total, wanted_total)
    if wrong:
        label = max(wrong, key=lambda label: wrong[label][0])
        _, total, wanted_total = wrong[label]
        raise EngineError(
            f"{engine} does not hold the weights that it was given: {len(wrong)} of {len(parts)} tensors differ, worst "
            f"{label} (sum of absolute values {total:.9g}, pushed {wanted_total:.9g})"
        )


def probe(vocab_size: int, block_size: int, max_model_len: int) -> tuple[list[list[int]], list[int]]:
    """Make the prompts and seeds of the parity check.

    They are the same every time, and longer than one block of the prefix cache if the model allows it. So a prefix that
    the cache kept from older weights is used again, and the check notices it.
    """
    length = max(1, min(block_size + 8, max_model_len - PROBE.max_response_tokens))
    tokens = torch.randint(vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    return tokens.tolist(), list(range(4))


def require_parity(
    policy: Learner, prompts: list[list[int]], responses: list[Response], dtype: torch.dtype, engine: str
) -> None:
    """Check the responses' log-probabilities against the policy's. All processes call this with the same arguments.

    Args:
        policy: the learner whose weights the engine should have.
        prompts: of the probe; token ids.
        responses: what the engine sampled for these prompts with `PROBE`.
        dtype: the engine's dtype.
        engine: the engine's name in messages.

    Raises:
        EngineError: the mean difference is larger than rounding in the coarsest dtype in use explains.
    """
    batch = pack([(p, r.token_ids) for p, r in zip(prompts, responses, strict=True)])
    work = replace(policy.work)
    expected = policy.score(batch, PROBE.temperature)["logprob"]
    # Do not count the tokens and FLOPs of this check.
    policy.work.__dict__.update(work.__dict__)
    difference = (expected - torch.tensor([x for r in responses for x in r.logprobs])).abs()
    stored = next(policy.model.parameters()).dtype
    dtypes = {dtype, stored, getattr(policy.model, "compute_dtype", stored)}
    coarsest = max(TOLERANCE[x] for x in dtypes)
    if policy.device.type == "cuda":
        coarsest = max(coarsest, TOLERANCE_TF32)
    mean = float(difference.mean())
    if not mean <= coarsest:
        raise EngineError(
            f"{engine} does not sample from the policy: its log-probabilities are {mean:.3g} off in the mean over "
            f"{difference.numel()} tokens ({float(difference.max()):.3g} at most), and may be {coarsest:.3g} off in "
            f"{str(dtype).removeprefix('torch.')}"
        )
