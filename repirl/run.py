"""From a configuration to everything that a run holds: learners, data, sampler, and where it stands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repirl.adapters import add_adapters, init_adapters
from repirl.batch import PackedBatch
from repirl.checkpoint.fingerprints import take_fingerprints
from repirl.checkpoint.identity import Resumption, choose_checkpoint, stored_configuration
from repirl.checkpoint.load import load_checkpoint
from repirl.checkpoint.manifest import list_checkpoints
from repirl.checkpoint.save import Checkpointer
from repirl.compiled import compile_layers
from repirl.config import Config, ConfigError
from repirl.configfile import describe, load_config
from repirl.data import Data, Feed
from repirl.data.experts import check_matches
from repirl.data.load import load_data, rows_by_option
from repirl.data.prompts import PromptSet, load_prompts
from repirl.defaults import set_defaults, this_machine
from repirl.distributed.load import load_sharded_model
from repirl.distributed.offload import Residency
from repirl.distributed.precision import keep_in
from repirl.distributed.world import World, join_world, own_rank, pick_device
from repirl.gate import Gate
from repirl.interrupt import Interrupted
from repirl.learner import Learner, TrainingError, enable_checkpointing
from repirl.model_checks import NonFiniteWeights
from repirl.models import load_model, quiet_transformers
from repirl.objectives import Objective, load_objectives
from repirl.options import LearnerConfig
from repirl.packing import fit_window
from repirl.report.log import LogError
from repirl.report.profile import check_profile
from repirl.rollout.choose import make_engine
from repirl.rollout.engine import MismatchError
from repirl.rollout.sampler import Sampler
from repirl.rounding import break_ties
from repirl.sources import check_sources
from repirl.streams import Reference
from repirl.systems import LABELS
from repirl.verify.choose import make_verifier
from repirl.work import PhaseTimer, Work

logger = logging.getLogger(__name__)

# At which the PRM's distribution is read, whatever the rollouts' temperature is.
PRM_TEMPERATURE = 1.0


@dataclass
class Run:
    """State of a run. learners: trained ones, by name, and frozen ones that the system reads. objectives: of the
    trained ones, in the order of their updates. sampler: None where nothing is sampled. fingerprints: of models and
    data. resumption: where it goes on; None for a new run."""

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
    fingerprints: dict[str, str]
    resumption: Resumption | None = None

    def __post_init__(self) -> None:
        self.gate = Gate(self.config)

    @property
    def trained(self) -> dict[str, Learner]:
        """The learners that are updated, which checkpoints hold."""
        return {name: self.learners[name] for name in self.config.system.trains}

    @property
    def evaluates(self) -> bool:
        """Whether there is something held out."""
        return self.held_out is not None or self.data.eval_steps is not None

    def save(self, step: int, accuracy: float | None = None) -> None:
        """Checkpoint after `step` finished steps; accuracy: on the held-out prompts, if it was measured after it."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        self.checkpointer.save(
            step,
            self.trained,
            state,
            self.tokenizer,
            description=describe(self.config),
            fingerprints=self.fingerprints,
            score=accuracy,
        )

    def resume(self) -> int:
        """Go on from the checkpoint that was chosen, and say where; returns the number of finished steps, 0 for a new
        run."""
        if self.resumption is None:
            return 0
        path, total = self.resumption.path, self.config.steps
        step = self.restore(path)
        if self.world.is_main:
            place = f"resuming at turn {step + 1} of {total}" if step < total else f"all {total} turns are done already"
            print(f"{place}, from {path}", flush=True)
        return step

    def restore(self, path: Path) -> int:
        """Load a checkpoint; returns the number of finished steps. Data that changed begins anew."""
        step, state = load_checkpoint(path, self.trained, self.world)
        known = self.resumption or Resumption(path)
        if "policy.model" in known.changed and "experts" in state:
            # What the reference said of them, which is another one now.
            state["experts"]["reference"] = {}
        sources = {"sampler": "data.train", **{name: f"data.{name}" for name in self.data.feeds}}
        for name, part in self._parts().items():
            if name not in sources or not known.begins_anew(sources[name]):
                part.load_state_dict(state.get(name))
        return step

    def _parts(self) -> dict[str, Feed]:
        """What has a state beside the learners."""
        parts: dict[str, Feed] = {"gate": self.gate, **self.data.feeds}
        return parts if self.sampler is None else {"sampler": self.sampler, **parts}

    def next_trajectories(self) -> PackedBatch | None:
        """The next fixed rollouts, with the streams that rollouts of a turn have; None where the system has none."""
        if self.data.trajectories is None:
            return None
        batch = self.data.trajectories.next()
        with self.timer("reference"):
            if self.reference is not None:
                self.reference.write(batch)
            for name in ("old_logprob", "sampler_logprob"):
                if name not in batch.streams:
                    # Without log mu in the file, the start policy has sampled them.
                    batch.write(name, batch.read("ref_logprob"))
        return batch

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
    """Whether the frozen initial policy has to be kept: for a base measure, a KL term, an implicit reward, or as the
    policy that sampled fixed rollouts."""
    objectives = load_objectives(config.system.objectives)
    if config.trajectories_are_the_start_policys:
        return True
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
        value_head = any(self.config.reads_values(name) for name in trained)

        def prepare(model: PreTrainedModel) -> None:
            add_adapters(model, adapters, trained, self.dtype, value_head=value_head)

        # The frozen base needs no more precision than it is computed with.
        model = self._load("policy", self.compute_dtype, prepare)
        init_adapters(model, self.config.seed)
        return {name: self._learner(name, model) for name in names}

    def _section(self, name: str) -> LearnerConfig | None:
        """The options that a learner is trained with; None for a frozen one."""
        return self.config.trained_sections.get(name)

    def _load(
        self, name: str, dtype: torch.dtype, prepare: Callable[[PreTrainedModel], None] | None = None
    ) -> PreTrainedModel:
        config, world = self.config, self.world
        model_name, gguf_file = config.start_of(name)
        kind = "causal"
        if config.reads_values(name):
            # One that is only read would say 0 for ever with a new head.
            kind = "value" if name in self.system.trains else "trained value"
        options: dict[str, Any] = {"kind": kind, "dtype": dtype, "gguf_file": gguf_file}
        try:
            if world.mesh is None:
                model = load_model(model_name, device=world.device, compute_dtype=self.compute_dtype, **options)
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
        fit_window(model, model_name, config.longest_sequence)
        share = break_ties(model, world) if self.compute_dtype == torch.bfloat16 else 0.0
        if world.mesh is None and dtype != self.compute_dtype and self._section(name) is None:
            keep_in(model, self.compute_dtype)
        # The reference is the policy's start.
        if share and name != "reference" and world.is_main:
            print(
                f"{LABELS.get(name, name)}: {share:.1%} of the weights lay halfway between two bfloat16 "
                "numbers, and got a random place between them, so that small updates do not move all of these at once",
                flush=True,
            )
        return model

    def _learner(self, name: str, model: PreTrainedModel) -> Learner:
        section = self._section(name)
        if section is not None and section.gradient_checkpointing:
            enable_checkpointing(model, offload=section.activation_offload)
        if section is not None and section.compile:
            compile_layers(model, name)
        learner = Learner(
            model,
            section.optimizer if section is not None else None,
            num_updates=self._num_updates(name),
            tokens_per_microbatch=self.config.batch.tokens_per_microbatch,
            temperature=PRM_TEMPERATURE if name == "prm" else self.config.policy_temperature,
            adapter=name if self.config.adapters is not None and section is not None else None,
            world=self.world,
            work=self.work,
        )
        learner.reads_states = name == "critic"
        learner.label = LABELS.get(name, name)
        if self.residency is not None:
            # At once, so that there is room for the next one.
            self.residency.add(learner)
        return learner

    def _num_updates(self, name: str) -> int:
        """The updates of a learner in the whole run, if none is held."""
        section = self._section(name)
        if section is None:
            return 1
        turns = self.config.steps - self.config.prm.warmup_turns * (name == "policy")
        return max(turns, 1) * section.updates_per_step


