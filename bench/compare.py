"""``repirl bench compare A.json B.json``: two runs of ``bench.run``, say of two revisions, case by case.

Ratios are A's figure over B's: above 1, B is better (faster, smaller, more exact).
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.schema import load

FIGURES = ("time", "memory", "error")
RESAMPLES = 2000


class Comparison(NamedTuple):
    """One contender in one case, in both files."""

    case: str
    contender: str
    ours: bool
    ratios: dict[str, float]
    """By figure, of those that both files have."""
    low: float
    """The spread of the time's ratio; NaN without times."""
    high: float
    first: dict[str, Any]
    second: dict[str, Any]
    """The rows."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        first, second = load(options.first), load(options.second)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    compared = list(compare(first, second, options.unit))
    if not compared:
        print(f"no contender has figures in the same case of {options.first} and {options.second}", file=sys.stderr)
        return 2
    for name, file, result in (("A", options.first, first), ("B", options.second, second)):
        print(f"{name}: {file}, revision {result['revision']}, {result['date']}")
    for line in differences(first, second):
        print(f"differs: {line}")
    print(table(compared, options.unit))
    failures = [f"{name} has figures in A only" for name in lost(first, second)]
    for line in failures:
        print(line)
    if options.fail_below is None:
        return 0
    for row in compared:
        for figure in options.of:
            if row.ours and row.ratios.get(figure, math.inf) < options.fail_below:
                failures.append(f"{row.case}, {row.contender}: {figure} {row.ratios[figure]:.2f}")
                print(f"below {options.fail_below}: {failures[-1]}")
    return 1 if failures else 0


def compare(first: dict[str, Any], second: dict[str, Any], unit: str = "products") -> Iterator[Comparison]:
    """The contenders that both results have figures of, in the order of the first one.

    Args:
        first, second: contents of files, A and B.
        unit: of time: ``products``, each round's multiple of the yardstick in the same round, or ``seconds``.
    """
    others = {measured["name"]: measured for measured in second["cases"]}
    for measured in first["cases"]:
        other = others.get(measured["name"])
        rows = {row["contender"]: row for row in other["rows"] if "reason" not in row} if other else {}
        for row in measured["rows"]:
            if "reason" in row or row["contender"] not in rows:
                continue
            match = rows[row["contender"]]
            ratios = {
                "memory": _ratio(row["extra_bytes"], match["extra_bytes"]),
                # The result that lost most.
                "error": min(_ratio(error, match["errors"].get(key, error)) for key, error in row["errors"].items()),
            }
            low = high = math.nan
            if "median" in row and "median" in match:
                yardsticks = (measured["yardstick"], other["yardstick"]) if unit == "products" else (None, None)
                ratios["time"], low, high = time_ratio(row, match, *yardsticks)
            yield Comparison(measured["name"], row["contender"], row["ours"], ratios, low, high, row, match)


def _ratio(first: float, second: float) -> float:
    return first / second if second else (math.inf if first else 1.0)


def time_ratio(
    first: dict[str, Any],
    second: dict[str, Any],
    first_yardstick: dict[str, Any] | None = None,
    second_yardstick: dict[str, Any] | None = None,
) -> tuple[float, float, float]:
    """The ratio of two medians, and its spread: 95% of the ratios of medians over resampled rounds; if a file has no
    rounds, the quotients of opposite quartiles. With yardsticks, of times in multiples of these."""
    sides = ((first, first_yardstick), (second, second_yardstick))
    rounds = [_rounds(row, yardstick) for row, yardstick in sides]
    if all(rounds):
        generator = random.Random(0)
        draws = [[statistics.median(generator.choices(r, k=len(r))) for r in rounds] for _ in range(RESAMPLES)]
        ratios = sorted(a / b for a, b in draws)
        ratio = statistics.median(rounds[0]) / statistics.median(rounds[1])
        return ratio, ratios[round(0.025 * RESAMPLES)], ratios[round(0.975 * RESAMPLES) - 1]
    (median, low, high), (other, other_low, other_high) = (
        [row[key] / (yardstick["median"] if yardstick else 1) for key in ("median", "low", "high")]
        for row, yardstick in sides
    )
    return median / other, low / other_high, high / other_low


def _rounds(row: dict[str, Any], yardstick: dict[str, Any] | None) -> list[float]:
    seconds = row.get("seconds", [])
    if yardstick is None:
        return seconds
    return [time / unit for time, unit in zip(seconds, yardstick.get("seconds", []), strict=False)]


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What else than the revision is not the same, a line each."""
    keys = ("device", "cpu", "gpu", "cores", "threads", "memory_gib", "python", "instruction_set", "backend")
    lines = [
        f"{key}: {first.get(key)} / {second.get(key)}; compare {'products' if key in ('cpu', 'gpu') else 'with care'}"
        for key in keys
        if first.get(key) != second.get(key)
    ]
    versions = [result["versions"] for result in (first, second)]
    for name in sorted(versions[0].keys() | versions[1].keys()):
        one, other = (version.get(name) for version in versions)
        if one != other:
            lines.append(f"{name}: {one} / {other}")
    return lines


