"""The configuration of a run, from the sections in `repirl.options` and `repirl.dataconfig`.

Options that do not fit together are refused here; `repirl.configfile` reads them from presets, files and overrides.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from repirl.dataconfig import DataConfig
from repirl.irlconfig import IRLConfig
from repirl.judging import check_verifiers, with_answers
from repirl.lossconfig import LossConfig
from repirl.options import (
    AdapterConfig,
    BatchConfig,
    CheckpointConfig,
    CriticConfig,
    DiscriminatorConfig,
    DPOConfig,
    DQOConfig,
    EvalConfig,
    IQConfig,
    LabelConfig,
    LearnerConfig,
    LogConfig,
    ParallelConfig,
    PolicyConfig,
    PrimeConfig,
    PRMConfig,
    RolloutConfig,
    StepPRMConfig,
    VerifierConfig,
    VLLMConfig,
)
from repirl.section import Positive, Section
from repirl.systems import SYSTEMS, System, find_system


class ConfigError(ValueError):
    """What the user can mend: an option, a file, a column. The message is all that needs to be shown."""


class RunError(RuntimeError):
    """What ends a run in an expected way, through nobody's configuration: a full disk, an engine that died, a loss
    that is no longer finite. The message is all that needs to be shown."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Config(Section):
    """The configuration of a run. `load_config` and `build_config` make one; it does not change."""

    objective: str = Field(
        "repirl", description=f"the training system: {', '.join(SYSTEMS)}, or a System of your own as module:name"
    )
    output_dir: str = Field(description="metrics, checkpoints and reports go here")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of sampling and of data order")
    steps: Positive = Field(description="turns of the dual loop")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of parameters and optimiser state")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of products, activations and rollouts; null: bfloat16 on a GPU, on a CPU as dtype"
    )
    num_threads: Positive | None = Field(None, description="PyTorch's CPU threads; null: its default")
    order: Literal["prm_first", "policy_first"] = Field("prm_first", description="which side a step updates first")
    policy: PolicyConfig
    prm: PRMConfig = PRMConfig()
    critic: CriticConfig = CriticConfig()
    data: DataConfig
    verifier: VerifierConfig = VerifierConfig()
    rollout: RolloutConfig = RolloutConfig()
    irl: IRLConfig = IRLConfig()
    prime: PrimeConfig = PrimeConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    iq: IQConfig = IQConfig()
    dpo: DPOConfig = DPOConfig()
    dqo: DQOConfig = DQOConfig()
    step_prm: StepPRMConfig = StepPRMConfig()
    label: LabelConfig = LabelConfig()
    loss: LossConfig = LossConfig()
    batch: BatchConfig = BatchConfig()
    parallel: ParallelConfig = ParallelConfig()
    adapters: AdapterConfig | None = Field(
        None, description="policy and PRM as two LoRA adapters on one frozen base, which is the reference as well"
    )
    offload_idle: bool = Field(
        False,
        description="parameters and optimiser state of the side that does not work now leave the device: to host "
        "memory, or on a CPU to files in output_dir",
    )
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def computes_in(self) -> str:
        """The type of weights in products, and of activations."""
        return self.compute_dtype or self.dtype

    @property
    def system(self) -> System:
        """The row of systems.py. A policy without updates is one that is only read."""
        row = find_system(self.objective)
        if self.policy.updates_per_step > 0 or "policy" not in row.objectives:
            return row
        rest = {name: place for name, place in row.objectives.items() if name != "policy"}
        return dataclasses.replace(row, objectives=rest, reads=(*row.reads, "policy"))

    @property
    def experts_per_step(self) -> int:
        """Expert trajectories a step."""
        return self.irl.experts_per_step or self.rollout.prompts_per_step

    @property
    def matches_experts(self) -> bool:
        """Whether a turn's experts are those of its prompts."""
        if "experts" not in self.system.data or not {"prompts", "trajectories"} & set(self.system.data):
            return False
        if self.irl.experts is not None:
            return self.irl.experts == "matched"
        return self.data.experts is None and self.irl.experts_per_step is None

    @property
    def gate_threshold(self) -> float | None:
        """The z from which on the policy follows the PRM; None: it always does."""
        if not (self.system.gated and "policy" in self.system.trains):
            return None
        if self.irl.gate == "auto":
            return 2.0 if self.loss.outcome_coefficient == 0 else None
        return self.irl.gate

    @property
    def trained_sections(self) -> dict[str, LearnerConfig]:
        """The options of each learner that is trained."""
        return {name: getattr(self, name) for name in self.system.trains}

    @property
    def policy_temperature(self) -> float:
        """At which the policy's distribution is read: the one that rollouts are sampled at, and without any 1."""
        return self.rollout.temperature if self.system.online or self.uses("trajectories") else 1.0

    @property
    def prm_reads_reference(self) -> bool:
        """Whether there is a PRM whose rewards are relative to the frozen reference."""
        return self.system.has_prm and self.prm.reward == "implicit" and self.prm.reference == "start"

    def uses(self, kind: str) -> bool:
        """Whether a kind of data is read: the system needs it, or makes use of it where it is given."""
        given = {
            "experts": self.data.experts is not None or self.data.solution_column is not None,
            "pairs": self.data.pairs is not None,
            "trajectories": self.data.trajectories is not None,
            "steps": self.data.steps is not None,
        }
        return kind in self.system.data or (kind in self.system.optional and given[kind])

    def reads_values(self, name: str) -> bool:
        """Whether a learner has a head with one output, not one over the vocabulary."""
        return name == "critic" or (name == "prm" and self.prm.reward == "value")

    @property
    def trajectories_are_the_start_policys(self) -> bool:
        """Whether fixed rollouts are read that come without log mu, so that the start policy has to say it."""
        source = self.data.trajectories
        return self.uses("trajectories") and source is not None and source.logprob_column is None

    def start_of(self, name: str) -> tuple[str, str | None]:
        """The model that a learner starts from, and a GGUF file in it. PRM and critic start from the policy's unless
        they have one of their own; so does the reference."""
        own: dict[str, PRMConfig | CriticConfig] = {"prm": self.prm, "critic": self.critic}
        if name in own and (model := own[name].model) is not None:
            return model, own[name].gguf_file
        return self.policy.model, self.policy.gguf_file

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence of a batch may have: a prompt, and what is trained on behind it."""
        responses = [self.rollout.max_response_tokens] * self.system.online
        of_data = [self.data.max_expert_tokens] * any(map(self.uses, ("experts", "pairs", "trajectories", "steps")))
        return self.data.max_prompt_tokens + max(responses + of_data, default=0)

    @field_validator("objective")
    @classmethod
    def _system_exists(cls, objective: str) -> str:
        find_system(objective)
        return objective

    @model_validator(mode="before")
    @classmethod
    def _beta_of_the_system(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Without prm.beta, it is that of the system; without data.answers, what the verifier's kind reads."""
        values = with_answers(values)
        prm, name = values.get("prm", {}), values.get("objective", "repirl")
        if not (isinstance(prm, dict) and isinstance(name, str)) or (name not in SYSTEMS and ":" not in name):
            return values
        return values | {"prm": {"beta": find_system(name).prm_beta} | prm}

    @model_validator(mode="after")
    def _options_fit(self) -> Config:
        self.data.check()
        self.dpo.check()
        self.label.check()
        self._sections_fit()
        self._prm_reward_fits()
        self._rewards_fit()
        self._data_fits()
        for name, section in self.trained_sections.items():
            if self.dtype == "bfloat16" and section.optimizer.lr < 1e-4:
                raise ValueError(
                    f"dtype is bfloat16 and {name}.optimizer.lr {section.optimizer.lr}: bfloat16 weights round away "
                    "updates below about 1e-4, so nothing would be learned; use dtype: float32, and "
                    "compute_dtype: bfloat16 for products and activations"
                )
        for name, label in {"prm": "PRM", "critic": "critic"}.items():
            if getattr(self, name).gguf_file is not None and getattr(self, name).model is None:
                raise ValueError(
                    f"{name}.gguf_file is {getattr(self, name).gguf_file!r}, but without {name}.model the {label} "
                    f"starts from the policy's files: set {name}.model, or leave it out"
                )
        if "prm" in self.system.reads and self.prm.model is None:
            raise ValueError(f"objective {self.objective!r} reads a trained PRM: set prm.model to its folder")
        self._rollout_options_fit()
        self._memory_options_fit()
        self._irl_options_fit()
        return self

    @model_validator(mode="after")
    def _verifier_fits(self) -> Config:
        check_verifiers(self.verifier, self.eval.verifier, self.data)
        return self

    def _data_fits(self) -> None:
        """The data that the system learns from is there."""
        needed = self.system.data
        if "prompts" in needed and self.data.train is None:
            raise ValueError(f"objective {self.objective!r} samples on prompts: set data.train")
        if "experts" in needed and self.data.experts is None and self.data.solution_column is None:
            raise ValueError(
                f"objective {self.objective!r} learns from experts: set data.solution_column, or data.experts"
            )
        for kind in ("pairs", "trajectories", "steps"):
            given = getattr(self.data, kind) is not None
            if kind in needed and not given:
                raise ValueError(f"objective {self.objective!r} learns from {kind}: set data.{kind}")
            # `repirl label` writes data.steps, whatever the objective is.
            if given and kind not in (*needed, *self.system.optional, "steps"):
                raise ValueError(f"data.{kind} is set, but objective {self.objective!r} reads no {kind}: leave it out")
        if "trajectories" in needed:
            assert self.data.trajectories is not None
            sorts = "outcomes" in needed or ("experts" in needed and self.irl.use_outcome)
            if sorts and self.data.trajectories.outcome_column is None:
                raise ValueError(
                    "data.trajectories.outcome_column is null, but the outcomes of fixed rollouts are needed: name the "
                    "column" + ("" if "outcomes" in needed else ", or set irl.use_outcome: false")
                )
        if self.data.eval is not None and "policy" not in (*self.system.trains, *self.system.reads):
            raise ValueError(
                f"data.eval is set, but objective {self.objective!r} has no policy to evaluate: leave it out"
            )
        if self.data.eval_steps is not None and "steps" not in needed:
            raise ValueError(
                f"data.eval_steps is set, but objective {self.objective!r} learns no labels of steps: leave it out"
            )
        if self.data.eval is not None and self.data.answer_column is None:
            raise ValueError("data.eval is set but data.answer_column is null: nothing could be judged")

    def _sections_fit(self) -> None:
        """A section that only some systems read is set only where the system is one of them."""
        readers = {section: name for name, system in SYSTEMS.items() for section in system.sections}
        for section, reader in readers.items():
            plain = type(self).model_fields[section].default
            if section not in self.system.sections and getattr(self, section) != plain:
                raise ValueError(
                    f"options of {section!r} are set, but objective {self.objective!r} does not read them: leave them "
                    f"out, or choose objective {reader!r}"
                )
        if self.discriminator.subtract_logprob:
            if self.discriminator.loss == "wgan":
                raise ValueError(
                    "discriminator.subtract_logprob is true, but log mu has no gradient and drops out of "
                    "discriminator.loss 'wgan': choose bce, or leave it out"
                )
            if self.order != "prm_first" or self.rollout.overlap == "step" or self.rollout.keeps_surplus:
                raise ValueError(
                    "discriminator.subtract_logprob needs the experts' log-probabilities under the policy that "
                    "sampled: set order: prm_first and rollout.overlap: none, and drop a filter's surplus"
                )

    def _prm_reward_fits(self) -> None:
        """The rewards are read off the PRM in a way that the system is defined for, and have what they refer to."""
        expected = self.system.prm_rewards
        if expected and self.prm.reward not in expected:
            raise ValueError(
                f"prm.reward is {self.prm.reward!r}, but objective {self.objective!r} is defined for "
                f"{' and '.join(expected)}: set prm.reward: {expected[0]}"
            )
        if self.prm.reference == "start":
            return
        if self.prm.reward != "implicit" or "experts" in self.system.data or not self.system.online:
            raise ValueError(
                "prm.reference is 'policy', which is for `implicit` rewards of rollouts alone; leave it out where "
                "prm.reward is another one, or a PRM scores experts"
            )
        if self.rollout.temperature != 1.0:
            raise ValueError(
                f"prm.reference is 'policy' and rollout.temperature {self.rollout.temperature}: the policy's "
                "log-probabilities are at that temperature, the PRM's at 1; set rollout.temperature: 1, or "
                "prm.reference: start"
            )

    def _rewards_fit(self) -> None:
        """Rollouts can be judged, and the policy has a reward."""
        if not self.system.trains:
            raise ValueError(
                f"policy.updates_per_step is 0, but objective {self.objective!r} trains nothing else: raise it"
            )
        if not self.system.online:
            return
        trains_policy = "policy" in self.system.trains
        if trains_policy and self.rollout.samples_per_prompt < 2 and self.loss.baseline != "none":
            raise ValueError(
                "rollout.samples_per_prompt is 1, but the leave-one-out baseline needs 2 or more responses a prompt"
            )
        sorts_rollouts = "experts" in self.system.data and self.irl.use_outcome
        if "answers" in self.system.data and self.data.answer_column is None:
            raise ValueError(
                f"data.answer_column is null, but objective {self.objective!r} learns from outcomes: set it"
            )
        judges = trains_policy and self.loss.outcome_coefficient > 0
        if (judges or sorts_rollouts) and self.data.answer_column is None:
            raise ValueError(
                "data.answer_column is null, but loss.outcome_coefficient > 0 or irl.use_outcome needs answers; "
                "without a verifier set loss.outcome_coefficient: 0 and irl.use_outcome: false"
            )
        if not trains_policy:
            return
        if self.loss.outcome_coefficient == 0 and not self.system.has_prm:
            raise ValueError(f"objective {self.objective!r} with loss.outcome_coefficient 0 has no reward at all")
        self.loss.check(has_prm=self.system.has_prm, max_response_tokens=self.rollout.max_response_tokens)

    def _irl_options_fit(self) -> None:
        waits = {"prm", "policy"} <= set(self.system.trains)
        self.irl.check(
            waits=waits and self.system.gated,
            threshold=self.gate_threshold,
            has_outcome=self.loss.outcome_coefficient > 0,
            objective=self.objective,
        )
        if self.prm.warmup_turns > 0 and not waits:
            raise ValueError(
                f"prm.warmup_turns is set, but objective {self.objective!r} trains no policy that could wait for a "
                "PRM: leave it out"
            )
        if self.prm.warmup_turns >= self.steps:
            raise ValueError(
                f"prm.warmup_turns is {self.prm.warmup_turns} of {self.steps} steps, so the policy would never learn: "
                "lower it, or set policy.updates_per_step: 0 for a PRM alone"
            )
        headless = {"policy": self.policy.optimizer}
        if self.prm.reward != "value":
            headless["prm"] = self.prm.optimizer
        for name, optimizer in headless.items():
            if optimizer.head_lr is not None or optimizer.head_updates > 0:
                raise ValueError(
                    f"{name}.optimizer has head_lr or head_updates, which are for a value head, and there is none: "
                    "leave them out"
                )

    @property
    def warnings(self) -> list[str]:
        """What is likely to go wrong with these options, in words."""
        alone = {"prm", "policy"} <= set(self.system.trains) and self.loss.outcome_coefficient == 0
        if not (alone and self.system.gated and self.prm.reward == "value" and self.gate_threshold is None):
            return []
        return [
            "prm.reward is 'value' and nothing else rewards the policy, but irl.gate is null: the rewards of a new "
            "value head are noise, and a policy that follows them unlearns what it knew; set irl.gate: 2.0"
        ]

    def _rollout_options_fit(self) -> None:
        overlap = self.rollout.overlap
        if overlap != "none" and self.rollout.engine != "vllm_server":
            raise ValueError(
                f"rollout.overlap is {overlap!r}, but engine {self.rollout.engine!r} computes where the training does: "
                "only rollout.engine: vllm_server can sample meanwhile"
            )
        self.rollout.check_filter(
            has_answers=self.data.answer_column is not None,
            corrects_ratios=self.loss.sampler_ratio_cap is not None,
        )
        plain = VLLMConfig()
        others = {
            "auto": (),
            "transformers": (),
            "vllm": ("url", "push_host"),
            "vllm_server": ("kv_cache_gib", "tensor_parallel", "enforce_eager"),
        }[self.rollout.engine]
        for name in others:
            if (value := getattr(self.rollout.vllm, name)) != getattr(plain, name):
                raise ValueError(
                    f"rollout.vllm.{name} is {value!r}, but rollout.engine {self.rollout.engine!r} has no such option: "
                    "leave it out, or choose the engine that has it"
                )
        if overlap == "prm" and self.order != "policy_first":
            raise ValueError(
                "rollout.overlap is 'prm': the policy has to be updated before the next rollouts begin; set order: "
                "policy_first"
            )
        if overlap == "step" and self.loss.sampler_ratio_cap is None:
            raise ValueError(
                "rollout.overlap is 'step': rollouts come from older weights, which loss.sampler_ratio_cap corrects; "
                "it is null"
            )

    def _memory_options_fit(self) -> None:
        if self.adapters is not None:
            for name in ("prm", "critic"):
                learners = (*self.system.trains, *self.system.reads)
                if name in learners and (model := getattr(self, name).model) is not None:
                    raise ValueError(
                        f"adapters put all learners on one base, but {name}.model is {model!r}: leave it out"
                    )
            if compiled := [f"{name}.compile" for name, section in self.trained_sections.items() if section.compile]:
                raise ValueError(f"{compiled[0]} is for a model of its own, but adapters share one: leave it out")
            if self.offload_idle:
                raise ValueError("offload_idle moves whole models, but with adapters there is only one: leave it out")
            if len({section.gradient_checkpointing for section in self.trained_sections.values()}) > 1:
                names = " and ".join(f"{name}.gradient_checkpointing" for name in sorted(self.system.trains))
                raise ValueError(f"{names} differ, but with adapters there is only one model: set all of them")
        if self.offload_idle and self.parallel.cpu_offload:
            raise ValueError("parallel.cpu_offload keeps everything in host memory already: leave out offload_idle")
        sections: dict[str, LearnerConfig] = {"policy": self.policy, "prm": self.prm, "critic": self.critic}
        for name, section in sections.items():
            if section.activation_offload and not section.gradient_checkpointing:
                raise ValueError(
                    f"{name}.activation_offload moves what gradient checkpointing keeps: set "
                    f"{name}.gradient_checkpointing, too"
                )
