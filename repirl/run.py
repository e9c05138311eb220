"""From a configuration to everything that a run holds: models, data, engine, and where it stands."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repirl.adapters import add_adapters, init_adapters
from repirl.config import Config, ConfigError, PolicyConfig, PRMConfig
from repirl.configfile import describe
from repirl.data.experts import Expert, load_experts
from repirl.data.prompts import Cursor, PromptSet, load_prompts
from repirl.distributed.checkpoint import Checkpointer, list_checkpoints, load_checkpoint
from repirl.distributed.load import load_sharded_model
from repirl.distributed.offload import Residency
from repirl.distributed.world import World, join_world
from repirl.learner import Learner
from repirl.models import check_window, load_model, load_tokenizer, quiet_transformers
from repirl.rollout.engine import Engine
from repirl.rollout.transformers import TransformersEngine
from repirl.sampling import InFlight, in_flight_state, restore_in_flight
from repirl.verify.verifier import Verifier
from repirl.work import Work

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """State of a run. `policy`, `prm` and the cursors change while it trains; the rest does not."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    policy: Learner
    prm: Learner | None
    reference: Learner | None
    engine: Engine
    prompts: PromptSet | None
    experts: list[Expert]
    held_out: PromptSet | None
    prompt_cursor: Cursor | None
    expert_cursor: Cursor | None
    world: World
    work: Work
    checkpointer: Checkpointer
    verifier: Verifier
    # Row of the expert -> the frozen reference's log-probability of each of its response tokens, where it is needed.
    expert_reference: dict[int, Tensor] = field(default_factory=dict)
    in_flight: InFlight | None = None
    # Where the engine samples beside the training; None: in its turn.
    background: ThreadPoolExecutor | None = None
    # The version of the policy's weights that the engine has.
    pushed: int | None = None

    @property
    def learners(self) -> dict[str, Learner]:
        return {"policy": self.policy} | ({"prm": self.prm} if self.prm else {})

    @property
    def prm_reads_reference(self) -> bool:
        """Whether rewards are relative to the frozen reference."""
        return self.prm is not None and self.config.prm.reward == "implicit"

    @property
    def engine_is_current(self) -> bool:
        """Whether the engine has the policy's present weights."""
        return self.pushed == self.policy.version

    def ready_engine(self) -> None:
        """Before sampling: the engine is awake and has the policy's present weights. All processes call it."""
        self.engine.wake()
        if not self.engine_is_current:
            self.engine.update_weights(self.policy)
            self.pushed = self.policy.version

    def rest_engine(self) -> None:
        """After sampling: the engine gives its memory to the training, unless it still samples."""
        if self.in_flight is None:
            self.engine.sleep()

    def abort(self) -> None:
        """The run has failed: nothing that was begun beside it is waited for."""
        if self.background is not None:
            self.background.shutdown(wait=False, cancel_futures=True)
            self.engine.close()
        self.verifier.close()

    def close(self) -> None:
        """Complete what is still being written, end the engine, and remove what idle models left on disk."""
        self.checkpointer.finish()
        if self.background is not None:
            self.background.shutdown()
        self.engine.close()
        self.verifier.close()
        if self.policy.residency is not None:
            self.policy.residency.close()

    def save(self, step: int, accuracy: float | None = None) -> None:
        """Checkpoint after `step` finished steps; accuracy: on the held-out prompts, if it was measured after it."""
        cursors = {"prompts": self.prompt_cursor, "experts": self.expert_cursor}
        state: dict[str, Any] = {name: cursor.state_dict() for name, cursor in cursors.items() if cursor}
        state["expert_reference"] = self.expert_reference
        state["in_flight"] = in_flight_state(self)
        self.checkpointer.save(
            step, self.learners, state, self.tokenizer, description=describe(self.config), score=accuracy
        )

    def resume(self) -> int:
        """Go on from the newest sound checkpoint; damaged ones are set aside. Returns the number of finished steps."""
        return self.restore(self.checkpointer.choose())

    def restore(self, path: Path) -> int:
        """Load a checkpoint; returns the number of finished steps."""
        step, state = load_checkpoint(path, self.learners, self.world)
        for name, cursor in {"prompts": self.prompt_cursor, "experts": self.expert_cursor}.items():
            if cursor and name not in state:
                raise ConfigError(f"checkpoint {str(path)!r} is of a run without {name}; it had another objective")
            if cursor:
                cursor.load_state_dict(state[name])
        self.expert_reference = state["expert_reference"]
        restore_in_flight(self, state["in_flight"])
        return step


