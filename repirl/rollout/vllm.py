"""Sampling with vLLM in this process, beside the training model, whose weights it is given after every update.

vLLM needs a model's configuration only: all weights come from the policy, and after each update the engine has to
prove that it holds them (fingerprints of every tensor) and that it computes with them (log-probabilities).
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.rollout import vllm_worker
from repirl.rollout.engine import EngineError, Response, Sampling
from repirl.rollout.vllm_worker import Fingerprint

# How far apart engine and trainer may be, in the mean over the probe's tokens. Rounding makes about 1e-5 in float32
# and up to 0.08 in bfloat16 (SmolLM2-135M, random prompts), in which logits themselves have two to three digits.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
# On a GPU products of float32 may run in TensorFloat-32, with three digits.
TOLERANCE_TF32 = 2e-2
# Prompt tokens of one step.
MAX_BATCHED_TOKENS = 8192
# Not at temperature 1, where tempered and untempered log-probabilities would be the same.
PROBE = Sampling(max_response_tokens=8, temperature=0.8, end_ids=())


class VLLMEngine:
    """vLLM in this process. It has no weights until the first `update_weights`.

    config: of the policy's model · dtype: that the engine computes in · max_model_len: longest prompt and response
    together · max_sequences: responses decoded side by side · kv_cache_bytes: memory of the KV cache, which also holds
    the prompts' prefixes · tensor_parallel: how many neighbouring processes share one engine; they call the same
    methods · enforce_eager: no CUDA graphs · block_size: tokens in a block of the KV cache, None for vLLM's choice ·
    timeout_seconds: how long one step (a token of every response under way) may take. Nothing can interrupt a GPU that
    hangs: this process ends then, with exit code 1 and the places where its threads were.

    With several processes (torchrun) each builds its engine, after the process group. Whatever vLLM changes in this
    process (random generators, threads, environment variables) is undone after every call. ConfigError where vLLM is
    missing or cannot run the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        max_sequences: int,
        kv_cache_bytes: int,
        tensor_parallel: int = 1,
        enforce_eager: bool = False,
        block_size: int | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.dtype, self.max_model_len = dtype, max_model_len
        self.tensor_parallel = tensor_parallel
        self._environment: dict[str, str] = {}
        self._has_weights = self._asleep = False
        self._emptied: list[tuple[torch.UntypedStorage, int]] = []
        several = dist.is_initialized() and dist.get_world_size() > 1
        if tensor_parallel > 1 and (not several or dist.get_world_size() % tensor_parallel):
            size = dist.get_world_size() if several else 1
            raise ConfigError(
                f"tensor_parallel is {tensor_parallel}, but there are {size} processes: it has to divide their number"
            )
        options: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": max_sequences,
            # Without it vLLM takes nearly all memory there is.
            "kv_cache_memory_bytes": kv_cache_bytes,
            "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, max_sequences),
            "tensor_parallel_size": tensor_parallel,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            # The model's own top_k and the like would change the distribution without a word.
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
        }
        if block_size is not None:
            options["block_size"] = block_size
        with self._undisturbed(), tempfile.TemporaryDirectory() as folder:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            try:
                from vllm import LLM
                from vllm.platforms import current_platform
            except ImportError as error:
                raise ConfigError(f"this engine needs vLLM (pip install 'repirl[vllm]'): {error}") from error
            if several:
                options["distributed_executor_backend"] = "external_launcher"
                os.environ.setdefault("RANK", str(dist.get_rank()))
                os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
            self._on_cpu = current_platform.is_cpu()
            if not self._on_cpu:
                # The share of the GPU that vLLM wants to find free, though the size of its cache is given: the rest
                # is the training's.
                options["gpu_memory_utilization"] = 0.01
            if self._on_cpu and tensor_parallel > 1:
                from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

                # Its shared memory would have one name for all such runs on a machine, and outlive one that is killed.
                CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
            options["enforce_eager"] = enforce_eager or self._on_cpu
            options["enable_sleep_mode"] = not self._on_cpu
            config = copy.deepcopy(config)
            if config.architectures is None and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
            config.save_pretrained(folder)
            had_process_group = dist.is_initialized()
            try:
                self.llm = LLM(model=folder, **options)
            except Exception as error:
                raise ConfigError(f"vLLM cannot run this model: {_short(error)}") from error
            if had_process_group:
                from vllm.v1.engine import core

                # When it shuts down, vLLM would end all process groups; this one is the trainer's.
                core.cleanup_dist_env_and_memory = _end_own_groups
        engine = self.llm.llm_engine
        self.block_size = engine.vllm_config.cache_config.block_size
        step = engine.step

        def watched_step() -> Any:
            # Of another thread than Python's, which may be what hangs.
            faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=sys.__stderr__)
            try:
                return step()
            finally:
                faulthandler.cancel_dump_traceback_later()

        engine.step = watched_step

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """See Engine.generate. EngineError while asleep, before the first weights, and where vLLM fails; ConfigError
        for a prompt that leaves no room for the response."""
        check_request(prompts, seeds, sampling, self.max_model_len)
        self._require_awake("sample")
        if not self._has_weights:
            raise EngineError("vLLM in this process has no sound weights: update_weights() comes first")
        return [response for response, _ in self._generate(prompts, seeds, sampling)]

    def update_weights(self, policy: Learner) -> None:
        """Push the policy's weights, layer by layer, and check them; all processes call it. EngineError where the
        engine holds anything else than what was pushed, or samples with other log-probabilities than the policy."""
        self._require_awake("take new weights")
        self._has_weights = False
        pushed: dict[str, Fingerprint] = {}
        weights = policy.weights()
        held: dict[str, Any] = {}
        problem: EngineError | None = None
        try:
            with self._undisturbed(), _failing_as("taking new weights"):
                taken = recorded(weights, self.dtype, pushed)
                [held] = self.llm.collective_rpc(vllm_worker.load_weights, args=(taken,))
                if not self.llm.reset_prefix_cache():
                    raise EngineError(
                        "vLLM in this process did not drop its prefix cache, which is of the former weights"
                    )
        except EngineError as error:
            problem = error
            # The other processes are on their way through the weights, too, and learn of it afterwards.
            for _ in weights:
                pass
        everybodys = policy.world.gather([(str(problem or ""), held)])
        if problems := [text for text, _ in everybodys if text]:
            raise EngineError(problems[0]) from problem
        for first in range(0, policy.world.size, self.tensor_parallel):
            parts = [held for _, held in everybodys[first : first + self.tensor_parallel]]
            require_held(pushed, parts, "vLLM in this process")
        prompts, seeds = probe(policy.model.config.vocab_size, self.block_size, self.max_model_len)
        # Each process brings the same prompts, and an engine of its own.
        found = policy.world.gather(self._generate(prompts, seeds, PROBE, alike=True))
        if stale := max(num_cached for _, num_cached in found):
            raise EngineError(f"vLLM in this process kept {stale} cached tokens of a prompt over a change of weights")
        prompts = prompts * policy.world.size
        require_parity(policy, prompts, [response for response, _ in found], self.dtype, "vLLM in this process")
        self._has_weights = True

    def sleep(self) -> None:
        """Give back the KV cache and, on a GPU, the weights, which wait in host memory."""
        if self._asleep:
            return
        self._asleep = True
        with self._undisturbed(), _failing_as("falling asleep"):
            self.llm.sleep(level=1)
            if self._on_cpu:
                [self._emptied] = self.llm.collective_rpc(_empty_kv_cache)

    def wake(self) -> None:
        """Undo `sleep`; prefixes that were cached are gone."""
        if not self._asleep:
            return
        with self._undisturbed(), _failing_as("waking up"):
            for storage, size in self._emptied:
                storage.resize_(size)
                storage.fill_(0)
            self._emptied = []
            self.llm.wake_up()
        self._asleep = False

    def close(self) -> None:
        """Shut vLLM down and free its memory."""
        with self._undisturbed():
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            gc.collect()

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, *, alike: bool = False
    ) -> list[tuple[Response, int]]:
        """Responses, and how many tokens of each prompt came from the prefix cache. alike: whether the processes of a
        tensor-parallel engine bring the same prompts; otherwise each of them brings its own."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        with self._undisturbed(), _failing_as("sampling"):
            requests = list(zip(map(list, prompts), seeds, strict=True))
            start = 0
            if self.tensor_parallel > 1 and not alike:
                shares = self._exchange(requests)
                start = sum(map(len, shares[: self._place_in_group()]))
                requests = [request for share in shares for request in share]
            if not requests:
                return []
            parameters = [
                SamplingParams(
                    n=1,
                    seed=seed,
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_response_tokens,
                    stop_token_ids=list(sampling.end_ids),
                    # Only sampling.end_ids end a response.
                    ignore_eos=True,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                )
                for _, seed in requests
            ]
            tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in requests]
            outputs = self.llm.generate(tokens, parameters, use_tqdm=False)
        responses = []
        for output in outputs[start : start + len(prompts)]:
            [completion] = output.outputs
            flat = completion.logprobs
            logprobs = [float(flat.logprobs[i]) for i in flat.start_indices]
            response = Response(list(completion.token_ids), logprobs, completion.finish_reason == "stop")
            responses.append((response, output.num_cached_tokens or 0))
        return responses

    def _require_awake(self, what: str) -> None:
        if self._asleep:
            raise EngineError(f"vLLM in this process is asleep and cannot {what}: wake() it first")

    def _exchange(self, item: Any) -> list[Any]:
        """Everybody's item in the tensor-parallel group."""
        from vllm.distributed import get_tp_group

        items: list[Any] = [None] * self.tensor_parallel
        dist.all_gather_object(items, item, group=get_tp_group().cpu_group)
        return items

    def _place_in_group(self) -> int:
        from vllm.distributed import get_tp_group

        return get_tp_group().rank_in_group

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with undisturbed(self._environment):
            yield


