"""The sections of a configuration: every option's type, default and meaning, and its source in the paper.

`data`, `irl` and `loss` have files of their own: `repirl.dataconfig`, `repirl.irlconfig` and `repirl.lossconfig`.
Options that do not fit together are refused in `repirl.config`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from repirl.codeconfig import CodeConfig
from repirl.section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class OptimizerConfig(Section):
    lr: PositiveFloat = Field(1e-6, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="AdamW's decay rates of both moments")
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay of matrices")
    head_lr: PositiveFloat | None = Field(
        None, description="peak learning rate of a value head, which starts at 0 (prm.reward: value); null: lr"
    )
    head_updates: NonNegative = Field(0, description="first updates, in which a value head moves alone")
    warmup_steps: NonNegative = Field(0, description="updates of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    max_grad_norm: PositiveFloat = Field(1.0, description="global gradient-norm clip")
    state_bits: Literal[32, 8] = Field(32, description="of AdamW's moments; 8: block-wise quantised (torchao)")
    max_skipped_updates: Positive = Field(
        5, description="updates in a row that may be skipped for a loss or gradient that is not finite"
    )


class PolicyConfig(Section):
    model: str = Field(description="folder or hub id of a causal language model")
    gguf_file: str | None = Field(None, description="a GGUF file in that folder to load instead of safetensors")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the policy's optimiser")
    updates_per_step: NonNegative = Field(
        1, description="n_policy: updates on each step's rollouts (algorithm 1); 0: only the PRM is trained"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward")
    activation_offload: bool = Field(
        False, description="with gradient_checkpointing on a GPU: what is kept of a layer waits in host memory"
    )
    compile: bool = Field(False, description="compile its layers by torch.compile, for scores and updates")


class PRMConfig(Section):
    model: str | None = Field(None, description="start of the PRM; the policy's base if not given (section 7)")
    gguf_file: str | None = Field(None, description="a GGUF file in that folder")
    reward: Literal["value", "logit", "soft_q", "logprob", "implicit"] = Field(
        "value", description="how r_phi is read off the network"
    )
    gamma: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="discount in `soft_q`")
    beta: PositiveFloat = Field(
        1.0, description="scale of `implicit` rewards; unless it is set, that of the system: 0.05 in PRIME, else 1"
    )
    reference: Literal["start", "policy"] = Field(
        "start",
        description="what `implicit` rewards are relative to: the frozen start of the policy, or the policy that "
        "sampled (PRIME's ref_type)",
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the PRM's optimiser")
    updates_per_step: Positive = Field(1, description="n_prm: PRM updates before the policy's (algorithm 1)")
    warmup_turns: NonNegative = Field(0, description="first turns, in which only the PRM is trained")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward")
    activation_offload: bool = Field(
        False, description="with gradient_checkpointing on a GPU: what is kept of a layer waits in host memory"
    )
    compile: bool = Field(False, description="compile its layers by torch.compile, for scores and updates")


class CriticConfig(Section):
    model: str | None = Field(None, description="start of the critic V(s); the policy's base if not given")
    gguf_file: str | None = Field(None, description="a GGUF file in that folder")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="the critic's optimiser")
    updates_per_step: Positive = Field(1, description="updates of the critic before the policy's")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward")
    activation_offload: bool = Field(
        False, description="with gradient_checkpointing on a GPU: what is kept of a layer waits in host memory"
    )
    compile: bool = Field(False, description="compile its layers by torch.compile, for scores and updates")


# The options of a learner that is trained.
LearnerConfig = PolicyConfig | PRMConfig | CriticConfig


class VerifierConfig(Section):
    kind: Literal["math", "code", "custom", "mixed"] = Field(
        "math",
        description="what judges responses: the verifier of mathematical answers, programs run on tests, a function of "
        "your own, or for each row the one of these that it names (data.verifier_column)",
    )
    function: str | None = Field(
        None,
        description='with kind: custom, the function as "module:name": of (response, answer), it returns a number, 1 '
        "for right and 0 for wrong",
    )
    processes: Positive = Field(1, description="worker processes that judge, for each process of the training")
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = Field(
        20.0, description="longest time to judge one answer; then it counts as wrong, and as rollout/verifier_timeouts"
    )

    code: CodeConfig = Field(CodeConfig(), description="how programs are run and judged")

    def check(self, name: str) -> None:
        """ValueError for options that do not fit together; name: of this section in the configuration."""
        kind, function = self.kind, self.function
        self.code.check(f"{name}.code")
        if kind not in ("code", "mixed") and self.code != CodeConfig():
            raise ValueError(f"{name}.code is set, but {name}.kind {kind!r} runs no programs: leave it out")
        if kind not in ("custom", "mixed") and function is not None:
            raise ValueError(
                f"{name}.function is {function!r}, but {name}.kind {kind!r} judges by itself: set {name}.kind: custom, "
                "or leave the function out"
            )
        if kind == "custom" and function is None:
            raise ValueError(
                f"{name}.kind is 'custom', but {name}.function is not set: give the function that judges as "
                f'"module:name", or choose {name}.kind: math'
            )
        if function is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", function):
            raise ValueError(
                f'{name}.function is {function!r}, expected "module:name", such as my_rewards:judge for the function '
                "judge of my_rewards.py"
            )


class VLLMConfig(Section):
    kv_cache_gib: PositiveFloat = Field(4.0, description="memory of the KV cache, for each process")
    tensor_parallel: Positive = Field(1, description="neighbouring processes that share one engine")
    enforce_eager: bool = Field(False, description="no CUDA graphs: less memory, slower decoding")
    url: str = Field("http://127.0.0.1:8000", description="of a running server (engine: vllm_server)")
    push_host: str = Field("127.0.0.1", description="this machine's address as the server reaches it, for new weights")
    timeout_seconds: PositiveFloat = Field(
        600.0, description="how long a server may take for one answer, vLLM in this process for one token of each"
    )


class FilterConfig(Section):
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="prompts whose responses have a lower mean outcome are dropped; null: those with 0 (DAPO)"
    )
    max_accuracy: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="prompts whose responses have a higher mean outcome are dropped; null: those with 1 (DAPO)"
    )
    truncated: Literal["keep", "drop"] = Field(
        "keep", description="what happens to prompts with a response that reached max_response_tokens"
    )
    oversample: Annotated[float, Field(ge=1, le=1000)] = Field(
        1.0, description="prompts that are sampled in a round for each prompt that is still missing (PRIME: 4)"
    )
    max_rounds: Positive = Field(
        10, description="rounds a step; if prompts are still missing then, the batch has fewer of them"
    )
    surplus: Literal["drop", "keep"] = Field(
        "drop",
        description="what happens to prompts that pass beyond prompts_per_step; keep: the next step uses them, "
        "responses of older weights included (PRIME; loss.sampler_ratio_cap corrects)",
    )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> FilterConfig:
        if self.min_accuracy is not None and self.max_accuracy is not None and self.min_accuracy > self.max_accuracy:
            raise ValueError(f"min_accuracy is {self.min_accuracy}, above max_accuracy {self.max_accuracy}")
        return self


class RolloutConfig(Section):
    prompts_per_step: Positive = Field(128, description="prompts a step (paper: 128)")
    samples_per_prompt: Positive = Field(4, description="K responses a prompt (paper: 4)")
    max_response_tokens: Positive = Field(3000, description="longest response (paper: 3000)")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    max_sequences: Positive = Field(256, description="responses decoded side by side")
    engine: Literal["auto", "transformers", "vllm", "vllm_server"] = Field(
        "auto",
        description="what samples: transformers (the policy's own model), vLLM in this process, or a vLLM server; "
        "auto: vllm on a GPU where it is installed, else transformers",
    )
    vllm: VLLMConfig = Field(VLLMConfig(), description="options of the vLLM engines")
    overlap: Literal["none", "prm", "step"] = Field(
        "none",
        description="with a server, sample the next step's rollouts during the PRM's update (same results; needs "
        "order: policy_first) or during the whole step, from weights one step old (loss.sampler_ratio_cap corrects)",
    )
    filter: FilterConfig | None = Field(
        None, description="keep only prompts with suitable outcomes, and sample others for the rest; null: keep all"
    )

    def check_filter(self, *, has_answers: bool, corrects_ratios: bool) -> None:
        """Refuse a filter that does not fit the other options.

        Args:
            has_answers: whether responses are judged.
            corrects_ratios: whether the policy's loss corrects for rollouts from older weights.

        Raises:
            ValueError: names the options.
        """
        if self.filter is None:
            return
        if not has_answers:
            raise ValueError("rollout.filter keeps prompts by the outcomes of their responses: set data.answer_column")
        if self.overlap != "none":
            raise ValueError(
                f"rollout.overlap is {self.overlap!r}, but rollout.filter samples until enough prompts pass, from one "
                "version of the weights: leave one of the two out"
            )
        if self.keeps_surplus and not corrects_ratios:
            raise ValueError(
                "rollout.filter.surplus is 'keep': some rollouts come from older weights, which "
                "loss.sampler_ratio_cap corrects; it is null"
            )

    @property
    def by_policy(self) -> bool:
        """Whether the policy's own model samples; as `auto` does, unless `defaults.set_defaults` has changed it."""
        return self.engine in ("auto", "transformers")

    @property
    def prompts_per_round(self) -> int:
        """Prompts that are sampled at once: those of a step, or the first round's of a filter."""
        oversample = 1.0 if self.filter is None else self.filter.oversample
        return math.ceil(oversample * self.prompts_per_step)

    @property
    def keeps_surplus(self) -> bool:
        """Whether a step may train on rollouts of earlier steps that it did not need."""
        return self.filter is not None and self.filter.surplus == "keep"


