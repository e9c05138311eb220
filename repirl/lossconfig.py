"""The options of the policy's loss: types, defaults and meanings, and their sources.

How they act is in `repirl_kernels.advantages` and `repirl_kernels.losses`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from repirl.section import NonNegative, NonNegativeFloat, PositiveFloat, Section


class LossConfig(Section):
    outcome_coefficient: NonNegativeFloat = Field(1.0, description="c_o, weight of the outcome reward (paper: 1)")
    process_coefficient: NonNegativeFloat = Field(0.05, description="c_p (paper: 0.05 math, 0.1 code)")
    entropy_coefficient: NonNegativeFloat = Field(0.001, description="beta_H, entropy bonus (paper: 0.001)")
    gamma: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="discount of process returns")
    clip_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="PPO clip below 1")
    clip_high: NonNegativeFloat = Field(0.2, description="PPO clip above 1")
    clip_dual: Annotated[float, Field(gt=1)] | None = Field(
        None, description="for negative advantages the loss is at most this times -A (verl: 3); null: no such bound"
    )
    form: Literal["clip", "cispo"] = Field(
        "clip", description="PPO's clip, or log pi weighted by the clipped ratio, so that all tokens count (CISPO)"
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="pi / pi_old of each token, or the geometric mean over the response (GSPO)"
    )
    sampler_ratio_cap: PositiveFloat | None = Field(2.0, description="cap of pi_old / mu; null: no correction")
    kl_coefficient: NonNegativeFloat = Field(0.0, description="weight of KL(policy, reference)")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="estimator of that KL")
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = Field(
        "token_mean", description="how token losses are averaged"
    )
    whiten: bool = Field(False, description="whiten advantages over the batch's tokens")
    baseline: Literal["group", "position", "none"] = Field(
        "group",
        description="of process rewards: the group's mean, or its mean at the same position among the responses that "
        "are long enough; none: no baseline, of outcomes neither (REINFORCE++)",
    )
    leave_one_out: bool = Field(
        True, description="baselines leave out the response itself (RLOO); false: they are means of the group (GRPO)"
    )
    scale: Literal["none", "group", "batch"] = Field(
        "none", description="outcome advantages are divided by the deviation of outcomes in the group (GRPO) or batch"
    )
    process_norm: Literal["none", "return", "std"] = Field(
        "none",
        description="process rewards are divided by the batch's largest return (PRIME), or their advantages by their "
        "standard deviation",
    )
    process_std_floor: PositiveFloat = Field(0.1, description="with process_norm: std, the least divisor")
    credit: Literal["sum", "min"] = Field(
        "sum", description="min: process rewards are weighted by softmax(-r / credit_temperature) (PURE)"
    )
    credit_temperature: PositiveFloat = Field(0.1, description="with credit: min, T of that softmax (PURE: 0.1)")
    entropy_in: Literal["bonus", "return"] = Field(
        "bonus",
        description="bonus: the entropy of each token's distribution in the loss, as in the paper; return: -beta_H "
        "log pi_old as a process reward, whose gradient also counts the entropy of later tokens",
    )

    overlong_tokens: NonNegative = Field(
        0,
        description="outcomes of the policy lose up to 1, linear in the last so many of max_response_tokens (DAPO); "
        "0: no penalty",
    )

    def check(self, *, has_prm: bool, max_response_tokens: int) -> None:
        """Refuse options that do not fit together.

        Args:
            has_prm: whether there are process rewards at all.
            max_response_tokens: the length of the longest response.

        Raises:
            ValueError: names the options.
        """
        if self.outcome_coefficient == self.process_coefficient == 0:
            raise ValueError(
                "loss.outcome_coefficient and loss.process_coefficient are both 0: the policy has no reward"
            )
        if self.form == "cispo" and self.clip_dual is not None:
            raise ValueError(
                f"loss.clip_dual is {self.clip_dual}, but loss.form 'cispo' has no such bound: leave it out"
            )
        if self.overlong_tokens > max_response_tokens:
            raise ValueError(
                f"loss.overlong_tokens is {self.overlong_tokens}, more than the {max_response_tokens} of "
                "rollout.max_response_tokens"
            )
        unread: dict[str, str] = {}
        if self.outcome_coefficient == 0:
            unread |= {"scale": "outcome", "overlong_tokens": "outcome"}
        if not has_prm or self.process_coefficient == 0:
            unread |= {"process_norm": "process", "credit": "process"}
            if self.baseline == "position" and self.entropy_in == "bonus":
                unread["baseline"] = "process"
        for name, kind in unread.items():
            if (value := getattr(self, name)) != LossConfig.model_fields[name].default:
                raise ValueError(
                    f"loss.{name} is {value!r}, but the policy has no {kind} reward, which it is about: leave it out"
                )
