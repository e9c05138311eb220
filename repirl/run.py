"""From a configuration to everything that a run holds: learners, data, sampler, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repirl.adapters import add_adapters, init_adapters
from repirl.batch import PackedBatch
from repirl.checkpoint.load import load_checkpoint
from repirl.checkpoint.manifest import list_checkpoints
from repirl.checkpoint.save import Checkpointer
from repirl.config import Config, ConfigError
from repirl.configfile import describe
from repirl.data import Data
from repirl.data.experts import Experts, load_experts
from repirl.data.prompts import PromptSet, load_prompts
from repirl.distributed.load import load_sharded_model
from repirl.distributed.offload import Residency
from repirl.distributed.world import World, join_world
from repirl.interrupt import Interrupted
from repirl.learner import Learner, TrainingError, enable_checkpointing
from repirl.model_checks import NonFiniteWeights
from repirl.models import check_window, load_model, quiet_transformers
from repirl.objectives import Objective, load_objectives
from repirl.options import PolicyConfig, PRMConfig
from repirl.report.log import LogError
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import MismatchError
from repirl.rollout.sampler import Sampler
from repirl.sources import check_sources
from repirl.systems import LABELS
from repirl.verify.process import Verifier
from repirl.work import PhaseTimer, Work

# At which the PRM's distribution is read, whatever the rollouts' temperature is.
PRM_TEMPERATURE = 1.0


@dataclass
class Reference:
    """The frozen initial policy. prm_temperature: at which the PRM reads it; None where its rewards do not need it."""

    learner: Learner
    prm_temperature: float | None

    def write(self, batch: PackedBatch) -> None:
        """Write `ref_logprob`, at the policy's temperature, and `prm_ref_logprob`, at the PRM's."""
        logprob = self.learner.score(batch)["logprob"]
        batch.write("ref_logprob", logprob)
        if self.prm_temperature == self.learner.temperature:
            batch.write("prm_ref_logprob", logprob)
        elif self.prm_temperature is not None:
            batch.write("prm_ref_logprob", self.for_prm(batch))

    def for_prm(self, batch: PackedBatch) -> Tensor:
        """log pi_ref of each response token [R] at the PRM's temperature."""
        return self.learner.score(batch, self.prm_temperature)["logprob"]


@dataclass
class Run:
    """State of a run. learners: trained ones, by name, and frozen ones that the system reads. objectives: of the
    trained ones, in the order of their updates. sampler: None where nothing is sampled."""

    config: Config
    world: World
    tokenizer: PreTrainedTokenizerBase
    learners: dict[str, Learner]
    objectives: dict[str, Objective]
    reference: Reference | None
    data: Data
    held_out: PromptSet | None
    sampler: Sampler | None
    checkpointer: Checkpointer
    timer: PhaseTimer

    @property
    def trained(self) -> dict[str, Learner]:
        """The learners that are updated, which checkpoints hold."""
        return {name: self.learners[name] for name in self.config.system.trains}

    def save(self, step: int, accuracy: float | None = None) -> None:
        """Checkpoint after `step` finished steps; accuracy: on the held-out prompts, if it was measured after it."""
        parts = {"sampler": self.sampler, "experts": self.data.experts}
        state = {name: part.state_dict() for name, part in parts.items() if part is not None}
        description = describe(self.config)
        self.checkpointer.save(step, self.trained, state, self.tokenizer, description=description, score=accuracy)

    def resume(self) -> int:
        """Go on from the newest sound checkpoint; damaged ones are set aside. Returns the number of finished steps."""
        return self.restore(self.checkpointer.choose())

    def restore(self, path: Path) -> int:
        """Load a checkpoint; returns the number of finished steps."""
        step, state = load_checkpoint(path, self.trained, self.world)
        for name, part in {"sampler": self.sampler, "experts": self.data.experts}.items():
            if part is not None:
                part.load_state_dict(state.get(name))
        return step

    def account(self, done: int) -> str:
        """What a run that ends early after `done` turns says of what was saved."""
        turns = f"turn {done} of {self.config.steps} is done"
        if not self.config.checkpoint.every:
            return f"{turns}; nothing was saved, because checkpoint.every is 0"
        return f"{turns} and saved in {self.config.output_dir!r}; go on with --resume"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or (isinstance(error, Interrupted) and error.is_complete):
            self.close()
            return
        if isinstance(error, (TrainingError, MismatchError, LogError)):
            # All processes get these errors together, so they can still complete a checkpoint that is being written.
            self.checkpointer.finish()
        self.abort()
        if isinstance(error, TrainingError):
            error.args = (f"{error}; {self.checkpointer.newest()}",)
        if isinstance(error, Interrupted):
            error.message = f"the turn was given up; {self.checkpointer.newest()}"

    def close(self) -> None:
        """Complete what is still being written, end the sampler, and remove what idle models left on disk."""
        self.checkpointer.finish()
        if self.sampler is not None:
            self.sampler.close()
        for learner in self.learners.values():
            if learner.residency is not None:
                learner.residency.close()

    def abort(self) -> None:
        """The run has failed: nothing that was begun beside it is waited for."""
        if self.sampler is not None:
            self.sampler.abort()


