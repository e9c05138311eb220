"""What fits into a memory, what makes a run fit, and how a plan is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console

from repirl.config import Config, ConfigError
from repirl.configfile import build_config, merge
from repirl.defaults import set_defaults, this_machine
from repirl.plan.plan import GIB, Plan, plan
from repirl.report.display import print_table


def usable(memory: float, device: str) -> float:
    """How much of a device's memory a plan may fill, both in bytes.

    A GPU's also holds the CUDA context, libraries' workspaces and the gaps between blocks: 1 GiB and 5% are kept for
    them. On a CPU the C library keeps freed blocks (bench/results/cpu/plan.md measures how many), and the system needs
    some for itself: 15% are kept.
    """
    return 0.95 * memory - GIB if device == "cuda" else 0.85 * memory


@dataclass(frozen=True)
class Fit:
    """Whether a run fits into a memory of so many bytes a process.

    switches: what has to be changed for it, empty where nothing has; None where no changes that are known suffice.
    plan: with these changes; where none suffice, the smallest plan that was found.
    """

    memory: int
    switches: list[str] | None
    plan: Plan


class Setting(NamedTuple):
    """A value of a switch: its name for people, the options that it changes, and by how much it multiplies the
    processes."""

    name: str
    changes: dict[str, Any]
    times: int = 1


# Switches, the cheapest first, each with its settings, the mildest first.
Ladder = list[list[Setting]]
# How far each switch is turned: 0 is as configured, n its nth setting.
Levels = list[int]


def find_fit(config: Config, memory: int, ranks: int = 1, device: str | None = None) -> Fit:
    """The fewest switches that make a run fit, cheap ones before dear ones.

    Args:
        config: the run's.
        memory: bytes of a device, or on a CPU of a process.
        ranks: processes that share the run.
        device: "cuda" or "cpu"; by default the configuration's, as for `plan`.
    """
    first = plan(config, ranks, device)
    config, _ = set_defaults(config, this_machine(first.device))
    available = usable(memory, first.device)
    if first.peak.total <= available:
        return Fit(memory, [], first)
    ladder = _ladder(config, ranks, first.device)
    attempt = functools.partial(_attempt, config, ranks, first.device, ladder)
    levels, smallest = _climb(attempt, ladder, first, available)
    if smallest.peak.total > available:
        return Fit(memory, None, smallest)
    levels, fitting = _take_back(attempt, levels, smallest, available)
    names = [settings[level - 1].name for level, settings in zip(levels, ladder, strict=True) if level]
    return Fit(memory, names, fitting)


def _attempt(config: Config, ranks: int, device: str, ladder: Ladder, levels: Levels) -> Plan | None:
    """The plan with these levels; None where they do not go together."""
    changes: dict[str, Any] = {}
    for level, settings in zip(levels, ladder, strict=True):
        if level:
            setting = settings[level - 1]
            changes, ranks = merge(changes, setting.changes), ranks * setting.times
    try:
        return plan(build_config(merge(config.model_dump(mode="json"), changes)), ranks, device)
    except ConfigError:
        return None


Attempt = Callable[[Levels], Plan | None]


def _climb(attempt: Attempt, ladder: Ladder, first: Plan, available: float) -> tuple[Levels, Plan]:
    """Turn one switch after the other as far as it goes, until the plan fits.

    Returns:
        The levels that were reached, and the smallest plan on the way: the last one where it fits.
    """
    levels, smallest = [0] * len(ladder), first
    for place, settings in enumerate(ladder):
        for level in range(1, len(settings) + 1):
            trial = _with(levels, place, level)
            made = attempt(trial)
            if made is None:
                continue
            levels = trial
            smallest = min(smallest, made, key=lambda p: p.peak.total)
            if made.peak.total <= available:
                return levels, made
    return levels, smallest


def _take_back(attempt: Attempt, levels: Levels, fitting: Plan, available: float) -> tuple[Levels, Plan]:
    """Turn back what is not needed, the dearest switch first."""
    for place in reversed(range(len(levels))):
        while levels[place]:
            trial = _with(levels, place, levels[place] - 1)
            made = attempt(trial)
            if made is None or made.peak.total > available:
                break
            levels, fitting = trial, made
    return levels, fitting


def _with(levels: Levels, place: int, level: int) -> Levels:
    return [*levels[:place], level, *levels[place + 1 :]]


def _ladder(config: Config, ranks: int, device: str) -> Ladder:
    """The switches that can still be turned."""

    def each(name: str, values: dict[str, Any]) -> Setting:
        return Setting(name, dict.fromkeys(config.system.trains, values))

    rollout, budget = config.rollout, config.batch.tokens_per_microbatch
    budgets = _halved(budget, config.longest_sequence)
    counts = _halved(rollout.max_sequences, rollout.samples_per_prompt)
    checkpointing = {"gradient_checkpointing": True}
    on_gpu, shared = device == "cuda", config.adapters is not None
    ladder: Ladder = [
        [each("gradient_checkpointing", checkpointing)],
        [Setting(f"batch.tokens_per_microbatch {n}", {"batch": {"tokens_per_microbatch": n}}) for n in budgets],
    ]
    if rollout.engine == "transformers":
        ladder.append([Setting(f"rollout.max_sequences {n}", {"rollout": {"max_sequences": n}}) for n in counts])
    if rollout.engine == "vllm":
        sizes = [rollout.vllm.kv_cache_gib / n for n in (2, 4, 8)]
        ladder.append(
            [Setting(f"rollout.vllm.kv_cache_gib {n:g}", {"rollout": {"vllm": {"kv_cache_gib": n}}}) for n in sizes]
        )
    if on_gpu and config.computes_in == "float32":
        ladder.append([Setting("compute_dtype bfloat16", {"compute_dtype": "bfloat16"})])
    if on_gpu:
        ladder.append([each("activation_offload", checkpointing | {"activation_offload": True})])
    if not shared and not config.parallel.cpu_offload:
        ladder.append([Setting("offload_idle", {"offload_idle": True})])
    ladder.append([each("optimizer.state_bits 8", {"optimizer": {"state_bits": 8}})])
    if not shared:
        # On one base there is nothing idle that could leave.
        ladder.append([Setting("adapters", {"adapters": {}, "offload_idle": False})])
    return [*ladder, [Setting(f"{ranks * n} ranks", {}, n) for n in (2, 4, 8)]]


def _halved(value: int, least: int) -> list[int]:
    """value / 2, value / 4, ... and `least` last."""
    values = []
    while value // 2 >= least:
        value //= 2
        values.append(value)
    if value > least:
        values.append(least)
    return values


# What is shown.


def gib(count: float) -> str:
    """Bytes as GiB, with two decimals."""
    return f"{count / GIB:.2f}"


def table(memory_plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a plan in GiB, with a column for each phase. An empty cell is zero."""
    names = list(dict.fromkeys(name for phase in memory_plan.phases for name in phase.rows))
    rows = [[name, *(gib(p.rows[name]) if name in p.rows else "" for p in memory_plan.phases)] for name in names]
    return ["GiB", *(p.name for p in memory_plan.phases)], [
        *rows,
        ["together", *(gib(p.total) for p in memory_plan.phases)],
    ]


