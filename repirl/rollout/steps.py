"""Sampling step by step: responses that have begun are continued to the end of their next step, by any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from repirl.data.split import decode, split_steps
from repirl.rollout.engine import Engine, Sampling, sequence_seed

# Tokens that are sampled at once. All responses that may still grow by as many are sampled side by side.
PIECE = 128


@dataclass(frozen=True)
class Begun:
    """A response that is to be continued.

    Args:
        prompt: the prompt's tokens, at least one.
        prefix: the response's tokens so far; none at its beginning.
        key: what the seeds are made of, beside the sampler's own.
        whole: to its end, rather than to the end of its next step.
    """

    prompt: tuple[int, ...]
    prefix: tuple[int, ...]
    key: tuple[int | str, ...]
    whole: bool = False


@dataclass(frozen=True)
class Continued:
    """token_ids: what was sampled, at least one token. ended: an end token ended the response. cut: it reached the
    length limit instead."""

    token_ids: tuple[int, ...]
    ended: bool
    cut: bool


class StepSampler:
    """Continues responses, to the end of a step or of the response.

    Engines stop at tokens, not at text. So sampling stops at each token that holds the separator, or that ends with a
    beginning of it; the text then decides whether the step is complete, and sampling goes on where it is not. A step
    that would be blank goes on, too (data.split). What is sampled depends on the response and its seeds only, but for
    rounding.

    Args:
        engine: samples; it has the weights.
        tokenizer: of the tokens.
        separator: what ends a step; it is part of it.
        sampling: temperature, end tokens, and the most tokens of a whole response.
        seed: what all seeds are made of, beside the keys.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, separator: str, sampling: Sampling, seed: int
    ) -> None:
        self.engine, self.tokenizer, self.separator = engine, tokenizer, separator
        self.sampling, self.seed = sampling, seed
        self._stops = (*sampling.end_ids, *stop_tokens(tokenizer, separator, sampling.end_ids))

    def continued(self, begun: Sequence[Begun]) -> list[Continued]:
        """Continue each of the responses. ValueError for one that has reached the length limit already."""
        longest = self.sampling.max_response_tokens
        if any(len(one.prefix) >= longest for one in begun):
            raise ValueError(f"a response has {longest} tokens already, the most that it may have")
        new: list[list[int]] = [[] for _ in begun]
        result: dict[int, Continued] = {}
        piece = 0
        while len(result) < len(begun):
            waiting = [i for i in range(len(begun)) if i not in result]
            limits = {i: self._limit(begun[i], new[i]) for i in waiting}
            # One call for each limit and for each set of end tokens.
            for limit, whole in sorted({(limits[i], begun[i].whole) for i in waiting}):
                chosen = [i for i in waiting if (limits[i], begun[i].whole) == (limit, whole)]
                self._sample(begun, new, chosen, limit, piece)
            for i in waiting:
                if (done := self._finished(begun[i], new[i])) is not None:
                    result[i] = done
            piece += 1
        return [result[i] for i in range(len(begun))]

    def _sample(self, begun: Sequence[Begun], new: list[list[int]], chosen: list[int], limit: int, piece: int) -> None:
        """Append to `new` what follows each of the chosen responses."""
        ends = self.sampling.end_ids if begun[chosen[0]].whole else self._stops
        responses = self.engine.generate(
            [[*begun[i].prompt, *begun[i].prefix, *new[i]] for i in chosen],
            [sequence_seed(self.seed, *begun[i].key, piece) for i in chosen],
            Sampling(limit, self.sampling.temperature, ends),
        )
        for i, response in zip(chosen, responses, strict=True):
            new[i] += response.token_ids

    def _limit(self, one: Begun, new: list[int]) -> int:
        """How many tokens may follow at once. Where the text ends with a beginning of the separator, the next token
        decides."""
        left = self.sampling.max_response_tokens - len(one.prefix) - len(new)
        pending = not one.whole and new and _ends_with_beginning(decode(new, self.tokenizer), self.separator)
        return min(left, 1 if pending else PIECE)

    def _finished(self, one: Begun, new: list[int]) -> Continued | None:
        if new[-1] in self.sampling.end_ids:
            return Continued(tuple(new), ended=True, cut=False)
        if len(one.prefix) + len(new) == self.sampling.max_response_tokens:
            return Continued(tuple(new), ended=False, cut=True)
        # A mark stands for the step that would follow, so that a step before it has to be complete.
        if not one.whole and len(split_steps(decode(new, self.tokenizer) + "x", self.separator)) > 1:
            return Continued(tuple(new), ended=False, cut=False)
        return None


def stop_tokens(tokenizer: PreTrainedTokenizerBase, separator: str, end_ids: Sequence[int]) -> tuple[int, ...]:
    """The tokens behind which a text may hold the separator, or a beginning of it, apart from end tokens.

    A token's text is what it adds behind another token, as tokenizers drop a space at the beginning of a text. Tokens
    that are a part of a character, which is decoded as a mark, are stop tokens where the separator is not ASCII.
    """
    before = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    size = len(decode(before, tokenizer))
    others = sorted(set(range(len(tokenizer))) - set(end_ids))
    texts = tokenizer.batch_decode(
        [[*before, i] for i in others], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    stops = []
    for i, text in zip(others, texts, strict=True):
        added = text[size:]
        is_part = not separator.isascii() and "\ufffd" in added
        if is_part or separator in added or _ends_with_beginning(added, separator):
            stops.append(i)
    return tuple(stops)


def _ends_with_beginning(text: str, separator: str) -> bool:
    """Whether a text ends with a beginning of the separator, but not with the whole of it."""
    return any(text.endswith(separator[:size]) for size in range(1, len(separator)))
