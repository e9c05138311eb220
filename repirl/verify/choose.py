"""Which verifier a configuration asks for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from repirl.config import ConfigError
from repirl.options import VerifierConfig
from repirl.verify.process import Verifier


class AnyVerifier(Protocol):
    """What judges responses: see repirl.verify.process.Verifier, which says what each part means. Beside it there are
    repirl.verify.code.CodeVerifier and MixedVerifier."""

    reasons: dict[int, str]

    @property
    def counts(self) -> Counter[str]:
        """Of responses so far, what is reported of them: `timeouts`, `overlong`, and what else the verifier counts."""
        ...

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float]: ...

    def close(self) -> None: ...


def make_verifier(config: VerifierConfig, *, explain: bool = False) -> AnyVerifier:
    """The verifier of these options.

    Args:
        config: what judges, and how.
        explain: with reasons for every verdict.

    Raises:
        ConfigError: it cannot be had here, such as a function that cannot be loaded, or a sandbox.
        RunError: a process of it does not start.
    """
    if config.kind == "code":
        # It imports the sandbox, which only this kind needs.
        from repirl.verify.code import CodeVerifier

        return CodeVerifier(config)
    if config.kind == "mixed":
        return MixedVerifier(config, explain=explain)
    return Verifier(config, explain=explain)


def count_metrics(counts: Iterable[Counter[str]]) -> dict[str, float]:
    """What processes counted (AnyVerifier.counts), together; `differing` as a share of what was judged twice."""
    total: Counter[str] = Counter(timeouts=0, overlong=0)
    for part in counts:
        total.update(part)
    metrics: dict[str, float] = dict(total)
    if twice := metrics.pop("judged_twice", 0):
        metrics["differing"] = total["differing"] / twice
    else:
        metrics.pop("differing", None)
    return metrics


def mixed_answer(kind: str, answer: str) -> str:
    """A right answer with the kind of verifier that judges by it, as MixedVerifier takes it."""
    return json.dumps({"verifier": kind, "answer": answer})


class MixedVerifier:
    """Judges each response by the kind of verifier that its row names (data.verifier_column). A right answer is a text
    of `mixed_answer`. Verifiers start when the first answer of their kind comes."""

    def __init__(self, config: VerifierConfig, *, explain: bool = False) -> None:
        self.config, self.explain = config, explain
        self.reasons: dict[int, str] = {}
        self._parts: dict[str, AnyVerifier] = {}

    @property
    def counts(self) -> Counter[str]:
        return sum((part.counts for part in self._parts.values()), Counter())

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """As repirl.verify.process.Verifier.judge. ConfigError where a row names `custom` and there is no function."""
        read = [json.loads(answer) for _, answer in pairs]
        rewards: dict[int, float] = {}
        self.reasons = {}
        for kind in sorted({row["verifier"] for row in read}):
            places = [i for i, row in enumerate(read) if row["verifier"] == kind]
            part = self._part(kind)
            judged = part.judge([(pairs[i][0], read[i]["answer"]) for i in places])
            rewards |= dict(zip(places, judged, strict=True))
            self.reasons |= {places[i]: reason for i, reason in part.reasons.items()}
        return [rewards[i] for i in range(len(pairs))]

    def close(self) -> None:
        for part in self._parts.values():
            part.close()

    def _part(self, kind: str) -> AnyVerifier:
        if kind not in self._parts:
            changes: dict[str, Any] = {"kind": kind}
            if kind != "custom":
                changes["function"] = None
            elif self.config.function is None:
                raise ConfigError(
                    "a row's verifier is 'custom', but verifier.function is not set: give the function that judges as "
                    '"module:name"'
                )
            self._parts[kind] = make_verifier(self.config.model_copy(update=changes), explain=self.explain)
        return self._parts[kind]
