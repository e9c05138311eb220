"""What fits into a memory, what makes a run fit, and how a plan is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from repirl.config import Config, ConfigError
from repirl.configfile import build_config, merge
from repirl.plan.plan import GIB, Plan, plan
from repirl.report.display import print_table


def usable(memory: float, device: str) -> float:
    """How much of a device's memory a plan may fill, both in bytes. A GPU's also holds the CUDA context, libraries'
    workspaces and the gaps between blocks: 1 GiB and 5% are kept for them. Resident memory on a CPU holds what the C
    library keeps of freed blocks (bench/results/cpu/plan.md has the share measured), and there is a system: 15%."""
    return 0.95 * memory - GIB if device == "cuda" else 0.85 * memory


@dataclass(frozen=True)
class Fit:
    """Whether a memory suffices. switches: what has to be changed for it, nothing if it fits as it is; None where all
    of them together do not suffice. plan: with these changes, or the smallest that was found."""

    memory: int
    switches: list[str] | None
    plan: Plan


def find_fit(config: Config, memory: int, ranks: int = 1, device: str | None = None) -> Fit:
    """The fewest switches, cheap ones first, that make the run fit into `memory` bytes a process."""
    first = plan(config, ranks, device)
    available = usable(memory, first.device)
    if first.peak.total <= available:
        return Fit(memory, [], first)
    ladder = _ladder(config, ranks, first.device)
    levels = [0] * len(ladder)

    def attempt(levels: list[int]) -> Plan | None:
        changes: dict[str, Any] = {}
        count = ranks
        for level, steps in zip(levels, ladder, strict=True):
            if level:
                _, change, times = steps[level - 1]
                changes, count = merge(changes, change), count * times
        try:
            return plan(build_config(merge(config.model_dump(mode="json"), changes)), count, first.device)
        except ConfigError:
            # Switches that do not go together.
            return None

    best, found = first, None
    for place, steps in enumerate(ladder):
        for level in range(1, len(steps) + 1):
            trial = [*levels[:place], level, *levels[place + 1 :]]
            made = attempt(trial)
            if made is None:
                continue
            levels = trial
            if made.peak.total < best.peak.total:
                best = made
            if made.peak.total <= available:
                found = made
                break
        if found:
            break
    if found is None:
        return Fit(memory, None, best)
    # What was tried on the way and is not needed is taken back, the costliest first.
    for place in reversed(range(len(ladder))):
        while levels[place]:
            trial = [*levels[:place], levels[place] - 1, *levels[place + 1 :]]
            made = attempt(trial)
            if made is None or made.peak.total > available:
                break
            levels, found = trial, made
    names = [steps[level - 1][0] for level, steps in zip(levels, ladder, strict=True) if level]
    return Fit(memory, names, found)


# A setting of a switch: what it is called, what it changes, by how much it multiplies the processes.
Step = tuple[str, dict[str, Any], int]


def _ladder(config: Config, ranks: int, device: str) -> list[list[Step]]:
    """Switches that could still be changed, the cheapest first, each with its settings, the mildest first."""

    def both(name: str, values: dict[str, Any]) -> Step:
        return name, dict.fromkeys(config.system.trains, values), 1

    budgets = _halved(config.batch.tokens_per_microbatch, config.longest_sequence)
    counts = _halved(config.rollout.max_sequences, config.rollout.samples_per_prompt)
    checkpointing = {"gradient_checkpointing": True}
    on_gpu, shared = device == "cuda", config.adapters is not None
    ladder: list[list[Step]] = [
        [both("gradient_checkpointing", checkpointing)],
        [(f"batch.tokens_per_microbatch {n}", {"batch": {"tokens_per_microbatch": n}}, 1) for n in budgets],
    ]
    if config.rollout.engine == "transformers":
        ladder.append([(f"rollout.max_sequences {n}", {"rollout": {"max_sequences": n}}, 1) for n in counts])
    if config.rollout.engine == "vllm":
        sizes = [config.rollout.vllm.kv_cache_gib / n for n in (2, 4, 8)]
        ladder.append(
            [(f"rollout.vllm.kv_cache_gib {n:g}", {"rollout": {"vllm": {"kv_cache_gib": n}}}, 1) for n in sizes]
        )
    if on_gpu and config.computes_in == "float32":
        ladder.append([("compute_dtype bfloat16", {"compute_dtype": "bfloat16"}, 1)])
    if on_gpu:
        ladder.append([both("activation_offload", checkpointing | {"activation_offload": True})])
    if not shared and not config.parallel.cpu_offload:
        ladder.append([("offload_idle", {"offload_idle": True}, 1)])
    ladder.append([both("optimizer.state_bits 8", {"optimizer": {"state_bits": 8}})])
    if not shared:
        # On one base there is nothing idle that could leave.
        ladder.append([("adapters", {"adapters": {}, "offload_idle": False}, 1)])
    return [*ladder, [(f"{ranks * n} ranks", {}, n) for n in (2, 4, 8)]]


def _halved(value: int, least: int) -> list[int]:
    """value / 2, value / 4, ... down to `least`."""
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    if value > least:
        found.append(least)
    return found


# What is shown.


def gib(count: float) -> str:
    """Bytes as GiB with two digits behind the point."""
    return f"{count / GIB:.2f}"


def table(found: Plan) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of a plan: a phase a column, in GiB; empty cells are zero."""
    names = list(dict.fromkeys(name for phase in found.phases for name in phase.rows))
    rows = [[name, *(gib(p.rows[name]) if name in p.rows else "" for p in found.phases)] for name in names]
    return ["GiB", *(p.name for p in found.phases)], [*rows, ["together", *(gib(p.total) for p in found.phases)]]


def describe_fit(fit: Fit) -> str:
    """One line on a memory."""
    size, room = f"{fit.memory / GIB:g} GiB", gib(usable(fit.memory, fit.plan.device))
    peak = f"{gib(fit.plan.peak.total)} GiB in {fit.plan.peak.name}"
    if fit.switches is None:
        return f"{size} ({room} usable): does not fit with all switches; the least that was found is {peak}"
    if not fit.switches:
        return f"{size} ({room} usable): fits, {peak}"
    return f"{size} ({room} usable): does not fit as it is; fits with {', '.join(fit.switches)}: {peak}"


def print_plan(
    config: Config, memories: Sequence[float], ranks: int = 1, device: str | None = None, console: Console | None = None
) -> None:
    """Print the plan of a run and what it takes to fit into each memory (GiB a process)."""
    console = console or Console()
    show: Callable[[str], None] = functools.partial(console.print, soft_wrap=True, highlight=False)
    found = plan(config, ranks, device)
    one, several = ("GPU", "GPUs") if found.device == "cuda" else ("CPU process", "CPU processes")
    title = f"{config.policy.model}, {config.objective}, {ranks} {several if ranks > 1 else one}: GiB of each"
    print_table(title, *table(found), console=console)
    show(f"peak: {gib(found.peak.total)} GiB in {found.peak.name}; every prompt and response at its longest")
    if found.host:
        parts = ", ".join(f"{name} {gib(count)}" for name, count in found.host.items())
        show(f"in host memory for each GPU: {gib(sum(found.host.values()))} GiB ({parts})")
    for memory in memories:
        show(describe_fit(find_fit(config, int(memory * GIB), ranks, device)))
