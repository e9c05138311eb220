"""Prompts, tokenised once; and the order in which a run goes through them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from repirl.config import ConfigError
from repirl.data.answers import read_answer
from repirl.data.errors import DataError
from repirl.data.sources import read_rows
from repirl.data.text import encode_prompt
from repirl.data.values import Place
from repirl.dataconfig import DataConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """index: row of the file, from 0 · token_ids: what the policy sees · answer: for the verifier."""

    index: int
    token_ids: tuple[int, ...]
    answer: str | None


@dataclass(frozen=True)
class PromptSet:
    """num_dropped: rows left out because they were over a length limit (data.overlong: drop)."""

    prompts: list[Prompt]
    num_dropped: int

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


class Cursor:
    """Endless passes over `size` rows; each pass has an order of its own that depends on (seed, epoch) only."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epoch = self.position = 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(self.size, generator=generator).tolist()

    def next(self, count: int) -> list[int]:
        """The next `count` row indices; a pass that ends goes over into the next one."""
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            part = self._order[self.position : self.position + count - len(taken)]
            self.position += len(part)
            taken += part
        return taken

    def state_dict(self) -> dict[str, int]:
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """ConfigError where the data changed since: positions would mean other rows."""
        if (state["size"], state["seed"]) != (self.size, self.seed):
            raise ConfigError(
                f"the checkpoint's data had {state['size']} rows with seed {state['seed']}, now there are "
                f"{self.size} rows with seed {self.seed}: resume with the data and seed of the run"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()


class Ordered:
    """Data in the order of a run; a checkpoint holds the place. `what`: names the data in messages."""

    what: str

    def __init__(self, size: int, seed: int) -> None:
        self._cursor = Cursor(size, seed)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data."""
        return {"cursor": self._cursor.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """ConfigError where the checkpoint is of a run without such data, or of other data."""
        if state is None:
            raise ConfigError(f"the checkpoint is of a run without {self.what}; it had another objective")
        self._cursor.load_state_dict(state["cursor"])


def read_prompt(
    row: dict[str, Any], place: Place, column: str, option: str, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Token ids of a row's prompt. DataError, which names the row, for what is none."""
    prompt = place.prompt(place.value(row, column, option), column)
    try:
        ids = encode_prompt(prompt, data, tokenizer)
    except DataError as error:
        raise place.error(str(error)) from error
    if not ids:
        raise place.error(f"the prompt in {column!r} has no tokens")
    return ids


class LengthLimit:
    """Checks lengths as `data.overlong` says: an error that tells the way out, or a count of what was dropped."""

    def __init__(self, data: DataConfig) -> None:
        self.overlong = data.overlong
        self.num_dropped = 0

    def allows(self, num_tokens: int, place: Place, what: str, option: str, limit: int) -> bool:
        if num_tokens <= limit:
            return True
        if self.overlong == "error":
            raise place.error(
                f"the {what} has {num_tokens} tokens, {option} is {limit}; raise it, or set data.overlong: drop to "
                "leave such rows out"
            )
        self.num_dropped += 1
        return False

    def report(self, source: str, num_kept: int) -> None:
        """Say what was dropped; DataError where nothing is left."""
        if self.num_dropped:
            logger.warning("%s: dropped %d overlong rows, kept %d", source, self.num_dropped, num_kept)
        if num_kept == 0:
            raise DataError(f"{source}: no row is left, {self.num_dropped} were over the length limits")


def load_prompts(data: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str) -> PromptSet:
    """Prompts of `data.train` or `data.eval` (split "train" or "eval")."""
    source = data.train if split == "train" else data.eval
    assert source is not None
    limit = LengthLimit(data)
    prompts = []
    for number, place, row in read_rows(source, "train" if split == "train" else "test"):
        token_ids = read_prompt(row, place, data.prompt_column, "data.prompt_column", data, tokenizer)
        answer = None
        if (column := data.answer_column) is not None:
            answer = read_answer(row, place, column, "data.answer_column", data)
        if limit.allows(len(token_ids), place, "prompt", "data.max_prompt_tokens", data.max_prompt_tokens):
            prompts.append(Prompt(number, token_ids, answer))
    limit.report(source.path, len(prompts))
    return PromptSet(prompts, limit.num_dropped)
