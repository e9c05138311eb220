"""`repirl report`: runs, one or several beside each other, as one page."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from repirl.config import ConfigError, RunError
from repirl.output_path import PAGE, check_file
from repirl.report.charts import MAX_POINTS, Curve, Series
from repirl.report.html import ComparisonTable, Report, write_report
from repirl.report.kept import kept_samples, step_explanation
from repirl.report.markup import number
from repirl.report.reporter import LARGEST_PARETO_K, SMALLEST_ESS, weight_warnings
from repirl.report.runs import RunRecord, differences, pick, read_runs
from repirl.strict_yaml import dump_yaml

# Responses of each run that a page shows unless another number is given.
RESPONSES = 40
THINNED = (
    f"Of a line of more than {MAX_POINTS} turns at most {MAX_POINTS} points are drawn: the lowest and the highest of "
    "each stretch of turns."
)


@dataclass(frozen=True)
class _Chart:
    """A metric of metrics.jsonl, or one made of a line's metrics."""

    title: str
    metric: str | Callable[[dict[str, Any]], float | None]
    unit: str = ""
    says: str = ""
    percent: bool = False


def _throughput(line: dict[str, Any]) -> float | None:
    seconds, tokens = line.get("seconds/step"), line.get("tokens")
    return tokens / seconds if seconds and tokens is not None else None


# As a unit: that of the runs' token rewards.
REWARD = "{reward}"
CHARTS = (
    _Chart("Held-out accuracy", "eval/accuracy", "", "share answered right", percent=True),
    _Chart("Accuracy of rollouts", "rollout/outcome", "", "mean outcome of the sampled responses", percent=True),
    _Chart("Reward gap", "prm/reward_gap", REWARD, "experts minus policy"),
    _Chart("Effective sample size", "prm/ess_fraction", "", "share of the samples", percent=True),
    _Chart("Pareto k", "prm/pareto_k", "", "of uneven importance weights; above 0.7 not to be trusted"),
    _Chart("log Z", "prm/log_z", "nats"),
    _Chart("Mean reward of the policy", "prm/reward_mean", REWARD),
    _Chart("Entropy of the policy", "policy/entropy", "nats per token"),
    _Chart("KL of an update", "policy/approx_kl", "nats per token", "old policy to new policy"),
    _Chart("KL to the reference", "policy/kl_reference", "nats per token"),
    _Chart("Response length", "rollout/length", "tokens", "mean"),
    _Chart("Cut off at the length limit", "rollout/truncated", "", "share of the sampled responses", percent=True),
    _Chart("Clipped tokens", "policy/clip_fraction", "", "share of the response tokens", percent=True),
    _Chart("Chosen minus rejected", "policy/margin", "nats", "implicit reward of a pair"),
    _Chart("Pairs in the right order", "policy/accuracy", "", "share of the pairs", percent=True),
    _Chart("PRM loss", "prm/loss", "", "value of the objective, as it is minimised"),
    _Chart("Critic loss", "critic/loss", "", "squared error"),
    _Chart("Policy loss", "policy/loss", "", "value of the objective, as it is minimised"),
    _Chart("Gradient norm of the PRM", "prm/grad_norm", "", "before clipping"),
    _Chart("Gradient norm of the policy", "policy/grad_norm", "", "before clipping"),
    _Chart("Throughput", _throughput, "tokens/s", "of the whole turn"),
    _Chart("Sampling", "tokens_per_second/rollout", "tokens/s", "of the rollouts alone"),
)


def report(
    runs: Sequence[str | os.PathLike],
    output: str | os.PathLike | None = None,
    *,
    responses: int = RESPONSES,
    metrics: Sequence[str] = (),
) -> Path:
    """Write the page of one run, or of several beside each other.

    Args:
        runs: their folders (output_dir).
        output: the file, which is replaced; None for report.html in the run's folder, where there is one run.
        responses: of each run that are shown, of those that it kept.
        metrics: names in metrics.jsonl that get a chart, too.

    Returns:
        The file.

    Raises:
        ConfigError: a folder is not that of a run, no run has one of the metrics, or no page can be at `output`.
        RunError: a file cannot be read, or the page cannot be written.
    """
    if not runs:
        raise ConfigError("there is no run to report on: give --run DIR")
    if responses < 0:
        raise ConfigError(f"--responses is {responses}, expected 0 or more")
    records = read_runs(runs)
    if output is None and len(runs) > 1:
        raise ConfigError(
            f"a page of {len(runs)} runs is none of these runs' own (report.html in its folder): give --output FILE"
        )
    path = check_file(records[0].folder / "report.html" if output is None else output, PAGE, replaces=True)
    page = page_of(records, responses, metrics)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_report(path, page)
    except OSError as error:
        raise RunError(f"--output {str(path)!r} cannot be written: {error.strerror}") from error
    return path


