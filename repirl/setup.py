"""From a configuration to everything that a run holds: models, data, engine, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from repirl.config import Config, ConfigError, describe
from repirl.data.experts import Expert, load_experts
from repirl.data.prompts import Cursor, PromptSet, load_prompts
from repirl.dist.checkpoint import Checkpointer, list_checkpoints, load_checkpoint, newest_sound
from repirl.dist.load import load_sharded_model
from repirl.dist.world import World, join_world
from repirl.learner import Learner
from repirl.models import load_model, load_tokenizer, quiet_transformers
from repirl.report.metrics import Work
from repirl.rollout.engine import Engine
from repirl.rollout.transformers import TransformersEngine


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

    @property
    def learners(self) -> dict[str, Learner]:
        return {"policy": self.policy} | ({"prm": self.prm} if self.prm else {})

    def save(self, step: int, accuracy: float | None = None) -> None:
        """Checkpoint after `step` finished steps; accuracy: on the held-out prompts, if it was measured after it."""
        cursors = {"prompts": self.prompt_cursor, "experts": self.expert_cursor}
        state = {name: cursor.state_dict() for name, cursor in cursors.items() if cursor}
        self.checkpointer.save(
            step, self.learners, state, self.tokenizer, description=describe(self.config), score=accuracy
        )

    def restore(self, path: Path) -> int:
        """Load a checkpoint; returns the number of finished steps."""
        step, state = load_checkpoint(path, self.learners, self.world)
        for name, cursor in {"prompts": self.prompt_cursor, "experts": self.expert_cursor}.items():
            if cursor and name not in state:
                raise ConfigError(f"checkpoint {str(path)!r} is of a run without {name}; it had another objective")
            if cursor:
                cursor.load_state_dict(state[name])
        self.engine.update_weights(self.policy)
        return step


def needs_reference(config: Config) -> bool:
    """Whether the frozen initial policy has to be kept: for a base measure, a KL term or an implicit reward."""
    trains_prm = config.objective == "repirl"
    return (
        config.loss.kl_coefficient > 0
        or (trains_prm and config.irl.base_measure == "reference")
        or (trains_prm and config.prm.reward == "implicit")
    )


def build(config: Config) -> Run:
    """Load data and models. ConfigError (or DataError) with one clear message for what the user can mend."""
    quiet_transformers()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    world, work = join_world(config), Work()
    dtype = getattr(torch, config.dtype)
    tokenizer = load_tokenizer(config.policy.model, config.policy.gguf_file)

    # Data first: it is quick to check, and a mistake in it should not cost a model's loading time.
    is_sft = config.objective == "sft"
    prompts = None if is_sft else load_prompts(config.data, tokenizer, "train")
    held_out = load_prompts(config.data, tokenizer, "eval") if config.data.eval else None
    experts = [] if config.objective == "rloo" else load_experts(config.data, tokenizer)

    def learner(section: Any, kind: str, num_updates: int, temperature: float) -> Learner:
        name, gguf_file = section.model, section.gguf_file
        if name is None:
            name, gguf_file = config.policy.model, config.policy.gguf_file
        if world.mesh is None:
            model = load_model(name, kind=kind, dtype=dtype, device=world.device, gguf_file=gguf_file)
        else:
            model = load_sharded_model(
                name,
                kind=kind,
                dtype=dtype,
                compute_dtype=getattr(torch, config.computes_in),
                world=world,
                cpu_offload=config.parallel.cpu_offload,
                gguf_file=gguf_file,
            )
        return Learner(
            model,
            section.optimizer,
            num_updates=num_updates,
            tokens_per_microbatch=config.batch.tokens_per_microbatch,
            temperature=temperature,
            gradient_checkpointing=section.gradient_checkpointing,
            world=world,
            work=work,
        )

    # SFT teaches the untempered distribution; everything else reads the policy at the temperature it samples at.
    temperature = 1.0 if is_sft else config.rollout.temperature
    policy = learner(config.policy, "causal", config.steps * config.policy.updates_per_step, temperature)
    prm = reference = None
    if config.objective == "repirl":
        kind = "value" if config.prm.reward == "value" else "causal"
        prm = learner(config.prm, kind, config.steps * config.prm.updates_per_step, 1.0)
    if needs_reference(config):
        reference = learner(config.policy, "causal", 1, temperature)
        reference.model.requires_grad_(False)
    engine = TransformersEngine(policy, pad_id=tokenizer.pad_token_id, max_sequences=config.rollout.max_sequences)
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
    )


def check_output_dir(config: Config, resume: bool) -> Path | None:
    """The checkpoint to resume from, None for a fresh start; ConfigError where a run would be overwritten,
    or the folder cannot be made."""
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
    return newest_sound(Path(config.output_dir) / "checkpoints") if found else None
