"""Expert trajectories: a prompt and a solution, no labels of any kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from repirl.config import DataConfig
from repirl.data.prompts import DataError, LengthLimit, encode_prompt, read_rows


@dataclass(frozen=True)
class Expert:
    """One demonstration; response_ids end with the end token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def load_experts(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> list[Expert]:
    """From `data.experts`, or else from the solution column of `data.train`; a list in it gives one each.

    DataError for files, rows and lengths that do not fit (see load_prompts).
    """
    if data.experts is not None:
        path, prompt_column = data.experts.path, data.experts.prompt_column
        solution_column, option = data.experts.solution_column, "data.experts"
    else:
        if data.train is None or data.solution_column is None:
            raise DataError("expert trajectories need data.experts, or data.train and data.solution_column")
        path, prompt_column, solution_column, option = data.train, data.prompt_column, data.solution_column, "data"
    columns = {f"{option}.prompt_column": prompt_column, f"{option}.solution_column": solution_column}
    limit = LengthLimit(data, path)
    experts = []
    for number, row in read_rows(path, columns):
        prompt_ids = encode_prompt(row[prompt_column], data, tokenizer)
        if not prompt_ids:
            raise DataError(f"{path}, row {number}: the prompt has no tokens")
        found = row[solution_column]
        if found == []:
            raise DataError(f"{path}, row {number}: {solution_column!r} is an empty list, expected solutions")
        for solution in found if isinstance(found, list) else [found]:
            if not isinstance(solution, str):
                raise DataError(f"{path}, row {number}: {solution_column!r} holds {solution!r}, expected text")
            if data.solution_remove is not None:
                solution = re.sub(data.solution_remove, "", solution)
            if not solution.strip():
                raise DataError(f"{path}, row {number}: {solution_column!r} holds an empty solution")
            response_ids = (*tokenizer(solution, add_special_tokens=False).input_ids, tokenizer.eos_token_id)
            fits = limit.allows(
                len(prompt_ids), number, "prompt", "data.max_prompt_tokens", data.max_prompt_tokens
            ) and limit.allows(len(response_ids), number, "solution", "data.max_expert_tokens", data.max_expert_tokens)
            if fits:
                experts.append(Expert(prompt_ids, response_ids))
    limit.report(len(experts))
    return experts