def page_of(runs: Sequence[RunRecord], responses: int = RESPONSES, metrics: Sequence[str] = ()) -> Report:
    """What the page of these runs shows; see `report`."""
    charts = [*CHARTS, *_further(runs, metrics)]
    drawn = [(chart, curve) for chart in charts if (curve := _curve(chart, runs))["series"]]
    curves = [curve for _, curve in drawn]
    samples, remarks = kept_samples(runs, responses) if responses else ([], [])
    thinned = any(len(series["x"]) > MAX_POINTS for curve in curves for series in curve["series"])
    notes = [note for run in runs for note in _warnings(run)]
    return {
        "title": " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs beside each other",
        "subtitle": "; ".join(dict.fromkeys(_about(run) for run in runs)),
        "configuration": "",
        "environment": {},
        "table": _results(runs, drawn),
        "notes": [*notes, *remarks],
        "curves_lead": THINNED if thinned else "",
        "curves": curves,
        "samples": samples,
        "samples_lead": step_explanation(runs),
        "tables": _tables(runs),
        "configurations": {run.name: _configuration(run) for run in runs if run.configuration},
    }


def _further(runs: Sequence[RunRecord], metrics: Sequence[str]) -> list[_Chart]:
    known = {name for run in runs for line in run.lines for name in line} - {"step", "nonfinite"}
    for name in metrics:
        if name not in known:
            raise ConfigError(f"--metric {name!r} is in no metrics.jsonl of these runs; there are {sorted(known)}")
    drawn = {chart.metric for chart in CHARTS}
    return [_Chart(name, name) for name in dict.fromkeys(metrics) if name not in drawn]


def _unit(chart: _Chart, runs: Sequence[RunRecord]) -> str:
    if chart.unit != REWARD:
        return chart.unit
    kinds = {run.option("prm.reward") for run in runs if any("prm/reward_mean" in line for line in run.lines)}
    if kinds and kinds <= {"logprob", "implicit", "soft_q"}:
        return "nats per token"
    return "logits per token" if kinds == {"logit"} else "reward per token"


def _curve(chart: _Chart, runs: Sequence[RunRecord]) -> Curve:
    series: list[Series] = []
    lost = 0
    for run in runs:
        x, y = run.values(chart.metric) if isinstance(chart.metric, str) else _made(run, chart.metric)
        if x:
            series.append({"name": run.name, "x": x, "y": y})
            lost += sum(value is None for value in y)
    curve: Curve = {
        "title": chart.title,
        "xlabel": "turn",
        "ylabel": ", ".join(part for part in (chart.says, _unit(chart, runs)) if part),
        "series": series,
        "percent": chart.percent,
    }
    return curve | {"note": f"{lost} value{'s' * (lost != 1)} not finite: a gap in the line."} if lost else curve


