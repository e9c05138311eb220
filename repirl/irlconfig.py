"""The options of inverse reinforcement learning: types, defaults and meanings, and their sources.

How they act is in `repirl.objectives.irl`, `repirl.gate` and `repirl_kernels.importance`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from repirl.section import NonNegativeFloat, Positive, PositiveFloat, Section


class IRLConfig(Section):
    weights: Literal["trajectory", "length_normalized", "per_decision", "token", "uniform"] = Field(
        "trajectory", description="importance weights in the estimate of log Z; trajectory is the paper's"
    )
    temper: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="exponent of the weights")
    target_ess: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="largest exponent whose effective sample size is this share of the samples"
    )
    smooth: Literal["none", "psis"] = Field("none", description="Pareto-smoothed upper tail (Vehtari 2024)")
    truncate: Annotated[float, Field(ge=1)] | None = Field(None, description="weights at most this times their mean")
    group: Literal["prompt", "batch"] = Field("prompt", description="which weights are normalised together")
    base_measure: Literal["uniform", "reference"] = Field(
        "uniform", description="b in p(tau) = b exp(R)/Z; uniform is the paper's derivation"
    )
    normalize: Literal["sequence", "token"] = Field("sequence", description="sums of rewards, or means per token")
    reward_l2: NonNegativeFloat | None = Field(
        None,
        description="coefficient of the mean squared token reward; null: 0.01 with use_outcome, where the loss has no "
        "minimum without it, else 0",
    )
    experts: Literal["matched", "all"] | None = Field(
        None,
        description="all experts of the step's prompts, or experts_per_step of all; null: matched where experts come "
        "with the training prompts (data.solution_column) and experts_per_step is null",
    )
    experts_per_step: Positive | None = Field(
        None, description="expert trajectories a step, unless they are matched; null: prompts_per_step"
    )
    gate: PositiveFloat | Literal["auto"] | None = Field(
        "auto",
        description="the policy follows the PRM only in turns in which experts' rewards are this many standard errors "
        "above those of new rollouts; null: always; auto: 2 where the policy has no outcome reward",
    )
    gate_full: PositiveFloat | None = Field(
        None,
        description="standard errors from which on a policy without an outcome reward has its whole learning rate; it "
        "grows linearly from 0 at `gate`; null: whole at `gate`",
    )
    use_outcome: bool = Field(
        True,
        description="verified-correct rollouts join the experts, failed ones estimate Z (algorithm 1); false: the PRM "
        "learns from experts alone, whatever reward the policy has",
    )

    @property
    def l2(self) -> float:
        """The coefficient of the mean squared token reward."""
        return self.reward_l2 if self.reward_l2 is not None else 0.01 * self.use_outcome

    def check(self, *, waits: bool, threshold: float | None, has_outcome: bool, objective: str) -> None:
        """Refuse options that do not fit together.

        Args:
            waits: whether a policy and a PRM are trained, of a system with a gate.
            threshold: z of the gate; None where there is none.
            has_outcome: whether the policy has an outcome reward.
            objective: the system's name.

        Raises:
            ValueError: names the options.
        """
        if self.target_ess is not None and self.temper != 1.0:
            raise ValueError("give irl.temper or irl.target_ess, not both")
        if self.experts == "matched" and self.experts_per_step is not None:
            raise ValueError(
                f"irl.experts_per_step is {self.experts_per_step}, but irl.experts 'matched' takes all experts of a "
                "step's prompts: leave one of the two out"
            )
        given = {"irl.gate": isinstance(self.gate, float), "irl.gate_full": self.gate_full is not None}
        for name, is_given in given.items():
            if is_given and not waits:
                raise ValueError(
                    f"{name} is set, but objective {objective!r} trains no policy that could wait for a PRM of this "
                    "kind: leave it out"
                )
        if self.gate_full is None:
            return
        if has_outcome:
            raise ValueError(
                f"irl.gate_full is {self.gate_full}, but the policy has an outcome reward, so that its learning rate "
                "does not depend on the PRM: leave it out, or set loss.outcome_coefficient: 0"
            )
        if threshold is None or self.gate_full <= threshold:
            raise ValueError(
                f"irl.gate_full is {self.gate_full}, and irl.gate {threshold}: the learning rate grows from 0 at "
                "irl.gate, so set irl.gate to a number below irl.gate_full"
            )