def needs_reference(config: Config) -> bool:
    """Whether the frozen initial policy has to be kept: for a base measure, a KL term or an implicit reward."""
    trains_prm = config.objective == "repirl"
    return (
        (config.objective != "sft" and config.loss.kl_coefficient > 0)
        or (trains_prm and config.irl.base_measure == "reference")
        or (trains_prm and config.prm.reward == "implicit")
    )


def build_learners(config: Config, world: World, work: Work) -> tuple[Learner, Learner | None, Learner | None]:
    """Policy, PRM and frozen reference, the last two where the configuration needs them."""
    dtype, compute_dtype = getattr(torch, config.dtype), getattr(torch, config.computes_in)
    trains_prm = config.objective == "repirl"
    sections: dict[str, PolicyConfig | PRMConfig] = {"policy": config.policy} | (
        {"prm": config.prm} if trains_prm else {}
    )
    for name, section in sections.items():
        if section.activation_offload and world.device.type == "cpu":
            raise ConfigError(
                f"{name}.activation_offload moves activations from a GPU to host memory; this runs on a CPU"
            )
    prm_reads_values = trains_prm and config.prm.reward == "value"
    # SFT teaches the untempered distribution; everything else reads the policy at the temperature it samples at.
    temperature = 1.0 if config.objective == "sft" else config.rollout.temperature

    residency = None
    if config.offload_idle:
        residency = Residency(Path(config.output_dir) / "offload", f"rank_{world.rank}")

    def load(
        section: PolicyConfig | PRMConfig,
        kind: str,
        dtype: torch.dtype,
        prepare: Callable[[PreTrainedModel], None] | None = None,
    ) -> PreTrainedModel:
        source = config.policy if section.model is None else section
        name, files = str(source.model), {"gguf_file": source.gguf_file}
        if world.mesh is None:
            model = load_model(name, kind=kind, dtype=dtype, device=world.device, **files)
            if prepare is not None:
                prepare(model)
        else:
            offload = config.parallel.cpu_offload
            options = {"compute_dtype": compute_dtype, "world": world, "cpu_offload": offload, "prepare": prepare}
            model = load_sharded_model(name, kind=kind, dtype=dtype, **options, **files)
        check_window(model, name, config.longest_sequence)
        return model

    def learner(model: PreTrainedModel, section: PolicyConfig | PRMConfig | None, **options: Any) -> Learner:
        if section is not None:
            options |= {
                "num_updates": config.steps * section.updates_per_step,
                "gradient_checkpointing": section.gradient_checkpointing,
                "activation_offload": section.activation_offload,
            }
        optimizer = section.optimizer if section is not None else None
        budget = config.batch.tokens_per_microbatch
        made = Learner(model, optimizer, tokens_per_microbatch=budget, world=world, work=work, **options)
        if residency is not None:
            # At once, so that there is room for the next one.
            residency.add(made)
        return made

    prm = reference = None
    if config.adapters is not None:
        names = ["policy", "prm"] if trains_prm else ["policy"]
        options = {"value_head": prm_reads_values, "dtype": dtype}
        adapters = config.adapters
        # The frozen base needs no more precision than it is computed with.
        model = load(config.policy, "causal", compute_dtype, lambda m: add_adapters(m, adapters, names, **options))
        init_adapters(model, config.seed)
        policy = learner(model, config.policy, temperature=temperature, adapter="policy")
        if trains_prm:
            prm = learner(model, config.prm, reads_values=prm_reads_values, adapter="prm")
        if needs_reference(config):
            reference = learner(model, None, temperature=temperature)
    else:
        policy = learner(load(config.policy, "causal", dtype), config.policy, temperature=temperature)
        if trains_prm:
            prm = learner(load(config.prm, "value" if prm_reads_values else "causal", dtype), config.prm)
        if needs_reference(config):
            reference = learner(load(config.policy, "causal", dtype), None, temperature=temperature)
    return policy, prm, reference