def lost(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Cases and contenders of ours that have figures in the first result and a reason in the second."""
    others = {measured["name"]: measured for measured in second["cases"]}
    return [
        f"{measured['name']}, {row['contender']} ({other['reason']})"
        for measured in first["cases"]
        for row in measured["rows"]
        for other in others.get(measured["name"], {"rows": []})["rows"]
        if row["ours"] and "reason" not in row and other["contender"] == row["contender"] and "reason" in other
    ]


def table(compared: list[Comparison], unit: str) -> str:
    """The comparisons as text, ours first in each case."""
    head = f"  {'':30}{'A ms':>10}{'B ms':>10}{'time A/B':>10}{'spread':>16}{'A MiB':>8}{'B MiB':>8}{'error A/B':>11}"
    lines, case = [], None
    for row in compared:
        if row.case != case:
            case = row.case
            lines += ["", case, head]
        cells = f"  {row.contender:30}"
        if "time" in row.ratios:
            cells += f"{1e3 * row.first['median']:10.1f}{1e3 * row.second['median']:10.1f}{row.ratios['time']:10.2f}"
            cells += f"{f'{row.low:.2f} to {row.high:.2f}':>16}"
        else:
            cells += f"{'-':>10}{'-':>10}{'-':>10}{'-':>16}"
        cells += f"{row.first['extra_bytes'] / 2**20:8.0f}{row.second['extra_bytes'] / 2**20:8.0f}"
        lines.append(f"{cells}{row.ratios['error']:11.2f}")
    ours = [row.ratios["time"] for row in compared if row.ours and "time" in row.ratios]
    in_rounds = all("seconds" in row.first and "seconds" in row.second for row in compared)
    spread = "95% by resampled rounds" if in_rounds else "opposite quartiles, where a file has no rounds"
    lines += ["", f"A/B above 1: B is better. Times in {unit}. Spread: {spread}."]
    if ours:
        mean = statistics.geometric_mean(ours)
        lines.append(f"ours: time A/B {mean:.2f} on average (geometric), {min(ours):.2f} to {max(ours):.2f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="repirl bench compare", description=(__doc__ or "").partition("``: ")[2])
    parser.add_argument("first", metavar="A.json", type=Path, help="what python -m bench.run --json wrote before")
    parser.add_argument("second", metavar="B.json", type=Path, help="and after")
    parser.add_argument(
        "--unit",
        choices=("products", "seconds"),
        default="products",
        help="of times: multiples of the bare product in the same rounds (default), which evens out a busy machine, "
        "or seconds",
    )
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="RATIO",
        help="exit code 1 if a ratio of ours is below it, or one of ours no longer runs",
    )
    parser.add_argument("--of", nargs="+", choices=FIGURES, default=["time"], help="ratios that count; default: time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