@contextmanager
def undisturbed(environment: dict[str, str]) -> Iterator[None]:
    """Leave random generators, number of threads and environment variables as they were.

    environment: the variables that the code inside has set so far; they are there inside, and only there.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    # vLLM replaces the function itself on a CPU.
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield
    finally:
        environment.update({name: value for name, value in os.environ.items() if before.get(name) != value})
        for name in [name for name in os.environ if name not in before]:
            del os.environ[name]
        os.environ.update(before)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def check_request(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, max_model_len: int
) -> None:
    """ValueError for an empty prompt or a count of seeds that is not that of prompts; ConfigError for a prompt that
    with its longest response is longer than `max_model_len`: the response would be cut off early."""
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
    """The weights in the engine's dtype; `pushed` gets the fingerprint of each."""
    for name, weight in weights:
        converted = weight.to(dtype)
        pushed[name] = vllm_worker.fingerprint(converted)
        yield name, converted


def require_held(pushed: dict[str, Fingerprint], held: list[dict[str, tuple[str, int, float]]], engine: str) -> None:
    """EngineError that names the worst tensor where an engine's workers hold anything else than what was pushed.

    pushed: by Hugging Face name; held: of each worker, see vllm_worker.held_weights.
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
    """Prompts and seeds for the parity check: the same ones every time, so that what a prefix cache kept of former
    weights would be used, and longer than one of its blocks where the model's length allows it."""
    length = max(1, min(block_size + 8, max_model_len - PROBE.max_response_tokens))
    tokens = torch.randint(vocab_size, (4, length), generator=torch.Generator().manual_seed(0))
    return tokens.tolist(), list(range(4))


def require_parity(
    policy: Learner, prompts: list[list[int]], responses: list[Response], dtype: torch.dtype, engine: str
) -> None:
    """EngineError where the responses' log-probabilities are not the policy's; all processes call it alike."""
    batch = pack([(p, r.token_ids) for p, r in zip(prompts, responses, strict=True)])
    work = replace(policy.work)
    expected = policy.score(batch, PROBE.temperature)["logprob"]
    # The check is no work that the run is about.
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


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Whatever vLLM raises becomes an EngineError."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM in this process failed while {what}: {_short(error)}") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _end_own_groups() -> None:
    """End the groups of processes that vLLM made, and not the one that they were made of."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def _empty_kv_cache(worker: Any) -> list[tuple[torch.UntypedStorage, int]]:
    """Give back a CPU worker's KV cache; returns the storages with the sizes that they had."""
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in worker.model_runner.kv_caches}
    emptied = [(storage, storage.nbytes()) for storage in storages.values()]
    for storage in storages.values():
        storage.resize_(0)
    return emptied