def make_engine(config: Config, policy: Learner, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """What samples, as `rollout.engine` says. ConfigError where it cannot be had."""
    rollout, options = config.rollout, config.rollout.vllm
    samples_nothing = config.objective == "sft" and config.data.eval is None
    if rollout.engine == "transformers" or samples_nothing:
        return TransformersEngine(policy, pad_id=tokenizer.pad_token_id, max_sequences=rollout.max_sequences)
    if config.adapters is not None and config.computes_in == "bfloat16":
        logger.warning(
            "with adapters, vLLM in bfloat16 samples from their sum with the base rounded to bfloat16, in which small "
            "adapters vanish: rollout/sampler_mismatch_max tells how far it is from what is trained"
        )
    if rollout.engine == "vllm":
        from repirl.rollout.vllm import VLLMEngine

        return VLLMEngine(
            policy.model.config,
            dtype=getattr(torch, config.computes_in),
            max_model_len=config.data.max_prompt_tokens + rollout.max_response_tokens,
            max_sequences=rollout.max_sequences,
            kv_cache_bytes=int(options.kv_cache_gib * 2**30),
            tensor_parallel=options.tensor_parallel,
            enforce_eager=options.enforce_eager,
            timeout_seconds=options.timeout_seconds,
        )
    from repirl.rollout.vllm_server import VLLMServerEngine

    return VLLMServerEngine(
        options.url,
        # All processes ask the same server.
        max_sequences=max(1, rollout.max_sequences // policy.world.size),
        timeout_seconds=options.timeout_seconds,
        push_host=options.push_host,
    )


def build(config: Config) -> Run:
    """Load data and models. ConfigError (or DataError) with one clear message for what the user can mend."""
    quiet_transformers()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    world, work = join_world(config), Work()
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)

    # Data first: it is quick to check, and a mistake in it should not cost a model's loading time.
    is_sft = config.objective == "sft"
    prompts = None if is_sft else load_prompts(config.data, tokenizer, "train")
    held_out = load_prompts(config.data, tokenizer, "eval") if config.data.eval else None
    experts = [] if config.objective == "rloo" else load_experts(config.data, tokenizer)

    policy, prm, reference = build_learners(config, world, work)
    engine = make_engine(config, policy, tokenizer)
    return Run(
        config,
        tokenizer,
        policy,
        prm,
        reference,
        engine,
        prompts,
        experts,
        held_out,
        Cursor(len(prompts), config.seed) if prompts else None,
        Cursor(len(experts), config.seed + 1) if experts else None,
        world,
        work,
        Checkpointer(Path(config.output_dir) / "checkpoints", config.checkpoint, world),
        Verifier(config.data.verifier_timeout_seconds),
        background=ThreadPoolExecutor(1, "rollout") if config.rollout.overlap != "none" else None,
    )


def check_output_dir(config: Config, resume: bool) -> bool:
    """Whether there is a run to resume; ConfigError where one would be overwritten, or the folder cannot be made."""
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {config.output_dir!r} cannot be made: {error.strerror}") from error
    found = list_checkpoints(Path(config.output_dir) / "checkpoints")
    if found and not resume:
        raise ConfigError(
            f"output_dir {config.output_dir!r} already holds a run (newest checkpoint {found[-1].name}); "
            "go on with it by --resume, or choose another output_dir"
        )
    return bool(found)