def _made(run: RunRecord, make: Callable[[dict[str, Any]], float | None]) -> tuple[list[float], list[float | None]]:
    points = [(line["step"], value) for line in run.lines if (value := make(line)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _about(run: RunRecord) -> str:
    system = run.option("objective")
    return f"{system}: {_turns(run)}" if system else _turns(run)


def _turns(run: RunRecord) -> str:
    done, total = run.lines[-1]["step"], run.option("steps")
    return f"{done} of {total} turns" if total is not None else f"{done} turn{'s' * (done != 1)}"


def _results(runs: Sequence[RunRecord], drawn: Sequence[tuple[_Chart, Curve]]) -> ComparisonTable:
    """Of one run the first, lowest, highest and last value of each curve; of several the last one of each run."""
    rows: list[list[str | float]] = []
    for chart, curve in drawn:
        unit = f", {_unit(chart, runs)}" if chart.unit else ""
        by_name = {series["name"]: [y for y in series["y"] if y is not None] for series in curve["series"]}
        if len(runs) == 1:
            [values] = by_name.values()
            ends = [values[0], min(values), max(values), values[-1]] if values else []
            figures: list[float | None] = [*ends, *[None] * (4 - len(ends))]
        else:
            figures = [next(iter(by_name.get(run.name, [])[-1:]), None) for run in runs]
        cells = ["-" if value is None else number(value, curve["percent"]) for value in figures]
        rows.append([curve["title"] + unit, *cells])
        if curve["title"] == CHARTS[0].title and len(runs) > 1:
            best = [number(max(by_name[run.name]), True) if by_name.get(run.name) else "-" for run in runs]
            rows.append([f"{curve['title']}, best", *best])
    columns = ["first", "lowest", "highest", "last"] if len(runs) == 1 else [run.name for run in runs]
    return {"columns": ["" if len(runs) == 1 else "at the last turn", *columns], "rows": rows}


def _warnings(run: RunRecord) -> list[str]:
    """What the metrics say of the run that a reader may overlook in the curves."""
    notes = []
    warned = Counter(name for line in run.lines for name in weight_warnings(line))
    turns = {name: sum(line.get(name) is not None for line in run.lines) for name in warned}
    if high := warned["prm/pareto_k"]:
        notes.append(
            f"{run.name}: in {high} of {turns['prm/pareto_k']} turns importance weights were uneven, with a Pareto k "
            f"above {LARGEST_PARETO_K}: a few rollouts carry them, and log Z is not to be trusted there."
        )
    if low := warned["prm/ess_fraction"]:
        notes.append(
            f"{run.name}: the effective sample size was below {SMALLEST_ESS:.0%} of the samples in {low} of "
            f"{turns['prm/ess_fraction']} turns."
        )
    for side in ("policy", "prm", "critic"):
        skipped = max((value or 0.0 for value in run.values(f"{side}/skipped_updates")[1]), default=0.0)
        if skipped:
            notes.append(f"{run.name}: {skipped:g} updates of the {side} were skipped, because they were not finite.")
    return notes


def _tables(runs: Sequence[RunRecord]) -> dict[str, ComparisonTable]:
    facts = [[title, *(read(run) for run in runs)] for title, read in FACTS.items()]
    tables: dict[str, ComparisonTable] = {"Runs": {"columns": ["", *(run.name for run in runs)], "rows": facts}}
    if len(runs) > 1:
        rows = [[name, *values] for name, values in differences(runs)]
        title = "Options that differ" if rows else "Options that differ: none but output_dir"
        if rows:
            tables[title] = {"columns": ["option", *(run.name for run in runs)], "rows": rows}
    return tables


def _fact(path: str) -> Callable[[RunRecord], str]:
    def read(run: RunRecord) -> str:
        value = pick(run, path)
        return "not recorded" if value is None else str(value)

    return read


def _moment(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return "not recorded"


def _started(run: RunRecord) -> str:
    later = [f"turn {start.get('step')} on {_moment(start.get('time'))}" for start in run.starts[1:]]
    first = _moment(pick(run, "time", start=0))
    if not later:
        return first
    times = f"{len(later)} time{'s' * (len(later) > 1)}"
    return f"{first}; went on {times}, {'last ' * (len(later) > 3)}at {', '.join(later[-3:])}"


def _duration(run: RunRecord) -> str:
    seconds = math.fsum(line.get("seconds/step") or 0.0 for line in run.lines)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _machine(run: RunRecord) -> str:
    machine = pick(run, "machine")
    if not isinstance(machine, dict):
        return "not recorded"
    processes = machine.get("processes")
    parts = [
        f"{processes} processes" if processes not in (None, 1) else "",
        str(machine.get("gpu") or ""),
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB",
        str(machine.get("system") or ""),
    ]
    return "; ".join(part for part in parts if part)


def _versions(run: RunRecord) -> str:
    packages = pick(run, "packages")
    if not isinstance(packages, dict):
        return "not recorded"
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _trained(run: RunRecord) -> str:
    return str(run.option("objective") or "not recorded")


# What the page says of a run, by title.
FACTS: dict[str, Callable[[RunRecord], str]] = {
    "system": _trained,
    "turns": _turns,
    "started": _started,
    "time of all turns": _duration,
    "repirl": _fact("version"),
    "revision": _fact("revision"),
    "machine": _machine,
    "packages": _versions,
    "folder": lambda run: str(run.folder),
}


def _configuration(run: RunRecord) -> str:
    """As YAML, the command above it."""
    command = pick(run, "command")
    return f"# {command}\n" * (command is not None) + dump_yaml(_nested(run.configuration))


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as sections."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested
