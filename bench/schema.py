"""What ``bench.run --json`` writes: the fields and their meaning, a check of files, and the same as CSV."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import size_of

FORMAT = 2
"""Of files that are written now. Files of format 1 have no field ``format``."""


class Field(NamedTuple):
    kind: str
    """``text``, ``number``, ``count`` (an integer of at least 0), ``yes or no``, the name of a part below, ``[...]``
    for a list of these, ``{...}`` for an object with any names, or several of them with ``or``."""
    meaning: str
    needed: str = "always"
    """``always``, ``no``, or ``since N``: in files of format N and newer."""


PARTS: dict[str, dict[str, Field]] = {
    "file": {
        "format": Field("count", f"the format's number, {FORMAT} now; a file without it has 1", "since 2"),
        "date": Field("text", "the day, YYYY-MM-DD"),
        "revision": Field("text", "commit of the ops that were measured; `+changes` if their checkout was changed"),
        "device": Field("text", "`cpu` or `cuda`"),
        "cpu": Field("text", "the processor"),
        "cores": Field("count", "cores that the process may use"),
        "threads": Field("count", "PyTorch's threads"),
        "memory_gib": Field("number", "main memory, GiB"),
        "python": Field("text", "Python's version"),
        "backend": Field("text", "which of our kernels runs: `native`, `triton` or `reference`"),
        "instruction_set": Field("text or null", "of our C++ kernels"),
        "versions": Field("{text or null}", "of all contenders' packages; null: not installed"),
        "gpu": Field("text", "the GPU", "no"),
        "gpu_memory_gib": Field("number", "its memory, GiB", "no"),
        "cuda": Field("text or null", "CUDA's version", "no"),
        "driver": Field("text", "the driver's version", "no"),
        "command": Field("text", "the command that measured"),
        "profile": Field("text", "which cases; `own`: shapes of `--shape` alone"),
        "cases": Field("[measured case]", "in the order in which they were measured"),
    },
    "measured case": {
        "name": Field("text", "the case in words"),
        "case": Field("case", "the case"),
        "checked_rows": Field("count", "rows on which results were compared with float64", "since 2"),
        "rows": Field("[row]", "one for each contender"),
        "yardstick": Field(
            "times", "the bare matrix product, or for given logits their copy; missing if no time was measured", "no"
        ),
    },
    "case": {
        "shape": Field("text", "a model's name, or DxV"),
        "num_rows": Field("count", "N, rows of the hidden states"),
        "dtype": Field("text", "`bf16` or `fp32`"),
        "task": Field("text", "what is computed: `score`, `sft`, `policy`, `policy+entropy` or `logits`"),
        "masked": Field("number", "share of ignored rows"),
        "frozen": Field("yes or no", "whether the head's weight gets no gradient"),
    },
    "times": {
        "median": Field("number", "seconds"),
        "low": Field("number", "lower quartile, seconds"),
        "high": Field("number", "upper quartile, seconds"),
        "rounds": Field("count", "number of rounds"),
        "seconds": Field("[number]", "each round's, in order: items at one place are of one round", "since 2"),
    },
    "row": {
        "contender": Field("text", "its name; for `--peer`, module:function"),
        "ours": Field("yes or no", "whether it is one of ours"),
        "reason": Field("text", "why it could not run, or was not timed; then figures are missing", "no"),
        "errors": Field(
            "{number or null}",
            "by result: largest error against float64, relative to the largest value; null: not a finite number",
            "no",
        ),
        "extra_bytes": Field("count", "peak memory of a step without inputs and gradients", "no"),
        "median": Field("number", "seconds; also `low`, `high`, `rounds` and `seconds`, as in times", "no"),
        "low": Field("number", "lower quartile, seconds", "no"),
        "high": Field("number", "upper quartile, seconds", "no"),
        "rounds": Field("count", "number of rounds", "no"),
        "seconds": Field("[number]", "each round's", "no"),
        "products": Field("number", "the median in multiples of the yardstick's", "no"),
    },
}


def problems(value: object, kind: str = "file", where: str = "", version: int | None = None) -> list[str]:
    """What in a file's content is not as ``PARTS`` says, each with its place; nothing if it follows the schema."""
    if version is None:
        version = value.get("format", 1) if isinstance(value, Mapping) else 1
    if kind in PARTS:
        return _problems_of_part(value, kind, where, version)
    if kind.startswith("[") and isinstance(value, list):
        inner = kind[1:-1]
        return [text for i, item in enumerate(value) for text in problems(item, inner, f"{where}[{i}]", version)]
    if kind.startswith("{") and isinstance(value, Mapping):
        return [text for key, item in value.items() for text in problems(item, kind[1:-1], f"{where}.{key}", version)]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "text": isinstance(value, str),
        "number": is_number,
        "count": is_number and isinstance(value, int) and value >= 0,
        "yes or no": isinstance(value, bool),
        "null": value is None,
    }
    allowed = [kind] if kind in fits else kind.split(" or ")
    return [] if any(fits.get(word) for word in allowed) else [f"{where or 'the file'} is {value!r:.60}, not {kind}"]


