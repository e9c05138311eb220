"""Sampling with vLLM in the training process. vLLM gets the policy's weights after every update.

vLLM reads only the model's configuration from a file; all weights come from the policy. After each update two checks
are made (parity.py): the engine holds these weights, and it computes with them.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from repirl.config import ConfigError
from repirl.learner import Learner
from repirl.options import VLLMConfig
from repirl.rollout import vllm_worker
from repirl.rollout.engine import EngineError, Response, Sampling
from repirl.rollout.parity import PROBE, check_request, probe, recorded, require_held, require_parity
from repirl.rollout.vllm_worker import Fingerprint

# The largest number of prompt tokens that vLLM computes in one step.
MAX_BATCHED_TOKENS = 8192


class VLLMEngine:
    """vLLM in this process. It has no weights until the first `update_weights`.

    With several processes (torchrun) each builds its own engine, after the process group exists. vLLM changes the state
    of random generators, the number of threads and environment variables; after every call they are as before.

    A GPU that hangs cannot be interrupted. So if one step (one token of every active response) takes longer than
    `options.timeout_seconds`, the process prints where its threads are and exits with code 1.

    Args:
        config: the configuration of the policy's model.
        options: the options `rollout.vllm`. `kv_cache_gib` includes the cached prefixes of prompts.
            `tensor_parallel` processes of consecutive ranks share one engine, and call the same methods.
        dtype: the dtype in which the engine computes.
        max_model_len: the largest number of tokens in a prompt and its response together.
        max_sequences: the largest number of responses that are decoded in one batch.
        block_size: the number of tokens in a block of the KV cache; None lets vLLM choose.

    Raises:
        ConfigError: vLLM is not installed, or cannot run the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        options: VLLMConfig,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        max_sequences: int,
        block_size: int | None = None,
    ) -> None:
        self.dtype, self.max_model_len = dtype, max_model_len
        self.tensor_parallel = options.tensor_parallel
        self._environment: dict[str, str] = {}
        self.has_weights = self._asleep = self._cache_asleep = False
        self._emptied: list[tuple[torch.UntypedStorage, int]] = []
        arguments: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": max_sequences,
            # Without this option vLLM takes nearly all of the memory.
            "kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30),
            "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, max_sequences),
            "tensor_parallel_size": options.tensor_parallel,
            "enforce_eager": options.enforce_eager,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            # Ignore generation_config.json: a top_k in it, for example, would silently change the distribution.
            "generation_config": "vllm",
            "logprobs_mode": "processed_logprobs",
        }
        if block_size is not None:
            arguments["block_size"] = block_size
        _check_processes(options.tensor_parallel)
        with self._undisturbed(), tempfile.TemporaryDirectory() as folder:
            _save_config(config, folder)
            self._start(folder, arguments)
        engine = self.llm.llm_engine
        self.block_size = engine.vllm_config.cache_config.block_size
        engine.step = _watched(engine.step, options.timeout_seconds)

    def _start(self, folder: str, arguments: dict[str, Any]) -> None:
        """Build vLLM's own engine for the model whose configuration is in `folder`."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(f"this engine needs vLLM (pip install 'repirl[vllm]'): {error}") from error
        had_process_group = dist.is_initialized()
        if had_process_group and dist.get_world_size() > 1:
            arguments["distributed_executor_backend"] = "external_launcher"
            os.environ.setdefault("RANK", str(dist.get_rank()))
            os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        self._on_cpu = current_platform.is_cpu()
        if not self._on_cpu:
            # The share of GPU memory that must be free when vLLM starts. vLLM checks this although the cache size is
            # given; the training uses the rest, so ask for little.
            arguments["gpu_memory_utilization"] = 0.01
        if self._on_cpu and self.tensor_parallel > 1:
            from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

            # All runs on a machine would use one name for vLLM's shared memory, which also stays after a killed run.
            CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
        arguments["enforce_eager"] = arguments["enforce_eager"] or self._on_cpu
        arguments["enable_sleep_mode"] = not self._on_cpu
        try:
            self.llm = LLM(model=folder, **arguments)
        except Exception as error:
            raise ConfigError(
                f"vLLM cannot run this model: {_short(error)} (rollout.engine: transformers samples with the policy's "
                "own model)"
            ) from error
        if had_process_group:
            from vllm.v1.engine import core

            # When vLLM shuts down it would destroy all process groups, and the default one belongs to the trainer.
            core.cleanup_dist_env_and_memory = _end_own_groups

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """See Engine.generate.

        Raises:
            EngineError: the engine sleeps, has no weights yet, or vLLM fails.
            ConfigError: a prompt is so long that the longest response would not fit into `max_model_len`.
        """
        check_request(prompts, seeds, sampling, self.max_model_len)
        self._require_awake("sample")
        if not self.has_weights:
            raise EngineError("vLLM in this process has no sound weights: update_weights() comes first")
        return [response for response, _ in self._generate(prompts, seeds, sampling)]

    def update_weights(self, policy: Learner) -> None:
        """Send the policy's weights to vLLM, layer by layer, and check them. All processes call this.

        Raises:
            EngineError: the engine does not hold the weights that were sent, or its log-probabilities are not the
                policy's.
        """
        self._require_awake("take new weights")
        self.has_weights = False
        pushed: dict[str, Fingerprint] = {}
        weights = policy.weights()
        held: dict[str, Any] = {}
        problem: EngineError | None = None
        try:
            with self._undisturbed(), _failing_as("taking new weights"):
                taken = recorded(weights, self.dtype, pushed)
                [held] = self.llm.collective_rpc(vllm_worker.load_weights, args=(taken,))
                self._wake_cache()
                if not self.llm.reset_prefix_cache():
                    raise EngineError(
                        "vLLM in this process did not drop its prefix cache, which is of the former weights"
                    )
        except EngineError as error:
            problem = error
            # `weights` gathers shards from all processes, so go through the rest of it; the others do not know of the
            # error yet.
            for _ in weights:
                pass
        everybodys = policy.world.gather([(str(problem or ""), held)])
        if problems := [text for text, _ in everybodys if text]:
            raise EngineError(problems[0]) from problem
        for first in range(0, policy.world.size, self.tensor_parallel):
            parts = [held for _, held in everybodys[first : first + self.tensor_parallel]]
            require_held(pushed, parts, "vLLM in this process")
        prompts, seeds = probe(policy.model.config.vocab_size, self.block_size, self.max_model_len)
        # Each process gives the same prompts to its own engine.
        sampled = policy.world.gather(self._generate(prompts, seeds, PROBE, alike=True))
        if stale := max(num_cached for _, num_cached in sampled):
            raise EngineError(f"vLLM in this process kept {stale} cached tokens of a prompt over a change of weights")
        prompts = prompts * policy.world.size
        require_parity(policy, prompts, [response for response, _ in sampled], self.dtype, "vLLM in this process")
        self.has_weights = True

    def sleep(self) -> None:
        """Free the KV cache. On a GPU also give up the weights: the policy has them, so no copy is kept."""
        if self._asleep:
            return
        self._asleep = True
        with self._undisturbed(), _failing_as("falling asleep"):
            if self._on_cpu:
                self.llm.sleep(level=1)
                [self._emptied] = self.llm.collective_rpc(_empty_kv_cache)
            else:
                self.llm.sleep(level=2)
                self.has_weights, self._cache_asleep = False, True

    def wake(self) -> None:
        """Undo `sleep`; the prefix cache is empty afterwards. On a GPU `update_weights` has to follow.

        On a GPU only the room for the weights is allocated here. That for the KV cache follows when the weights have
        arrived, because until then the policy's gathered layers need memory, too. Memory that PyTorch keeps for the
        training is returned first: vLLM allocates outside of PyTorch's cache and would not get it.
        """
        if not self._asleep:
            return
        with self._undisturbed(), _failing_as("waking up"):
            if self._on_cpu:
                for storage, size in self._emptied:
                    storage.resize_(size)
                    torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
                self._emptied = []
                self.llm.wake_up()
            else:
                torch.cuda.empty_cache()
                self.llm.wake_up(tags=["weights"])
        self._asleep = False

    def _wake_cache(self) -> None:
        """Allocate the KV cache again, if `sleep` freed it on a GPU."""
        if self._cache_asleep:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["kv_cache"])
            self._cache_asleep = False

    def close(self) -> None:
        """Shut vLLM down and free its memory."""
        with self._undisturbed():
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            gc.collect()

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, *, alike: bool = False
    ) -> list[tuple[Response, int]]:
        """Sample; returns each response and how many tokens of its prompt came from the prefix cache.

        alike: whether all processes of a tensor-parallel engine call this with the same prompts. Otherwise each process
        has its own prompts, and the engine samples all of them.
        """
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
        """The items of all processes in the tensor-parallel group, by rank."""
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
    """A context that restores random generators, the number of threads and environment variables at its end.

    Args:
        environment: the variables that earlier contexts set. They are set again inside this one; those that the code
            inside sets are added to the dictionary.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    # On a CPU vLLM replaces the function torch.set_num_threads, so restore the function, too.
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


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Turn any error of vLLM into an EngineError that says what was being done."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"vLLM in this process failed while {what}: {_short(error)}") from error


