"""What a run would learn from, for `repirl train --dry-run`: the first of everything as the models will see it."""

from __future__ import annotations

import math
import re
from collections import Counter

import torch
from math_verify import parse
from transformers import PreTrainedTokenizerBase

from repirl.config import Config
from repirl.data.experts import Expert
from repirl.data.load import load_chosen_experts, source_names
from repirl.data.pairs import load_pairs
from repirl.data.prompts import Prompt
from repirl.data.steps import load_steps
from repirl.data.text import find_end_tokens
from repirl.data.trajectories import load_trajectories
from repirl.distributed.world import World
from repirl.options import VerifierConfig
from repirl.verify.math import extract_answer, is_overlong
from repirl.verify.process import Verifier

# Characters that are shown of a text.
_SHOWN = 2000


def preview(
    config: Config, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], experts: list[Expert]
) -> list[str]:
    """Lines about the first prompt, solution and answer, what ends a response, and which answers can be read.

    Args:
        config: the run's.
        tokenizer: the policy's.
        prompts: all of them, held-out ones too.
        experts: none where the system has none.
    """
    ends = find_end_tokens(config.data, tokenizer, config.policy.model)
    names = [repr(tokenizer.decode([i])) for i in ends.ids]
    lines = []
    first = prompts[0].token_ids if prompts else experts[0].prompt_ids if experts else None
    if first is not None:
        lines.append(f"first prompt: {_text(first, tokenizer)}")
    if experts:
        lines.append(f"first solution: {_text(experts[0].response_ids, tokenizer)}")
    lines.append(f"a response ends with {' or '.join(names)}")
    answers = [(prompt, prompt.answer) for prompt in prompts if prompt.answer is not None]
    if answers:
        lines += [f"first answer: {_quoted(answers[0][1])}", _readable(config.verifier, answers)]
    return lines


def preview_experts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Expert], list[str]]:
    """The expert trajectories that a run would learn from, and lines about them."""
    experts = load_chosen_experts(config, tokenizer, World(torch.device("cpu")))
    lens = [len(expert.prompt_ids) + len(expert.response_ids) for expert in experts]
    a_step = config.experts_per_step if "experts" in config.system.data and not config.matches_experts else None
    lines = [
        f"experts: {len(experts)} trajectories, {'those of its prompts' if a_step is None else a_step} a step, "
        f"{sum(lens) / len(lens):.0f} tokens on average, {max(lens)} at most"
    ]
    names = source_names(config.data)
    counts = Counter(expert.source for expert in experts)
    if len(names) > 1:
        lines.append(f"experts by source: {', '.join(f'{name} {counts[i]}' for i, name in enumerate(names))}")
    return experts, lines


def preview_pairs(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines about the preference pairs, and the first of them."""
    rows, per_step = load_pairs(config.data, tokenizer, config.policy.model), config.dpo.pairs_per_step
    lens = [len(row.chosen_ids) for row in rows], [len(row.rejected_ids) for row in rows]
    chosen, rejected = (sum(part) / len(part) for part in lens)
    first = rows[0]
    return [
        f"pairs: {len(rows)}, {chosen:.0f} tokens of chosen and {rejected:.0f} of rejected responses on average",
        f"run: {config.steps} steps of {per_step} pairs = {config.steps * per_step / len(rows):.2f} epochs",
        f"first prompt: {_text(first.prompt_ids, tokenizer)}",
        f"chosen: {_text(first.chosen_ids, tokenizer)}",
        f"rejected: {_text(first.rejected_ids, tokenizer)}",
    ]


def preview_trajectories(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines about the fixed rollouts, and the first of them."""
    rows = load_trajectories(config.data, tokenizer, config.policy.model, config.rollout.temperature)
    num_prompts, per_step = len({row.prompt_ids for row in rows}), config.rollout.prompts_per_step
    outcomes = [row.outcome for row in rows if not math.isnan(row.outcome)]
    right = f", {sum(outcome > 0.5 for outcome in outcomes) / len(outcomes):.1%} of them right" if outcomes else ""
    first = rows[0]
    return [
        f"fixed rollouts: {len(rows)} responses to {num_prompts} prompts{right}",
        f"run: {config.steps} steps of {per_step} prompts, at most {config.rollout.samples_per_prompt} responses each "
        f"= {config.steps * per_step / num_prompts:.2f} epochs",
        f"first prompt: {_text(first.prompt_ids, tokenizer)}",
        f"response, outcome {first.outcome:g}: {_text(first.response_ids, tokenizer)}",
    ]


def preview_steps(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines about the responses with labelled steps, and the first of them with its labels."""
    rows = load_steps(config.data, tokenizer, "train")
    parts = {"labelled": rows}
    if config.data.eval_steps is not None:
        parts["held out"] = load_steps(config.data, tokenizer, "eval")
    lines = []
    for name, part in parts.items():
        labels = [label for row in part for label in row.labels]
        share = sum(labels) / len(labels)
        lines.append(f"{name}: {len(labels)} steps of {len(part)} responses, {share:.1%} right")
    per_step, first = config.step_prm.responses_per_step, rows[0]
    lines.append(
        f"run: {config.steps} steps of {per_step} responses = {config.steps * per_step / len(rows):.2f} epochs"
    )
    lines.append(f"first prompt: {_text(first.prompt_ids, tokenizer)}")
    begin = 0
    for end, label in zip(first.ends, first.labels, strict=True):
        lines.append(f"label {label:g}: {_text(first.response_ids[begin : end + 1], tokenizer)}")
        begin = end + 1
    return lines


def _text(token_ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    return _quoted(str(tokenizer.decode(list(token_ids))))


def _quoted(text: str) -> str:
    return repr(text[:_SHOWN]) + (f" ... ({len(text)} characters)" if len(text) > _SHOWN else "")


def _readable(config: VerifierConfig, answers: list[tuple[Prompt, str]]) -> str:
    if config.kind in ("code", "mixed"):
        return f"answers: {len(answers)}, of verifier.kind {config.kind!r}"
    if config.kind == "custom":
        return f"answers: {len(answers)}, for {config.function} to judge"
    # In its processes: a parser may take any time.
    verifier = Verifier(config.model_copy(update={"kind": "custom", "function": f"{__name__}:can_read"}))
    try:
        verdicts = verifier.judge([(answer, answer) for _, answer in answers])
    finally:
        verifier.close()
    line = f"answers: the verifier can read {sum(map(int, verdicts))} of {len(answers)}"
    unread = next((pair for pair, verdict in zip(answers, verdicts, strict=True) if not verdict), None)
    if unread is None:
        return line
    prompt, answer = unread
    return f"{line}; the first that it cannot is {answer[:60]!r} (row {prompt.index}, from 0)"


def can_read(_: str, answer: str) -> float:
    """Whether the verifier of mathematical answers finds something to compare with in an answer: 1.0 or 0.0."""
    marked = extract_answer(answer)
    gold = answer.strip() if marked is None else marked
    if re.fullmatch(r"[-+]?[\d,]*\.?\d+", gold):
        return 1.0
    if is_overlong("", answer):
        return 0.0
    try:
        parsed = parse(rf"$\boxed{{{gold}}}$", parsing_timeout=None)
    except MemoryError:
        raise
    except Exception:
        return 0.0
    return float(any(not isinstance(part, str) for part in parsed))
