"""The configuration of a run, from the sections in `repirl.options` and `repirl.dataconfig`.

Options that do not fit together are refused here; `repirl.configfile` reads them from presets, files and overrides.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from repirl.dataconfig import DataConfig
from repirl.lossconfig import LossConfig
from repirl.options import (
    AdapterConfig,
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    IRLConfig,
    LogConfig,
    ParallelConfig,
    PolicyConfig,
    PRMConfig,
    RolloutConfig,
    VerifierConfig,
    VLLMConfig,
)
from repirl.section import Positive, Section
from repirl.systems import SYSTEMS, System


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
    objective: str = Field("repirl", description=f"the training system (systems.py): {', '.join(SYSTEMS)}")
    output_dir: str = Field(description="metrics, checkpoints and reports go here")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of sampling and of data order")
    steps: Positive = Field(description="turns of the dual loop")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of parameters and optimiser state")
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of gathered weights, activations and rollouts; null: as dtype"
    )
    num_threads: Positive | None = Field(None, description="PyTorch's CPU threads; null: its default")
    order: Literal["prm_first", "policy_first"] = Field("prm_first", description="which side a step updates first")
    policy: PolicyConfig
    prm: PRMConfig = PRMConfig()
    data: DataConfig
    verifier: VerifierConfig = VerifierConfig()
    rollout: RolloutConfig = RolloutConfig()
    irl: IRLConfig = IRLConfig()
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
        """The row of systems.py."""
        return SYSTEMS[self.objective]

    @property
    def experts_per_step(self) -> int:
        """Expert trajectories a step."""
        return self.irl.experts_per_step or self.rollout.prompts_per_step

    @property
    def trained_sections(self) -> dict[str, PolicyConfig | PRMConfig]:
        """The options of each learner that is trained."""
        return {name: getattr(self, name) for name in self.system.trains}

    @property
    def policy_temperature(self) -> float:
        """At which the policy's distribution is read: the one that it is sampled at, and offline none."""
        return self.rollout.temperature if self.system.online else 1.0

    @property
    def prm_reads_reference(self) -> bool:
        """Whether there is a PRM whose rewards are relative to the frozen reference."""
        return self.system.has_prm and self.prm.reward == "implicit"

    def start_of(self, name: str) -> tuple[str, str | None]:
        """The model that a learner starts from, and a GGUF file in it. The PRM starts from the policy's unless it has
        one of its own; so does the reference."""
        if name == "prm" and self.prm.model is not None:
            return self.prm.model, self.prm.gguf_file
        return self.policy.model, self.policy.gguf_file

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence of a batch may have: a prompt, and what is trained on behind it."""
        responses = [self.rollout.max_response_tokens] * self.system.online
        experts = [self.data.max_expert_tokens] * ("experts" in self.system.data)
        return self.data.max_prompt_tokens + max(responses + experts, default=0)

    @field_validator("objective")
    @classmethod
    def _system_exists(cls, objective: str) -> str:
        if objective not in SYSTEMS:
            close = difflib.get_close_matches(objective, SYSTEMS, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"input should be one of {[*SYSTEMS]}{hint}")
        return objective

    @model_validator(mode="after")
    def _options_fit(self) -> Config:
        self.data.check()
        self._rewards_fit()
        self._data_fits()
        for name, section in self.trained_sections.items():
            if self.dtype == "bfloat16" and section.optimizer.lr < 1e-4:
                raise ValueError(
                    f"dtype is bfloat16 and {name}.optimizer.lr {section.optimizer.lr}: bfloat16 weights round away "
                    "updates below about 1e-4, so nothing would be learned; use dtype: float32, and "
                    "compute_dtype: bfloat16 for products and activations"
                )
        if self.prm.gguf_file is not None and self.prm.model is None:
            raise ValueError(
                f"prm.gguf_file is {self.prm.gguf_file!r}, but without prm.model the PRM starts from the policy's "
                "files: set prm.model, or leave it out"
            )
        if "prm" in self.system.reads and self.prm.model is None:
            raise ValueError(f"objective {self.objective!r} reads a trained PRM: set prm.model to its folder")
        self._rollout_options_fit()
        self._memory_options_fit()
        if self.irl.target_ess is not None and self.irl.temper != 1.0:
            raise ValueError("give irl.temper or irl.target_ess, not both")
        return self

    @model_validator(mode="after")
    def _verifier_fits(self) -> Config:
        for name, section in {"verifier": self.verifier, "eval.verifier": self.eval.verifier}.items():
            if section is not None:
                section.check(name)
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
        if self.data.eval is not None and self.data.answer_column is None:
            raise ValueError("data.eval is set but data.answer_column is null: nothing could be judged")

    def _rewards_fit(self) -> None:
        """Rollouts can be judged, and the policy has a reward."""
        if not self.system.online:
            return
        if self.rollout.samples_per_prompt < 2 and self.loss.baseline != "none":
            raise ValueError(
                "rollout.samples_per_prompt is 1, but the leave-one-out baseline needs 2 or more responses a prompt"
            )
        sorts_rollouts = "experts" in self.system.data and self.irl.use_outcome
        if (self.loss.outcome_coefficient > 0 or sorts_rollouts) and self.data.answer_column is None:
            raise ValueError(
                "data.answer_column is null, but loss.outcome_coefficient > 0 or irl.use_outcome needs answers; "
                "without a verifier set loss.outcome_coefficient: 0 and irl.use_outcome: false"
            )
        if self.loss.outcome_coefficient == 0 and not self.system.has_prm:
            raise ValueError(f"objective {self.objective!r} with loss.outcome_coefficient 0 has no reward at all")
        self.loss.check(has_prm=self.system.has_prm, max_response_tokens=self.rollout.max_response_tokens)

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
            if self.prm.model is not None and self.system.has_prm:
                raise ValueError(
                    f"adapters put policy and PRM on one base, but prm.model is {self.prm.model!r}: leave it out"
                )
            if self.offload_idle:
                raise ValueError("offload_idle moves whole models, but with adapters there is only one: leave it out")
            if len({section.gradient_checkpointing for section in self.trained_sections.values()}) > 1:
                raise ValueError(
                    "policy.gradient_checkpointing and prm.gradient_checkpointing differ, but with adapters there is "
                    "only one model: set both"
                )
        if self.offload_idle and self.parallel.cpu_offload:
            raise ValueError("parallel.cpu_offload keeps everything in host memory already: leave out offload_idle")
        sections: dict[str, PolicyConfig | PRMConfig] = {"policy": self.policy, "prm": self.prm}
        for name, section in sections.items():
            if section.activation_offload and not section.gradient_checkpointing:
                raise ValueError(
                    f"{name}.activation_offload moves what gradient checkpointing keeps: set "
                    f"{name}.gradient_checkpointing, too"
                )
