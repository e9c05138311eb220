"""Profiles of single turns: what was computed, for how long, and on a GPU who held how much memory.

`log.profile_turns` names the turns. The main process writes for each of them into OUTPUT_DIR/profile:

    turn_N.trace.json.gz  every operation and kernel on a time line, for https://ui.perfetto.dev or chrome://tracing
    turn_N.txt            operations with their number and times, the dearest first
    turn_N.memory.pickle  with `log.memory_snapshot`: each allocation with its place in the code, for
                          https://pytorch.org/memory_viz
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from repirl.config import Config, ConfigError, first_line
from repirl.distributed.world import World

logger = logging.getLogger(__name__)

FOLDER = "profile"
# Operations in a table, and allocations that a snapshot remembers.
_NUM_ROWS, _NUM_ALLOCATIONS = 60, 200_000


def check_profile(config: Config, device: torch.device) -> None:
    """Refuse turns that never come, and a snapshot of memory that PyTorch does not manage.

    Raises:
        ConfigError: names the option.
    """
    late = [turn for turn in config.log.profile_turns if turn > config.steps]
    if late:
        raise ConfigError(
            f"log.profile_turns names turn {late[0]}, but the run has {config.steps} (steps): name earlier ones"
        )
    if config.log.memory_snapshot and device.type != "cuda":
        raise ConfigError(
            "log.memory_snapshot records PyTorch's allocator on a GPU; this runs on a CPU: leave it out "
            "(memory/peak_bytes in metrics.jsonl is the largest resident memory)"
        )


@contextmanager
def profiled(config: Config, world: World, turn: int) -> Iterator[None]:
    """A context for one turn, numbered from 1; it records where `log.profile_turns` names the turn.

    Where the files cannot be written, a warning says so, and the run goes on.
    """
    if turn not in config.log.profile_turns or not world.is_main:
        yield
        return
    on_gpu = world.device.type == "cuda"
    folder = Path(config.output_dir) / FOLDER
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    if config.log.memory_snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_NUM_ALLOCATIONS)
    try:
        with profile(activities=activities) as profiler:
            yield
        try:
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"turn_{turn}.trace.json.gz"))
            order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=_NUM_ROWS, max_name_column_width=80)
            (folder / f"turn_{turn}.txt").write_text(table + "\n", encoding="utf-8")
            if config.log.memory_snapshot:
                torch.cuda.memory._dump_snapshot(str(folder / f"turn_{turn}.memory.pickle"))
        except OSError as error:
            logger.warning("the profile of turn %d cannot be written to %s: %s", turn, folder, first_line(error))
    finally:
        if config.log.memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
