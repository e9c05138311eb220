"""The sandboxes of this machine, for tests, and whether one still holds."""

import os
import shutil
import time
from functools import cache
from pathlib import Path

from repirl.config import ConfigError
from repirl.verify.jail import limits as limiting
from repirl.verify.sandbox import KINDS, Limits, Sandbox

# Wide in time: other processes may want the cores. A program that is to run into it gets less.
LIMITS = Limits(wall_seconds=60, cpu_seconds=60, memory_mb=128, processes=8, open_files=32, file_mb=2, output_kb=64)


@cache
def kinds() -> list[str]:
    """The kinds that this machine has. Set REPIRL_SANDBOX_KIND for one of them alone."""
    wanted = os.environ.get("REPIRL_SANDBOX_KIND")
    return [kind for kind in KINDS if wanted in (None, kind) and _works(kind)]


def _works(kind: str) -> bool:
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return False
    try:
        Sandbox(LIMITS, kind=kind).close()
    except ConfigError:
        return False
    return True


def processes(sandbox: Sandbox) -> set[int]:
    """The processes of all workers of a sandbox, as they are when none runs a program."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        launchers = [worker.process.pid for slot in sandbox._slots for worker in slot.workers.values()]
        return {*launchers, *(pid for launcher in launchers for pid in limiting.descendants(proc, launcher))}
    finally:
        os.close(proc)


def assert_holds(sandbox: Sandbox, before: set[int]) -> None:
    """It runs the next program as if there had been no other, in the processes that it had before."""
    after = sandbox.run_program(
        "import os\nprint(input(), os.listdir(), os.listdir(os.environ['TMPDIR']) if 'TMPDIR' in os.environ else [])",
        "in",
    )
    assert (after.status, after.stdout) == ("ok", "in [] []\n"), after
    deadline = time.monotonic() + 30
    while processes(sandbox) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes(sandbox) == before


def leftovers(launchers: set[int]) -> set[str]:
    """What workers make outside of themselves, by their processes' numbers: folders of programs, control groups."""
    names = set()
    own = {line.split(":", 2)[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()}
    for launcher in launchers:
        for folder in (Path("/dev/shm"), Path("/tmp")):
            names |= {str(path) for path in folder.glob(f"repirl-sandbox-{launcher}-*")}
        for folder in Path("/sys/fs/cgroup").glob("*"):
            names |= {str(group) for path in own if (group := folder / path / f"repirl-{launcher}").exists()}
    return names