def _check_processes(tensor_parallel: int) -> None:
    """Raise ConfigError if the number of processes is not a multiple of `tensor_parallel`."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if tensor_parallel > 1 and (size == 1 or size % tensor_parallel):
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel}, but there are {size} processes: it has to divide their number"
        )


def _save_config(config: PretrainedConfig, folder: str) -> None:
    """Write a model's configuration into `folder`, with the class name by which vLLM chooses its implementation."""
    config = copy.deepcopy(config)
    if config.architectures is None and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)


def _watched(step: Callable[[], Any], timeout_seconds: float) -> Callable[[], Any]:
    """Wrap `step`: the process exits with code 1 if a call takes longer than the timeout."""

    # Not sys.stderr: a test or a notebook may have replaced it by an object that is no file.
    errors = sys.__stderr__
    assert errors is not None

    def watched_step() -> Any:
        # faulthandler uses a thread outside Python, so this works even if Python itself hangs.
        faulthandler.dump_traceback_later(timeout_seconds, exit=True, file=errors)
        try:
            return step()
        finally:
            faulthandler.cancel_dump_traceback_later()

    return watched_step


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _end_own_groups() -> None:
    """Destroy the process groups that vLLM created, but not the default group, which the trainer created."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def _empty_kv_cache(worker: Any) -> list[tuple[torch.UntypedStorage, int]]:
    """Free a CPU worker's KV cache; returns its storages with their former sizes in bytes."""
    storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in worker.model_runner.kv_caches}
    emptied = [(storage, storage.nbytes()) for storage in storages.values()]
    for storage in storages.values():
        storage.resize_(0)
    return emptied