def describe_fit(fit: Fit) -> str:
    """One line: whether the run fits, what has to be changed for it, and the peak."""
    size, room = f"{fit.memory / GIB:g} GiB", gib(usable(fit.memory, fit.plan.device))
    peak = f"{gib(fit.plan.peak.total)} GiB in {fit.plan.peak.name}"
    if fit.switches is None:
        return f"{size} ({room} usable): does not fit with all switches; the least that was found is {peak}"
    if not fit.switches:
        return f"{size} ({room} usable): fits, {peak}"
    return f"{size} ({room} usable): does not fit as it is; fits with {', '.join(fit.switches)}: {peak}"


def device_note(config: Config, planned: str, asked: str | None = None) -> str:
    """For which device a plan is, and why.

    Args:
        config: the run's.
        planned: "cuda" or "cpu", as the plan has it.
        asked: the device that was asked for beside the configuration, if any.
    """
    name, other = ("a GPU", "cpu") if planned == "cuda" else ("a CPU", "cuda")
    if asked is None and config.device == "auto":
        return f"planned for {name}, which device 'auto' takes where there is one; for a CPU: --device {other}"
    return f"planned for {name}, as device {(asked or config.device)!r} says"


def print_plan(
    config: Config, memories: Sequence[float], ranks: int = 1, device: str | None = None, console: Console | None = None
) -> None:
    """Print the plan of a run, and for each memory (in GiB a process) what makes the run fit into it."""
    console = console or Console()
    show: Callable[[str], None] = functools.partial(console.print, soft_wrap=True, highlight=False)
    memory_plan = plan(config, ranks, device)
    one, several = ("GPU", "GPUs") if memory_plan.device == "cuda" else ("CPU process", "CPU processes")
    title = f"{config.policy.model}, {config.objective}, {ranks} {several if ranks > 1 else one}: GiB of each"
    print_table(title, *table(memory_plan), console=console)
    show(device_note(config, memory_plan.device, device))
    for line in set_defaults(config, this_machine(memory_plan.device))[1]:
        show(line)
    show(
        f"peak: {gib(memory_plan.peak.total)} GiB in {memory_plan.peak.name}; every prompt and response at its longest"
    )
    if memory_plan.host:
        parts = ", ".join(f"{name} {gib(count)}" for name, count in memory_plan.host.items())
        show(f"in host memory for each GPU: {gib(sum(memory_plan.host.values()))} GiB ({parts})")
    for memory in memories:
        show(describe_fit(find_fit(config, int(memory * GIB), ranks, device)))
