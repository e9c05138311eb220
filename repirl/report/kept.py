"""Responses that runs have kept, chosen for a page and put beside each other where they answer the same prompt."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from repirl.data.split import split_steps
from repirl.report.responses import Sample, Step, Variant
from repirl.report.runs import RunRecord
from repirl.report.samples import is_sample, read_rows, sample_files
from repirl.systems import SYSTEMS

_KINDS = {"train": "training", "eval": "evaluation"}
_ENDS = {"end": "with an end token", "length": "cut off at the length limit"}


@dataclass(frozen=True)
class Key:
    """What makes responses of several runs comparable. repeat: counts responses of one run with the same rest."""

    step: int
    kind: str
    index: int
    prompt: str
    repeat: int

    @property
    def order(self) -> tuple[int, str, int, str, int]:
        return self.step, self.kind, self.index, self.prompt, self.repeat


def kept_samples(runs: Sequence[RunRecord], most: int) -> tuple[list[Sample], list[str]]:
    """Cards for a page, in the order of turns, and what is to be said of the choice.

    Args:
        runs: the runs.
        most: responses of each run; whole turns are taken, spread evenly over the run.

    Raises:
        LogError: a file cannot be read.
    """
    keys = {run.name: [key for key, _ in _rows(run)] for run in runs}
    chosen = _choose(list(keys.values()), most)
    cards: dict[Key, list[tuple[RunRecord, dict[str, Any]]]] = {key: [] for key in chosen}
    for run in runs:
        for key, row in _rows(run):
            if key in cards:
                cards[key].append((run, row))
    remarks = [f"{name} kept no sampled responses (samples.jsonl)." for name, of_run in keys.items() if not of_run]
    for name, of_run in keys.items():
        shown = sum(key in cards for key in of_run)
        if shown < len(of_run):
            remarks.append(f"{name}: {shown} of {len(of_run)} kept responses are on this page.")
    rules = {run.name: _StepRule.of(run) for run in runs}
    return [_card(key, of_key, rules) for key, of_key in cards.items()], remarks


def _rows(run: RunRecord) -> Iterator[tuple[Key, dict[str, Any]]]:
    """File by file, because all of them together may be large."""
    repeats: Counter[Key] = Counter()
    for path in sample_files(run.folder):
        for row in read_rows(path, "sampled responses", is_sample):
            key = Key(row["step"], row["kind"], row["index"], row["prompt"], 0)
            repeats[key] += 1
            yield Key(key.step, key.kind, key.index, key.prompt, repeats[key] - 1), row


def _choose(keys: Sequence[Sequence[Key]], most: int) -> list[Key]:
    """Of each kind an equal number, from turns spread evenly between the first and the last one."""
    chosen: list[Key] = []
    kinds = sorted({key.kind for of_run in keys for key in of_run})
    for kind in kinds:
        turns: dict[int, dict[Key, None]] = {}
        sizes = Counter[tuple[int, int]]()
        for number, of_run in enumerate(keys):
            for key in of_run:
                if key.kind == kind:
                    turns.setdefault(key.step, {})[key] = None
                    sizes[key.step, number] += 1
        share = max(1, most // len(kinds))
        steps = spread(sorted(turns), max(1, share // max(sizes.values())))
        for step in steps:
            # One turn alone may hold more.
            chosen += sorted(turns[step], key=lambda key: key.order)[: max(share, share * len(keys) // len(steps))]
    return sorted(chosen, key=lambda key: key.order)


def spread(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of them at even distances, the first and the last one included; the last one if it is 1."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class _StepRule:
    """How a run's PRM scores steps (repirl.prm.StepRule). at_end: the chance that the logit at the last token stands
    for, rather than the mean of the tokens' rewards."""

    separator: str
    at_end: bool

    @classmethod
    def of(cls, run: RunRecord) -> _StepRule:
        separator = run.option("data.step_separator")
        system = SYSTEMS.get(str(run.option("objective")))
        at_end = system is not None and "prm" in system.reads and _scores_ends(str(run.option("prm.model")))
        return cls(separator if isinstance(separator, str) and separator else "\n", at_end)