def set_up_process(config: Config, before: Config | None = None, *, samples: bool | None = None) -> Config:
    """What a run changes in its process: threads, the seed, and how much transformers says.

    Args:
        config: as it was given.
        before: of a run that goes on, the configuration that it began with.
        samples: whether responses are sampled; None: as training with this configuration does.

    Returns:
        The configuration with the options that the device decides (`defaults.set_defaults`), which the main process
        prints.
    """
    quiet_transformers()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    config, lines = set_defaults(config, this_machine(pick_device(config).type), before, samples=samples)
    for line in lines if own_rank() == 0 else ():
        print(line, flush=True)
    return config


def build(config: Config, *, resume: bool = False, changed: Sequence[str] = ()) -> Run:
    """Load data and models.

    Args:
        config: the run's configuration.
        resume: whether there is a run in `config.output_dir` to go on with; its state is loaded by `Run.resume`.
        changed: what may be different from that run (identity.choose_checkpoint).

    Raises:
        ConfigError (or DataError): what the user can mend, with one clear message.
    """
    config = set_up_process(config, _began_with(config) if resume else None)
    world, timer, system = _begin(config, resume), PhaseTimer(), config.system
    tokenizer = check_sources(config)

    # Data first: it is quick to check, and a mistake in it should not cost a model's loading time.
    prompts = load_prompts(config.data, tokenizer, "train") if "prompts" in system.data else None
    held_out = load_prompts(config.data, tokenizer, "eval") if config.data.eval else None
    data = load_data(config, tokenizer, world)
    if data.experts is not None and prompts is not None and config.matches_experts:
        check_matches(data.experts.rows, [prompt.token_ids for prompt in prompts.prompts])
    fingerprints = take_fingerprints(config, tokenizer, rows_by_option(prompts, held_out, data), world)
    checkpointer = Checkpointer(Path(config.output_dir) / "checkpoints", config.checkpoint, world)
    resumption = choose_checkpoint(checkpointer, config, fingerprints, changed) if resume else None

    # A function of the user's that cannot be loaded shows here, before the models are.
    verifier = make_verifier(config.verifier) if prompts is not None or held_out is not None else None
    try:
        learners = build_learners(config, world, timer.work)
    except BaseException:
        if verifier is not None:
            verifier.close()
        raise
    reference = None
    if (frozen := learners.pop("reference", None)) is not None:
        reference = Reference(frozen, PRM_TEMPERATURE if config.prm_reads_reference else None)
        if data.experts is not None and reference.prm_temperature is not None:
            data.experts.reference = reference.for_prm
    sampler = None
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
        data,
        held_out,
        sampler,
        checkpointer,
        timer,
        fingerprints,
        resumption,
    )


def _began_with(config: Config) -> Config | None:
    """The configuration that a run began with; None where it cannot be read, which `choose_checkpoint` explains."""
    with suppress(ConfigError):
        return load_config(stored_configuration(config.output_dir))
    return None


def _begin(config: Config, resume: bool) -> World:
    """Join the other processes, which have to agree that there is a run to go on with, and say what to be warned of."""
    world = join_world(config)
    if len(set(world.gather([resume]))) > 1:
        raise ConfigError(f"output_dir {config.output_dir!r} is not one folder for all processes: only some see a run")
    check_profile(config, world.device)
    for warning in config.warnings if world.is_main else ():
        logger.warning(warning)
    return world


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
