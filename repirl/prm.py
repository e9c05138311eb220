"""A trained PRM outside training: a folder that says of itself how its rewards are read, and token rewards from it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from repirl.batch import pack
from repirl.config import ConfigError
from repirl.data.split import StepForm, segment
from repirl.data.text import EndTokens, encode_joined, encode_prompt, encode_solution, find_end_tokens
from repirl.dataconfig import DataConfig, Token
from repirl.learner import Learner
from repirl.model_checks import check_vocabulary
from repirl.model_files import load_message, of_same_export
from repirl.models import load_model, load_tokenizer
from repirl.options import BatchConfig, PRMConfig
from repirl.packing import fit_window
from repirl.rewards import read_rewards
from repirl.section import PositiveFloat, Section
from repirl.sources import check_tokenizers

# Of descriptions; it changes with the names and the meaning of what is in them.
FORMAT: Final = 1

# Text, or token ids.
Part: TypeAlias = str | Sequence[int]


class PromptFormat(Section):
    """How texts become tokens (data.text)."""

    chat_template: bool
    prompt_template: str
    system: str | None
    chat_template_kwargs: dict[str, Any] = Field({})
    end_tokens: list[Token] | None = None


class StepRule(Section):
    """How a response's text is split into steps, and how steps are scored. `separator`: a step ends with the separator,
    which is part of it; the last one ends with the response, its end token included."""

    rule: Literal["separator"]
    separator: str = Field(min_length=1)
    score: Literal["tokens", "end"] = Field(
        "tokens",
        description="of a step: `tokens`, the mean reward of its tokens; `end`, sigmoid of the reward at its last "
        "token, the chance that the step is right",
    )
    aggregate: Literal["min", "mean", "product", "last"] = Field(
        "mean", description="of a response: of its step scores"
    )


class ReferenceModel(Section):
    """Where a frozen reference is found, as the run had it: folder or hub id, and a GGUF file in it."""

    model: str
    gguf_file: str | None


class PRMDescription(Section):
    """What a PRM says of itself, under `repirl` in its config.json. `repirl export` writes all of it; the defaults are
    for whoever describes another model (load_prm)."""

    format: Literal[1] = Field(FORMAT, description="version of this description")
    role: Literal["prm"] = Field("prm", description="an export's policy says 'policy'")
    reward: Literal["value", "logit", "soft_q", "logprob", "implicit"] = Field(description="how r_t is read")
    beta: PositiveFloat = Field(1.0, description="scale of `implicit` rewards")
    gamma: float = Field(1.0, ge=0, le=1, description="discount in `soft_q`")
    temperature: PositiveFloat = Field(1.0, description="at which the distribution over the vocabulary is read")
    reference: ReferenceModel | None = Field(None, description="what `implicit` rewards are relative to")
    token: Literal["action"] = Field("action", description="a reward at token t belongs to the action a_t, t itself")
    steps: StepRule = StepRule(rule="separator", separator="\n")
    prompt: PromptFormat = PromptFormat(chat_template=False, prompt_template="{prompt}", system=None)
    calibration: None = Field(None, description="of thresholds; there is none yet")


class Scorer(ABC):
    """What gives the reward of every token of a response: a model in this process (PRM), or one on a server.

    window: how many tokens a prompt and its response may have together; None where nothing names a limit.
    form: how responses are written, for a PRM of others (repirl.foreign).
    """

    tokenizer: PreTrainedTokenizerBase
    description: PRMDescription
    window: int | None
    form: StepForm | None = None

    @abstractmethod
    def rewards(self, pairs: Sequence[tuple[Part, Part]]) -> list[Tensor]:
        """For each pair of prompt and response, as token ids, r_t [R] float32 on the CPU."""

    @cached_property
    def prompts(self) -> DataConfig:
        """The options by which prompts become tokens (data.text)."""
        return DataConfig(**self.description.prompt.model_dump())

    @cached_property
    def ends(self) -> EndTokens:
        """What ends a response."""
        # Cached: they are found by rendering the chat template.
        return find_end_tokens(self.prompts, self.tokenizer)

    def score_steps(self, reward: Tensor, ends: Sequence[int]) -> Tensor:
        """The score of every step of one response, as `description.steps` says.

        Args:
            reward: of each token, [R].
            ends: for each step the index of its last token, increasing; the last one is R - 1.

        Returns:
            [S], as `PRM.step_scores`.
        """
        if self.description.steps.score == "end":
            return reward[list(ends)].sigmoid()
        lengths = [b - a for a, b in pairwise([-1, *ends])]
        return torch.stack([part.mean() for part in reward.split(lengths)])


@dataclass(frozen=True)
class PRM(Scorer):
    """A PRM and what it takes to read its rewards. learner: frozen. reference: frozen, for `implicit` rewards only."""

    learner: Learner
    tokenizer: PreTrainedTokenizerBase
    description: PRMDescription
    reference: Learner | None = None
    form: StepForm | None = None

    @property
    def window(self) -> int | None:  # type: ignore[override]
        """As Scorer."""
        models = [learner.model for learner in (self.learner, self.reference) if learner is not None]
        windows = [getattr(model.config, "max_position_embeddings", None) for model in models]
        return min((size for size in windows if size is not None), default=None)

    def rewards(self, pairs: Sequence[tuple[Part, Part]], *, finished: bool = True) -> list[Tensor]:
        """The reward of every response token.

        Args:
            pairs: (prompt, response), each of them text or token ids; see `encode`.
            finished: whether responses given as text get an end token; see `encode`.

        Returns:
            For each pair, in order, r_t [R] float32 on the CPU; R counts the response's tokens, the end token included.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        encoded = self.encode(pairs, finished=finished)
        if not encoded:
            return []
        batch = pack(encoded)
        for learner in (self.learner, self.reference):
            if learner is not None:
                fit_window(learner.model, "the PRM", int(batch.lengths.max()))
        if self.reference is not None:
            batch.write("prm_ref_logprob", self.reference.score(batch)["logprob"])
        described = self.description
        how = PRMConfig(reward=described.reward, gamma=described.gamma, beta=described.beta)
        reward = read_rewards(self.learner.score(batch), batch, how)
        return list(reward.split(batch.response_cu_seqlens.diff().tolist()))

    def step_scores(self, pairs: Sequence[tuple[Part, Part]], *, finished: bool = True) -> list[Tensor]:
        """The score of every step, as `description.steps` says.

        Args:
            pairs: (prompt, response), each of them text or token ids; see `encode`.
            finished: whether responses given as text get an end token; see `encode`.

        Returns:
            For each pair, in order, one number for each step [S] float32: the chance that it is right (score `end`), or
            the mean reward of its tokens.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        rule, scores = self.description.steps, []
        encoded = self.encode(pairs, finished=finished)
        for (_, ids), reward in zip(encoded, self.rewards(encoded), strict=True):
            steps = segment(ids, rule.separator, self.tokenizer, ended=ids[-1] in self.ends.ids)
            scores.append(self.score_steps(reward, steps.ends))
        return scores

    def response_scores(self, pairs: Sequence[tuple[Part, Part]], *, finished: bool = True) -> list[float]:
        """One number for each response: its step scores put together by `description.steps.aggregate`."""
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "min": torch.amin,
            "mean": torch.mean,
            "product": torch.prod,
            "last": lambda scores: scores[-1],
        }
        way = ways[self.description.steps.aggregate]
        return [float(way(scores)) for scores in self.step_scores(pairs, finished=finished)]

    def encode(self, pairs: Sequence[tuple[Part, Part]], *, finished: bool = True) -> list[tuple[list[int], list[int]]]:
        """The token ids that `rewards` is about, for each pair: (prompt, response).

        Text is encoded as in training: a prompt by its template, a response without special tokens. Token ids are taken
        as they are.

        Args:
            pairs: (prompt, response), each of them text or token ids.
            finished: responses given as text end with the end of turn, as the experts' do in training (one that ends
                with it already gets no other). False for beginnings of responses, and for those that
                were cut off: nothing is appended.

        Raises:
            TypeError: where a pair is none, or a part of it neither text nor token ids.
            ValueError: for an empty prompt or response, an id outside the vocabulary, or a pair that is longer than
                the model's window.
        """
        if isinstance(pairs, str | dict):
            raise TypeError(f"pairs is a {type(pairs).__name__}, expected a list of (prompt, response)")
        encoded = []
        for number, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(f"pair {number} is {pair!r:.60}, expected (prompt, response)")
            if self.form is not None and isinstance(pair[0], str) and isinstance(pair[1], str):
                text = self.form.write(self.form.steps(pair[1]))
                joined = encode_joined(pair[0], text, self.prompts, self.tokenizer)
                pair = (list(joined[0]), list(joined[1]))
            prompt = self._ids(pair[0], number, "prompt")
            response = self._ids(pair[1], number, "response")
            if isinstance(pair[1], str) and finished:
                response = list(encode_solution(pair[1], self.ends, self.tokenizer))
            self._check_length(number, len(prompt), len(response))
            encoded.append((prompt, response))
        return encoded

    def _ids(self, part: Part, number: int, what: str) -> list[int]:
        if isinstance(part, str):
            ids = self._encode_text(part, what)
        elif isinstance(part, tuple | list) and all(type(i) is int for i in part):
            ids = list(part)
        else:
            raise TypeError(f"pair {number}: the {what} is {part!r:.60}, expected text or a list of token ids (ints)")
        if not ids:
            raise ValueError(f"pair {number}: the {what} has no tokens")
        models = [learner.model for learner in (self.learner, self.reference) if learner is not None]
        size = min(model.config.vocab_size for model in models)
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise ValueError(
                f"pair {number}: the {what} has the token id {wrong[0]}, but the model's vocabulary has {size} tokens; "
                "were the ids made with another tokenizer?"
            )
        return ids

    def _encode_text(self, text: str, what: str) -> list[int]:
        if what == "response":
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(encode_prompt(text, self.prompts, self.tokenizer))

    def _check_length(self, number: int, prompt: int, response: int) -> None:
        model, length = self.learner.model, prompt + response
        window = getattr(model.config, "max_position_embeddings", length)
        if length > window:
            raise ValueError(
                f"pair {number} has {length} tokens ({prompt} of the prompt, {response} of the response), but the "
                f"model's window has {window} (max_position_embeddings in its config.json): shorten it, or leave it out"
            )


def load_prm(
    path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    tokens_per_microbatch: int | None = None,
    reference: str | os.PathLike | None = None,
    description: PRMDescription | None = None,
) -> PRM:
    """Load a PRM that `repirl export` wrote.

    Args:
        path: the exported folder `prm`, or a hub id.
        device: where it computes; by default a GPU if there is one.
        dtype: of its weights.
        tokens_per_microbatch: what one forward pass may hold; by default as in training (batch.tokens_per_microbatch).
            A longer pair has one of its own.
        reference: where the reference of `implicit` rewards is now, if it moved.
        description: how rewards are read, for a model that does not say so itself: any causal language model is a
            PRM with `PRMDescription(reward="logprob")`.

    Raises:
        ConfigError: where there is no model, it does not describe itself or not as a PRM, or its reference is missing.
    """
    name = os.fspath(path)
    if tokens_per_microbatch is None:
        tokens_per_microbatch = BatchConfig().tokens_per_microbatch
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch is {tokens_per_microbatch}, expected at least 1")
    config = _read_config(name)
    described = description or _read_description(name, config)
    relative_to = _reference_model(name, described, reference)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def frozen(model: str, kind: str, gguf_file: str | None = None) -> Learner:
        loaded = load_model(model, kind=kind, dtype=dtype, device=place, gguf_file=gguf_file)
        temperature = described.temperature
        return Learner(loaded, None, tokens_per_microbatch=tokens_per_microbatch, temperature=temperature)

    # A head that rewards are read off has to be a trained one.
    learner, other = frozen(name, _head(name, described, config).replace("value", "trained value")), None
    tokenizer = load_tokenizer(name)
    check_vocabulary(learner.model.config, name, tokenizer, name)
    if relative_to is not None:
        try:
            other = frozen(relative_to.model, "causal", relative_to.gguf_file)
            check_tokenizers(tokenizer, name, relative_to.model, relative_to.gguf_file)
        except ConfigError as error:
            raise ConfigError(f"the reference of the PRM {name!r}: {error} (if it moved, give reference=)") from error
    return PRM(learner, tokenizer, described, other)


def _head(name: str, description: PRMDescription, config: PretrainedConfig) -> str:
    """The kind of head (models.load_model) that rewards are read off; ConfigError where the files hold another one."""
    kind, ending = ("value", "ForTokenClassification") if description.reward == "value" else ("causal", "ForCausalLM")
    if config.architectures and not any(architecture.endswith(ending) for architecture in config.architectures):
        raise ConfigError(
            f"rewards of kind {description.reward!r} are read off a model of a class ...{ending}, but {name!r} holds a "
            f"{config.architectures[0]}"
        )
    return kind


def _reference_model(
    name: str, description: PRMDescription, moved_to: str | os.PathLike | None
) -> ReferenceModel | None:
    """The reference that rewards are relative to, None where they are to none."""
    described = description.reference
    if description.reward != "implicit":
        if moved_to is not None:
            raise ConfigError(f"reference is given, but rewards of kind {description.reward!r} have none: leave it out")
        return None
    if moved_to is not None:
        gguf_file = described.gguf_file if described is not None else None
        return ReferenceModel(model=os.fspath(moved_to), gguf_file=gguf_file)
    if described is None:
        raise ConfigError(
            f"`implicit` rewards of {name!r} are relative to a reference, and none is named: give reference="
        )
    return described


def _read_config(name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        message = load_message("PRM", name, None, error)
        inside = Path(name, "prm")
        if (inside / "config.json").is_file():
            message = f"{name!r} is no model; the PRM of this export is {str(inside)!r}"
        raise ConfigError(message) from error


def read_description(name: str) -> PRMDescription | None:
    """What the model in a folder, or a hub's, says of itself as a PRM; None where it says nothing.

    Raises:
        ConfigError: there is no model, or what it says cannot be used.
    """
    config = _read_config(name)
    return _read_description(name, config) if getattr(config, "repirl", None) is not None else None


def _read_description(name: str, config: PretrainedConfig) -> PRMDescription:
    """What config.json holds under `repirl`; ConfigError that says what is wrong with it, and the way out."""
    place = f"the description in {name!r} (config.json, key `repirl`)"
    again = "export the PRM again with this version of repirl"
    content: Any = getattr(config, "repirl", None)
    if content is None:
        raise ConfigError(
            f"{name!r} does not say how its rewards are read: its config.json has no key `repirl`. If an older repirl "
            f"exported it, {again}; for another model give load_prm a description="
        )
    if not isinstance(content, dict):
        raise ConfigError(f"{place} is {content!r:.60}, expected an object: {again}")
    if content.get("role") == "policy":
        raise ConfigError(f"{name!r} is the policy of an export, no PRM: {of_same_export(name, 'prm')}")
    if content.get("format") != FORMAT:
        raise ConfigError(
            f"{place} has format {content.get('format')!r}, this repirl reads format {FORMAT}: read it with the "
            f"version that wrote it, or {again}"
        )
    if missing := [key for key in PRMDescription.model_fields if key not in content]:
        raise ConfigError(f"{place} lacks {', '.join(map(repr, missing))}: {again}")
    try:
        return PRMDescription.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place} has a wrong {where!r} ({first['input']!r}: {first['msg']}): {again}") from error
