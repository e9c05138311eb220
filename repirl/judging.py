"""Which verifiers go with which data."""

from __future__ import annotations

from typing import Any

from repirl.dataconfig import DataConfig
from repirl.options import VerifierConfig


def with_answers(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration with `data.answers`: tests, where a verifier runs programs and it is not set."""
    sections = [
        values.get("verifier"),
        *[part.get("verifier") for part in [values.get("eval")] if isinstance(part, dict)],
    ]
    data = values.get("data")
    runs_programs = any(isinstance(section, dict) and section.get("kind") == "code" for section in sections)
    if not runs_programs or not isinstance(data, dict) or "answers" in data:
        return values
    return values | {"data": data | {"answers": "tests"}}


def check_verifiers(verifier: VerifierConfig, held_out: VerifierConfig | None, data: DataConfig) -> None:
    """ValueError for options of the verifiers that do not fit together, or not to the data.

    Args:
        verifier: of rollouts.
        held_out: `eval.verifier`.
        data: whose right answers they judge by.
    """
    for name, section in {"verifier": verifier, "eval.verifier": held_out}.items():
        if section is None:
            continue
        section.check(name)
        if section.kind == "mixed" and data.verifier_column is None:
            raise ValueError(
                f"{name}.kind is 'mixed', but data.verifier_column is null: name the column that says what judges a row"
            )
        if section.kind != "mixed" and data.verifier_column is not None:
            raise ValueError(
                f"data.verifier_column is {data.verifier_column!r}, but {name}.kind {section.kind!r} judges all rows: "
                f"set {name}.kind: mixed, or leave the column out"
            )
        wanted = {"code": "tests", "math": "text"}.get(section.kind)
        if wanted is not None and data.answers != wanted:
            raise ValueError(
                f"data.answers is {data.answers!r}, but {name}.kind {section.kind!r} judges by {wanted}: set "
                f"data.answers: {wanted}"
            )