def needs_reference(config: Config) -> bool:
    """Whether the frozen initial policy has to be kept: for a base measure, a KL term or an implicit reward."""
    objectives = load_objectives(config.system.objectives)
    return config.prm_reads_reference or any(kind.needs_reference(config) for kind in objectives.values())


def learner_names(config: Config) -> tuple[str, ...]:
    """The learners that the system trains or reads, in the order in which they are loaded, the policy first; and
    "reference" where it is needed."""
    names = dict.fromkeys((*config.system.trains, *config.system.reads))
    return (*sorted(names, key=lambda name: name != "policy"), *["reference"] * needs_reference(config))


def build_learners(
    config: Config, world: World, work: Work, names: tuple[str, ...] | None = None
) -> dict[str, Learner]:
    """Learners by name, frozen ones without an optimiser.

    Args:
        config: the run's.
        world: its processes.
        work: counts what they compute.
        names: which; by default `learner_names`.

    Raises:
        ConfigError: where a model cannot be loaded, or not as the configuration says.
    """
    return _Builder(config, world, work).build(learner_names(config) if names is None else names)


class _Builder:
    """Loads the learners of one configuration; a class because all parts of it want the same few values."""

    def __init__(self, config: Config, world: World, work: Work) -> None:
        self.config, self.system, self.world, self.work = config, config.system, world, work
        self.dtype, self.compute_dtype = getattr(torch, config.dtype), getattr(torch, config.computes_in)
        self.residency: Residency | None = None
        if config.offload_idle:
            self.residency = Residency(Path(config.output_dir) / "offload")

    def build(self, names: tuple[str, ...]) -> dict[str, Learner]:
        for name in names:
            section = self._section(name)
            if section is not None and section.activation_offload and self.world.device.type == "cpu":
                raise ConfigError(
                    f"{name}.activation_offload moves activations from a GPU to host memory; this runs on a CPU"
                )
        if self.config.adapters is None:
            return {name: self._learner(name, self._load(name, self.dtype)) for name in names}
        adapters, trained = self.config.adapters, [name for name in names if name in self.system.trains]
        value_head = "prm" in trained and self.config.prm.reward == "value"

        def prepare(model: PreTrainedModel) -> None:
            add_adapters(model, adapters, trained, self.dtype, value_head=value_head)

        # The frozen base needs no more precision than it is computed with.
        model = self._load("policy", self.compute_dtype, prepare)
        init_adapters(model, self.config.seed)
        return {name: self._learner(name, model) for name in names}

    def _section(self, name: str) -> PolicyConfig | PRMConfig | None:
        """The options that a learner is trained with; None for a frozen one."""
        return self.config.trained_sections.get(name)

    def _load(
        self, name: str, dtype: torch.dtype, prepare: Callable[[PreTrainedModel], None] | None = None
    ) -> PreTrainedModel:
        config, world = self.config, self.world
        model_name, gguf_file = config.start_of(name)
        kind = "causal"
        if name == "prm" and config.prm.reward == "value":
            # One that is only read would say 0 for ever with a new head.
            kind = "value" if name in self.system.trains else "trained value"
        options: dict[str, Any] = {"kind": kind, "dtype": dtype, "gguf_file": gguf_file}
        try:
            if world.mesh is None:
                model = load_model(model_name, device=world.device, **options)
                if prepare is not None:
                    prepare(model)
            else:
                model = load_sharded_model(
                    model_name,
                    compute_dtype=self.compute_dtype,
                    world=world,
                    cpu_offload=config.parallel.cpu_offload,
                    prepare=prepare,
                    **options,
                )
        except NonFiniteWeights as error:
            raise ConfigError(f"the {LABELS.get(name, name)} cannot start: {error}") from error
        check_window(model, model_name, config.longest_sequence)
        return model

    def _learner(self, name: str, model: PreTrainedModel) -> Learner:
        section = self._section(name)
        if section is not None and section.gradient_checkpointing:
            enable_checkpointing(model, offload=section.activation_offload)
        learner = Learner(
            model,
            section.optimizer if section is not None else None,
            num_updates=self.config.steps * section.updates_per_step if section is not None else 1,
            tokens_per_microbatch=self.config.batch.tokens_per_microbatch,
            temperature=PRM_TEMPERATURE if name == "prm" else self.config.policy_temperature,
            adapter=name if self.config.adapters is not None and section is not None else None,
            world=self.world,
            work=self.work,
        )
        learner.label = LABELS.get(name, name)
        if self.residency is not None:
            # At once, so that there is room for the next one.
            self.residency.add(learner)
        return learner