class PrimeConfig(Section):
    loss: Literal["cross_entropy", "dpo"] = Field(
        "cross_entropy",
        description="of the PRM: cross-entropy of its summed rewards against the outcome, or PRIME's pairing of each "
        "response with the mean of the other outcome in its group",
    )
    reward: Literal["token", "whole"] = Field(
        "token", description="of the policy: each token's reward, or the response's sum at its last token"
    )


class DiscriminatorConfig(Section):
    loss: Literal["bce", "wgan"] = Field(
        "bce", description="logistic loss of each token, or mean reward of rollouts minus that of experts"
    )
    subtract_logprob: bool = Field(
        False,
        description="with bce: the discriminator's logit is r_t - log mu_t, as in AIRL; false: it is r_t, as in GAIL",
    )
    reward_clip: PositiveFloat | None = Field(None, description="policy's rewards at most this far from 0; null: any")


class IQConfig(Section):
    alpha: PositiveFloat | None = Field(
        0.5, description="r_t^2 / (4 alpha) is added to -log pi; null: nothing is, which is behaviour cloning"
    )
    gamma: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="discount in r_t = Q_t - gamma V_{t+1}")


class DPOConfig(Section):
    loss: Literal["sigmoid", "ipo", "sigmoid_norm"] = Field(
        "sigmoid",
        description="DPO's (Rafailov 2023); IPO's square of mean log-ratios (Azar 2023); DPO's of mean log-ratios",
    )
    beta: PositiveFloat = Field(0.1, description="scale of the implicit reward; in ipo 1/(2 beta) is the target")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of pairs that are taken to be the wrong way round (cDPO, Mitchell 2023)"
    )
    sft_coefficient: NonNegativeFloat = Field(
        0.0, description="weight of - log pi of the chosen responses, the mean of each one's tokens (RPO, Pang 2024)"
    )
    reference_free: bool = Field(False, description="a uniform reference in place of the frozen initial policy")
    pairs_per_step: Positive = Field(64, description="pairs a step, of data.pairs")

    def check(self) -> None:
        """ValueError for options that do not go together."""
        if self.loss == "ipo" and self.label_smoothing != 0:
            raise ValueError(
                f"dpo.label_smoothing is {self.label_smoothing}, but dpo.loss 'ipo' has no labels to smooth: leave it "
                "out"
            )


