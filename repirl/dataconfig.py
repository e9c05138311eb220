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


class ExpertFileConfig(SourceConfig):
    prompt_column: str = Field("prompt", description="column with the prompt")
    solution_column: str = Field("solution", description="column with one solution or a list of them")


class DataConfig(Section):
    train: Source = Field(None, description="prompts to sample on: a path or hub id, or the options of SourceConfig")
    eval: Source = Field(None, description="held-out prompts and answers, likewise")
    prompt_column: str = Field("prompt", description="column with the prompt")
    answer_column: str | None = Field("answer", description="column with the right answer; null: no verifier")
    solution_column: str | None = Field(None, description="column of `train` with expert solution(s)")
    solution_remove: str | None = Field(None, description="regular expression that is cut from expert solutions")
    experts: ExpertFileConfig | None = Field(None, description="expert trajectories in a file of their own")
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
    max_expert_tokens: Positive = Field(3000, description="longest expert response (paper: 3000)")
    overlong: Literal["error", "drop"] = Field("error", description="what to do with longer ones")

    def check(self) -> None:
        """ValueError for options that cannot be used, or would be ignored."""
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