def set_up_process(config: Config) -> None:
    """What a run changes in its process: threads, the seed, and how much transformers says."""
    quiet_transformers()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)


def build(config: Config) -> Run:
    """Load data and models. ConfigError (or DataError) with one clear message for what the user can mend."""
    set_up_process(config)
    world, timer = join_world(config), PhaseTimer()
    system = config.system
    tokenizer = check_sources(config)

    # Data first: it is quick to check, and a mistake in it should not cost a model's loading time.
    prompts = load_prompts(config.data, tokenizer, "train") if "prompts" in system.data else None
    held_out = load_prompts(config.data, tokenizer, "eval") if config.data.eval else None
    rows = load_experts(config.data, tokenizer, config.policy.model) if "experts" in system.data else None

    # A function of the user's that cannot be loaded shows here, before the models are.
    verifier = Verifier(config.verifier) if prompts is not None or held_out is not None else None
    try:
        learners = build_learners(config, world, timer.work)
    except BaseException:
        if verifier is not None:
            verifier.close()
        raise
    reference = None
    if (frozen := learners.pop("reference", None)) is not None:
        reference = Reference(frozen, PRM_TEMPERATURE if config.prm_reads_reference else None)
    experts = sampler = None
    if rows is not None:
        per_turn = config.experts_per_step
        asked = reference.for_prm if reference is not None and reference.prm_temperature is not None else None
        experts = Experts(rows, seed=config.seed + 1, per_turn=per_turn, reference=asked)
    if verifier is not None:
        engine = make_engine(config, learners["policy"], tokenizer)
        sampler = Sampler(config, learners["policy"], tokenizer, engine, verifier, prompts, timer)
    return Run(
        config,
        world,
        tokenizer,
        learners,
        {name: kind(config) for name, kind in _in_order(config, load_objectives(system.objectives)).items()},
        reference,
        Data(experts),
        held_out,
        sampler,
        Checkpointer(Path(config.output_dir) / "checkpoints", config.checkpoint, world),
        timer,
    )


def _in_order(config: Config, objectives: dict[str, Any]) -> dict[str, Any]:
    """The table's order, but with `order: policy_first` the policy before all others."""
    if config.order == "policy_first":
        return dict(sorted(objectives.items(), key=lambda item: item[0] != "policy"))
    return objectives


def check_output_dir(config: Config, resume: bool) -> bool:
    """Whether there is a run to resume; ConfigError where one would be overwritten, or the folder cannot be made."""
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {config.output_dir!r} cannot be made: {error.strerror}") from error
    checkpoints = list_checkpoints(Path(config.output_dir) / "checkpoints")
    if checkpoints and not resume:
        raise ConfigError(
            f"output_dir {config.output_dir!r} already holds a run (newest checkpoint {checkpoints[-1].name}); "
            "go on with it by --resume, or choose another output_dir"
        )
    return bool(checkpoints)