class DQOConfig(Section):
    beta: PositiveFloat = Field(0.03, description="scale of k_t = beta (log pi - log pi_ref), weight of the KL term")
    td_lambda: Annotated[float, Field(ge=0, le=1)] = Field(
        0.95, description="lambda of the returns; 1 is OREO (Wang 2024), 0 the one-step residual"
    )
    importance_weights: bool = Field(
        False, description="multiply a response's losses by min(e, pi / mu), the ratio of the whole response"
    )
    kl_coefficient: NonNegativeFloat = Field(
        0.0, description="weight of KL(policy, reference) beside the Q loss (OREO: 0.01)"
    )


class StepPRMConfig(Section):
    responses_per_step: Positive = Field(64, description="responses with labelled steps an update, of data.steps")


class LabelConfig(Section):
    method: Literal["math-shepherd", "omega"] = Field(
        "math-shepherd",
        description="from which steps `repirl label` samples completions: from every one (Wang 2024), or by binary "
        "search for first errors in a tree (OmegaPRM, Luo 2024)",
    )
    samples: Positive = Field(8, description="completions from each step (both papers: 8)")
    response_column: str | None = Field(
        None,
        description="column of data.train with one response or a list of them; null: rollout.samples_per_prompt are "
        "sampled",
    )
    steps_column: str | None = Field(None, description="column with a response as a list of steps instead")
    num_prompts: Positive | None = Field(None, description="first prompts of data.train that are used; null: all")
    prompts_per_batch: Positive = Field(16, description="prompts whose completions are sampled side by side")
    searches: Positive = Field(100, description="omega: most binary searches a prompt (paper: 100)")
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="omega: base of alpha^(1 - MC(s)) in Q")
    beta: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="omega: base of beta^(tokens / length_scale) in Q"
    )
    length_scale: Positive = Field(500, description="omega: L, the tokens of a rollout that count as long")
    exploration: NonNegativeFloat = Field(0.125, description="omega: c_puct, weight of rarely visited states")

    def check(self) -> None:
        """ValueError for options that do not go together."""
        if self.response_column is not None and self.steps_column is not None:
            raise ValueError(
                "label.response_column and label.steps_column are both set: responses are texts that are split into "
                "steps, or lists of steps; leave one out"
            )


