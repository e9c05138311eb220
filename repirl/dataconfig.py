"""The section `data` of the configuration."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from repirl.section import Positive, Section

# Text of one token, or its id.
Token = str | Annotated[int, Field(strict=True, ge=0)]


class SourceConfig(Section):
    path: str = Field(description="file (JSON lines, CSV or Parquet; .gz), folder or hub id (owner/name)")
    name: str | None = Field(None, description="of a hub data set's configuration")
    split: str | None = Field(None, description="of a folder or hub data set; null: train, for data.eval test")
    revision: str | None = Field(None, description="of a hub data set: branch, tag or commit")

    def __fspath__(self) -> str:
        return self.path


def _as_source(value: Any) -> Any:
    if value is None or isinstance(value, dict | SourceConfig):
        return value
    if not isinstance(value, str):
        raise ValueError("expected a path or hub id, or path, name, split and revision")
    return {"path": value}


# A path alone, or with what a data set of the hub needs besides.
Source = Annotated[SourceConfig | None, BeforeValidator(_as_source)]


def _as_sources(value: Any) -> Any:
    return [_as_source(part) for part in value] if isinstance(value, list) else _as_source(value)


class ExpertFileConfig(SourceConfig):
    prompt_column: str = Field("prompt", description="column with the prompt")
    solution_column: str = Field("solution", description="column with one solution or a list of them")
    answer_column: str | None = Field(None, description="column with the right answer, for data.verify_experts")


class PairFileConfig(SourceConfig):
    prompt_column: str | None = Field(
        "prompt", description="column with the prompt; null: the messages that both responses begin with"
    )
    chosen_column: str = Field("chosen", description="column with the better response")
    rejected_column: str = Field("rejected", description="column with the worse response")


class TrajectoryFileConfig(SourceConfig):
    prompt_column: str = Field("prompt", description="column with the prompt")
    response_column: str = Field("response", description="column with the response's text")
    ids_column: str = Field(
        "response_ids", description="column with the response's token ids; rows that have it are read without the text"
    )
    outcome_column: str | None = Field("outcome", description="column with 1 for right, 0 for wrong; null: not known")
    logprob_column: str | None = Field(
        None,
        description="column with log mu of each token id, by the policy that sampled; null: that was the start policy",
    )


class StepFileConfig(SourceConfig):
    format: Literal["auto", "trl", "math_shepherd", "prm800k"] = Field(
        "auto",
        description="of the rows: TRL's stepwise supervision, Math-Shepherd's, or PRM800K's; auto: by the first row",
    )
    prompt_column: str = Field("prompt", description="column with the prompt (trl)")
    steps_column: str = Field("completions", description="column with the list of steps (trl)")
    labels_column: str = Field(
        "labels",
        description="column with each step's label: true, false, a chance from 0 to 1, or null (trl); `repirl label` "
        "writes hard labels into `labels` and soft ones into `soft_labels`",
    )
    finished: bool = Field(
        True,
        description="the last step ends the solution, an end token follows it; false: the separator does (a row's own "
        "`finished` wins, and PRM800K's rows tell)",
    )
    tag: str = Field("ки", min_length=1, description="what follows each step (math_shepherd)")


def _as_separator(value: Any) -> Any:
    return {"newline": "\n", "blank_line": "\n\n"}.get(value, value) if isinstance(value, str) else value


class DataConfig(Section):
    train: Source = Field(None, description="prompts to sample on: a path or hub id, or a section with path and split")
    eval: Source = Field(None, description="held-out prompts and answers, likewise")
    prompt_column: str = Field("prompt", description="column with the prompt")
    answer_column: str | None = Field("answer", description="column with the right answer; null: no verifier")
    answers: Literal["text", "tests"] = Field(
        "text",
        description="what answer_column holds: a right answer, or tests of programs, of which public formats are known "
        "by their own columns, too (repirl/data/code.py); unless it is set, tests where verifier.kind is code",
    )
    verifier_column: str | None = Field(
        None, description="column that names what judges a row: math, code or custom (verifier.kind: mixed)"
    )
    solution_column: str | None = Field(None, description="column of `train` with expert solution(s)")
    solution_remove: str | None = Field(None, description="regular expression that is cut from expert solutions")
    experts: Annotated[ExpertFileConfig | list[ExpertFileConfig] | None, BeforeValidator(_as_sources)] = Field(
        None, description="expert trajectories in files of their own: one source or a list of them, each as in train"
    )
    verify_experts: bool = Field(False, description="leave out expert solutions that the verifier calls wrong")
    max_experts_per_prompt: Positive | None = Field(
        None, description="most expert solutions of a prompt, taken from its sources in turn; null: all"
    )
    pairs: Annotated[PairFileConfig | None, BeforeValidator(_as_source)] = Field(
        None, description="preference pairs: a path or hub id, or a section with path and columns"
    )
    trajectories: Annotated[TrajectoryFileConfig | None, BeforeValidator(_as_source)] = Field(
        None, description="fixed rollouts with their outcomes, likewise (`repirl sample` makes them)"
    )
    steps: Annotated[StepFileConfig | None, BeforeValidator(_as_source)] = Field(
        None, description="responses with labelled steps, likewise (`repirl label` makes them)"
    )
    eval_steps: Annotated[StepFileConfig | None, BeforeValidator(_as_source)] = Field(
        None, description="held-out responses with labelled steps, likewise"
    )
    step_separator: Annotated[str, BeforeValidator(_as_separator)] = Field(
        "\n", min_length=1, description="what ends a step of a response: any text, or the words newline or blank_line"
    )
    chat_template: bool = Field(False, description="wrap prompts with the tokenizer's chat template")
    system: str | None = Field(None, description="system message of the chat template")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the chat template, such as enable_thinking: false"
    )
    prompt_template: str = Field("{prompt}", description="text around the prompt")
    end_tokens: list[Token] | None = Field(
        None,
        min_length=1,
        description="what ends a response, each the text of one token or its id; the first ends expert solutions. "
        "null: the chat template's end of turn, the tokenizer's end token and those of the model's generation_config",
    )
    max_prompt_tokens: Positive = Field(1536, description="longest prompt (paper: 1536)")
    max_expert_tokens: Positive = Field(
        3000, description="longest response of experts (paper: 3000), pairs, fixed trajectories and labelled steps"
    )
    overlong: Literal["error", "drop"] = Field("error", description="what to do with longer ones")

    @property
    def expert_sources(self) -> list[ExpertFileConfig]:
        """Where expert trajectories come from: `experts`, or else the solution column of `train`; maybe nowhere."""
        if self.experts is not None:
            return self.experts if isinstance(self.experts, list) else [self.experts]
        if self.train is None or self.solution_column is None:
            return []
        columns = {name: getattr(self, name) for name in ("prompt_column", "solution_column", "answer_column")}
        return [ExpertFileConfig(**self.train.model_dump(), **columns)]

    def check(self) -> None:
        """ValueError for options that cannot be used, or would be ignored."""
        if self.experts == []:
            raise ValueError("data.experts is an empty list: name a source, or leave it out")
        for source in self.expert_sources if self.verify_experts else []:
            if source.answer_column is None:
                raise ValueError(
                    f"data.verify_experts is true, but the experts of {source.path!r} have no answers to be verified "
                    "by: set answer_column beside its path, or leave verify_experts out"
                )
        try:
            re.compile(self.solution_remove or "")
        except re.error as error:
            raise ValueError(
                f"data.solution_remove {self.solution_remove!r} is no regular expression: {error}"
            ) from error
        if "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"data.prompt_template is {self.prompt_template!r}, which has no {{prompt}}: every prompt would be the "
                "same; write {prompt} where it belongs"
            )
        if not self.chat_template:
            for name, value in {"system": self.system, "chat_template_kwargs": self.chat_template_kwargs}.items():
                if value:
                    raise ValueError(
                        f"data.{name} is {value!r}, but data.chat_template is false and only a chat template has it: "
                        "set data.chat_template: true, or leave it out"
                    )