def _scores_ends(model: str) -> bool:
    """Whether an exported PRM, that may be gone by now, says that it scores steps by their ends."""
    try:
        content = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return content["repirl"]["steps"]["score"] == "end"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def step_explanation(runs: Sequence[RunRecord]) -> str:
    """How steps are split and scored, in words."""
    rules = {run.name: _StepRule.of(run) for run in runs}
    texts = {
        name: f"a step ends with {json.dumps(rule.separator, ensure_ascii=False)} and scores as "
        + ("the chance that its last token's reward stands for" if rule.at_end else "the mean of its tokens' rewards")
        for name, rule in rules.items()
    }
    if len(set(texts.values())) == 1:
        text = next(iter(texts.values()))
        return text[0].upper() + text[1:] + "."
    return "; ".join(f"{name}: {text}" for name, text in texts.items()) + "."


def _card(key: Key, rows: Sequence[tuple[RunRecord, dict[str, Any]]], rules: dict[str, _StepRule]) -> Sample:
    kind = _KINDS[key.kind]
    return {
        "title": f"Turn {key.step}, {kind}, prompt {key.index}",
        "prompt": key.prompt,
        "note": "",
        "correct": None,
        "variants": [_variant(run, row, rules[run.name]) for run, row in rows],
        "tags": {
            "Run": [run.name for run, _ in rows],
            "Sampled in": [kind],
            "Turn": [str(key.step)],
            "Verdict": list(dict.fromkeys(_verdict(_number(row.get("outcome"))) for _, row in rows)),
            "End": list(dict.fromkeys(_ENDS.get(row["end_reason"], row["end_reason"]) for _, row in rows)),
        },
    }


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _verdict(outcome: float | None) -> str:
    if outcome is None:
        return "not verified"
    return {0.0: "wrong", 1.0: "right"}.get(outcome, "in between")


def _variant(run: RunRecord, row: dict[str, Any], rule: _StepRule) -> Variant:
    rewards = row["token_rewards"]
    if rewards is not None:
        rewards = [math.nan if (value := _number(r)) is None else value for r in rewards]
    count, end = row["length"], _ENDS.get(row["end_reason"], row["end_reason"])
    said = f"{count} token{'s' * (count != 1)}, {end}"
    variant: Variant = {
        "name": run.name,
        "tokens": [str(text) for text in row["token_texts"]],
        "rewards": rewards,
        "error_span": None,
        "response_start": 0,
        "correct": _number(row.get("outcome")),
        "note": said if rewards is not None else f"{said}; no PRM scored it",
    }
    if rewards:
        variant["steps"] = steps_of(variant["tokens"], rewards, rule.separator, rule.at_end, row["end_reason"] == "end")
    return variant


def steps_of(tokens: Sequence[str], rewards: Sequence[float], separator: str, at_end: bool, ended: bool) -> list[Step]:
    """The steps of a response, split as by `repirl.data.split.segment` and scored as by `PRM.score_steps`.

    Args:
        tokens: the text that each token adds.
        rewards: of each token.
        separator: what ends a step.
        at_end: a step's score is the chance that its last token's reward is the logit of; otherwise the mean reward.
        ended: whether the last token is an end token, which is no part of the text.
    """
    lengths = list(accumulate(len(text) for text in tokens[: len(tokens) - ended]))
    texts = split_steps("".join(tokens[: len(lengths)]), separator)
    ends = [bisect_left(lengths, end) + 1 for end in list(accumulate(map(len, texts)))[:-1]]
    # A token may hold the ends of two steps; these are one step.
    bounds = sorted({0, *(end for end in ends if end < len(tokens)), len(tokens)})
    steps: list[Step] = []
    for start, end in pairwise(bounds):
        part = rewards[start:end]
        score = _sigmoid(part[-1]) if at_end else sum(part) / len(part)
        steps.append({"start": start, "end": end, "score": score})
    return steps


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