def _problems_of_part(value: object, part: str, where: str, version: int) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{where or 'the file'} is {value!r:.60}, not an object"]
    wrong = []
    for name, field in PARTS[part].items():
        place = f"{where}.{name}".lstrip(".")
        if name in value:
            wrong += problems(value[name], field.kind, place, version)
        elif field.needed == "always" or (field.needed.startswith("since") and version >= int(field.needed[6:])):
            wrong.append(f"{place} is missing")
    others = [name for name in value if name not in PARTS[part]]
    return wrong + [f"{where}.{name}".lstrip(".") + " is not in the schema" for name in others]


def load(file: Path) -> dict[str, Any]:
    """The content of a file of results.

    Raises:
        ValueError: it cannot be read, or does not follow the schema.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    version = content.get("format", 1) if isinstance(content, dict) else 1
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(f"{file} is of format {version}; this revision reads up to {FORMAT}: use a newer one")
    if wrong := problems(content):
        raise ValueError(f"{file} is not what bench.run --json writes: {'; '.join(wrong[:3])}")
    return content


def markdown() -> str:
    """The schema as tables, for a page."""
    lines = []
    for part, fields in PARTS.items():
        lines += [f"**{part}**", "", "| field | is | meaning | present |", "|---|---|---|---|"]
        present = {"always": "always", "no": "where it applies"}
        for name, field in fields.items():
            needed = present.get(field.needed, f"{field.needed.replace('since', 'since format')}")
            lines.append(f"| `{name}` | {field.kind} | {field.meaning} | {needed} |")
        lines.append("")
    return "\n".join(lines)


COLUMNS = [
    *("file", "date", "revision", "device", "cpu", "gpu", "threads", "torch"),
    *("shape", "N", "D", "V", "dtype", "task", "masked", "frozen", "contender", "ours"),
    *("median_s", "low_s", "high_s", "rounds", "products", "yardstick_s", "extra_bytes"),
    *("error_logprob", "error_entropy", "error_dhidden", "error_dweight", "reason"),
]
"""Of the CSV: one line for each case and contender. An empty cell was not measured."""


def write_csv(file: Path, results: Mapping[str, dict[str, Any]]) -> None:
    """Write the rows of all results, by the name of their file, under ``COLUMNS``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for name, result in results.items():
            writer.writerows(_lines(name, result))


def _lines(file: str, result: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for measured in result["cases"]:
        num_features, num_columns = size_of(measured["case"]["shape"])
        sizes = {"N": measured["case"]["num_rows"], "D": num_features, "V": num_columns}
        yardstick = {"yardstick_s": measured.get("yardstick", {}).get("median")}
        for row in measured["rows"]:
            seconds = {f"{key}_s": row.get(key) for key in ("median", "low", "high")}
            errors = {f"error_{key}": error for key, error in row.get("errors", {}).items()}
            head = {"file": file, **result, "torch": result["versions"].get("torch")}
            yield {**head, **measured["case"], **sizes, **row, **seconds, **yardstick, **errors}