class BatchConfig(Section):
    tokens_per_microbatch: Positive = Field(16384, description="tokens of one forward and backward")


class AdapterConfig(Section):
    rank: Positive = Field(16, description="rank of the LoRA updates")
    alpha: PositiveFloat = Field(32.0, description="LoRA's scale: updates are multiplied by alpha / rank")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="layers that get an update: all linear ones but the head, or names"
    )


class ParallelConfig(Section):
    replicate: Positive = Field(
        1, description="copies of the weights; the processes of each copy shard them (1: all processes do)"
    )
    cpu_offload: bool = Field(
        False, description="parameters, gradients and optimiser state stay in host memory and visit the GPU by layer"
    )
    timeout_minutes: Positive = Field(30, description="how long a process waits for the others before it gives up")


class EvalConfig(Section):
    every: NonNegative = Field(10, description="steps between evaluations; 0: never")
    num_prompts: Positive | None = Field(None, description="held-out prompts used; null: all")
    temperature: NonNegativeFloat = Field(0.0, description="0 is greedy")
    verifier: VerifierConfig | None = Field(
        None, description="judges held-out responses, where the run's `verifier` is not to be trusted; null: that one"
    )


class CheckpointConfig(Section):
    every: NonNegative = Field(20, description="steps between checkpoints; 0: never")
    keep_last: Positive = Field(2, description="newest checkpoints kept")
    keep_best: NonNegative = Field(0, description="checkpoints with the best held-out accuracy kept besides")
    asynchronous: bool = Field(False, description="write from a copy in host memory while training goes on")


class LogConfig(Section):
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="what one device can do, for the utilisation (mfu/...); null: a product is timed at the start",
    )
    tensorboard: bool = Field(True, description="TensorBoard files beside metrics.jsonl")
    trackers: list[Literal["wandb", "mlflow", "trackio", "tensorboard"]] = Field(
        [],
        description="trackers that also get metrics, sampled responses, and how the run was started; tensorboard: the "
        "same as log.tensorboard",
    )
    project: str = Field("repirl", min_length=1, description="of the trackers; the run has the name of its output_dir")
    samples_per_turn: NonNegative = Field(
        4, description="responses of each turn, and of each evaluation, that samples.jsonl keeps; 0: none"
    )
    samples_max_mb: PositiveFloat = Field(
        20.0, description="samples.jsonl becomes samples.1.jsonl when it has so many megabytes, and so on up to 4"
    )
    history: bool = Field(
        True,
        description="history.jsonl: of each prompt and turn the outcomes, rewards, log-probability and length of its "
        "responses (`repirl signal`); the PRM then scores rollouts also where the policy does not follow it",
    )
    profile_turns: list[Positive] = Field(
        [],
        description="turns that torch.profiler records, a list or a range such as 3-5: traces and tables go to "
        "OUTPUT_DIR/profile",
    )
    memory_snapshot: bool = Field(
        False, description="on a GPU: with these, a snapshot of each allocation for https://pytorch.org/memory_viz"
    )

    @field_validator("profile_turns", mode="before")
    @classmethod
    def _turns_of_a_range(cls, turns: Any) -> Any:
        """3 and "3-5" as lists."""
        if isinstance(turns, int) and not isinstance(turns, bool):
            return [turns]
        if not isinstance(turns, str):
            return turns
        bounds = re.fullmatch(r"(\d{1,9})-(\d{1,9})", turns)
        if bounds is None or int(bounds[1]) > int(bounds[2]):
            raise ValueError("expected turns such as [3, 5], or a range such as 3-5")
        return list(range(int(bounds[1]), int(bounds[2]) + 1))

    @model_validator(mode="after")
    def _a_snapshot_is_of_turns(self) -> LogConfig:
        if self.memory_snapshot and not self.profile_turns:
            raise ValueError("memory_snapshot is of the turns in profile_turns, and there are none: name some")
        return self
